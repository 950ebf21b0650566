"""Dropless expert layer for TPU: assignments sorted by expert, multiplied tile by tile.

The work follows the number of rows that each expert really has. Every expert's rows start at a new
tile, so that no tile is multiplied twice: on average half a tile per expert is empty. Tokens are
put in order, and back, by gathers in both directions (scatters are slow on TPU), and a gather past
the end reads zero: that is what padding gets. Empty rows hold copies of some token; their gate is
zero, and so are all gradients from them.
"""

import functools

import jax
import jax.numpy as jnp

from moe_embed_jax.kernels.experts import Tiles
from moe_embed_jax.mesh import platform
from moe_embed_jax.routing.rows import count_experts, sum_choices, take

# Of sorted assignments. Matrix units load weights while 128 or 256 rows stream through.
TILE_ROWS = 256
SMALL_TILE_ROWS = 128
LARGE = 131_072  # assignments


def grouped(kernel, x_TD, expert_TK, gate_TK, weights) -> tuple[jax.Array, jax.Array]:
    """The signature and result of `reference.reference`, with a kernel in place of the MLP.

    Off TPU kernels are interpreted: right, and slow.

    Args:
      kernel: the expert MLP on tiles of sorted rows, hashable; `kernels.experts.ActivationMLP` says
        what it must have.
    """
    y_TD = _grouped(kernel, platform() != "tpu", x_TD, expert_TK, gate_TK, weights)
    return y_TD, jnp.zeros((), jnp.float32)


def _tile_rows(assignments: int) -> int:
    if assignments >= LARGE:
        return TILE_ROWS
    return min(SMALL_TILE_ROWS, max(16, 1 << (assignments - 1).bit_length()))


def _order(expert_TK, experts: int):
    """How assignments are sorted by expert, each expert from a new tile on.

    Returns `assignment_S` (row -> flat assignment; past the end for empty rows), `row_A` (its
    inverse; past the end for assignments without an expert) and the `Tiles`.
    """
    expert_A = expert_TK.reshape(-1)
    assignments = expert_A.shape[0]
    tile = _tile_rows(assignments)
    tiles = assignments // tile + min(experts, assignments)
    # Experts before assignments: the long axis lies along the lanes of a TPU.
    is_for_EA = (expert_A == jnp.arange(experts)[:, None]).astype(jnp.int32)
    rows_E = is_for_EA.sum(axis=1)
    tiles_E = -(-rows_E // tile)
    end_E = jnp.cumsum(tiles_E)
    first_E = (end_E - tiles_E) * tile
    place_EA = first_E[:, None] + jnp.cumsum(is_for_EA, axis=1) - 1
    row_A = jnp.sum(is_for_EA * place_EA, axis=0)
    row_A = jnp.where(expert_A < experts, row_A, tiles * tile)

    last = jnp.maximum(end_E[-1] - 1, 0)
    number_t = jnp.minimum(jnp.arange(tiles), last)
    expert_t = jnp.sum(number_t[:, None] >= end_E, axis=1)
    expert_t = jnp.minimum(expert_t, experts - 1).astype(jnp.int32)
    is_last_t = (number_t == end_E[expert_t] - 1).astype(jnp.int32)

    # One sort of distinct numbers: TPUs take three times as long, to compile too, for a stable one
    # that carries the order along.
    sorted_A = jnp.sort(expert_A * assignments + jnp.arange(assignments), stable=False)
    sorted_A %= assignments
    before_E = jnp.cumsum(rows_E) - rows_E
    within_ts = (jnp.arange(tiles) * tile - first_E[expert_t])[:, None] + jnp.arange(tile)
    is_row_ts = (within_ts < rows_E[expert_t][:, None]) & (within_ts >= 0)
    place_S = (before_E[expert_t][:, None] + within_ts).reshape(-1)
    assignment_S = sorted_A.at[place_S].get(mode="clip")
    assignment_S = jnp.where(is_row_ts.reshape(-1), assignment_S, assignments)
    expected = min(assignments + experts * tile // 2, tiles * tile)
    return assignment_S, row_A, Tiles(expert_t, last[None], is_last_t, tile, expected)


def _in_order(array_AX, index_S):
    """Rows of `array` as they are sorted; empty rows get any."""
    return array_AX.at[index_S].get(mode="clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(kernel, interpret, x_TD, expert_TK, gate_TK, weights):
    return _grouped_fwd(kernel, interpret, x_TD, expert_TK, gate_TK, weights)[0]


def _grouped_fwd(kernel, interpret, x_TD, expert_TK, gate_TK, weights):
    order = assignment_S, row_A, tiles = _order(expert_TK, count_experts(weights))
    x_SD = _in_order(x_TD, assignment_S // expert_TK.shape[1])
    y_SD = kernel.forward(x_SD, weights, tiles, interpret)
    y_TD = sum_choices(y_SD, row_A.reshape(gate_TK.shape), gate_TK)
    return y_TD, (x_TD, expert_TK, gate_TK, weights, order)


def _grouped_bwd(kernel, interpret, saved, dy_TD):
    x_TD, expert_TK, gate_TK, weights, (assignment_S, row_A, tiles) = saved
    token_S = assignment_S // expert_TK.shape[1]
    x_SD, dy_SD = _in_order(x_TD, token_S), _in_order(dy_TD, token_S)
    gate_S1 = take(gate_TK.reshape(-1), assignment_S)[:, None].astype(jnp.float32)
    dx_SD, dgate_S1, dweights = kernel.backward(x_SD, dy_SD, gate_S1, weights, tiles, interpret)
    experts = jnp.arange(count_experts(weights))
    is_used_E = jnp.any(expert_TK.reshape(-1) == experts[:, None], axis=1)
    dweights = jax.tree.map(
        lambda dw: jnp.where(is_used_E.reshape(-1, *[1] * (dw.ndim - 1)), dw, 0), dweights
    )
    dx_TD = sum_choices(dx_SD, row_A.reshape(gate_TK.shape), jnp.ones_like(gate_TK))
    dgate_TK = take(dgate_S1[:, 0], row_A).reshape(gate_TK.shape).astype(gate_TK.dtype)
    return dx_TD, None, dgate_TK, dweights


_grouped.defvjp(_grouped_fwd, _grouped_bwd)
