"""Dropless expert layer for GPUs: sorted tiles, multiplied by kernels/triton_experts.py."""

import jax
import jax.numpy as jnp

from moe_embed_jax.kernels.triton_experts import SMALLEST, blocks
from moe_embed_jax.mesh import platform
from moe_embed_jax.routing.sorted_tiles import in_sorted_tiles


def ragged(kernel, x_TD, expert_TK, gate_TK, weights) -> tuple[jax.Array, jax.Array]:
    """The signature and result of `reference.reference`, with a kernel in place of the MLP
    (`expert_mlp.ExpertMLP.triton_kernel`).

    Off GPU kernels are interpreted: right, and slow.
    """
    few = max(SMALLEST, 1 << (expert_TK.size - 1).bit_length())
    tile, interpret = min(blocks().rows, few), platform() != "gpu"
    y_TD = in_sorted_tiles(kernel, tile, interpret, x_TD, expert_TK, gate_TK, weights)
    return y_TD, jnp.zeros((), jnp.float32)
