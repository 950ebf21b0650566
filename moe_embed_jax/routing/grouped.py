"""Dropless expert layer for TPU: sorted tiles, multiplied by kernels/experts.py."""

import jax
import jax.numpy as jnp

from moe_embed_jax.mesh import platform
from moe_embed_jax.routing.sorted_tiles import in_sorted_tiles

# Of sorted assignments. Matrix units load weights while 128 or 256 rows stream through.
TILE_ROWS = 256
SMALL_TILE_ROWS = 128
LARGE = 131_072  # assignments


def grouped(kernel, x_TD, expert_TK, gate_TK, weights) -> tuple[jax.Array, jax.Array]:
    """The signature and result of `reference.reference`, with a kernel in place of the MLP
    (`expert_mlp.ExpertMLP.kernel`).

    Off TPU kernels are interpreted: right, and slow.
    """
    tile, interpret = _tile_rows(expert_TK.size), platform() != "tpu"
    y_TD = in_sorted_tiles(kernel, tile, interpret, x_TD, expert_TK, gate_TK, weights)
    return y_TD, jnp.zeros((), jnp.float32)


def _tile_rows(assignments: int) -> int:
    if assignments >= LARGE:
        return TILE_ROWS
    return min(SMALL_TILE_ROWS, max(16, 1 << (assignments - 1).bit_length()))
