"""Assignments sorted by expert, in tiles of one expert each: what `grouped` and `ragged` share.

The work follows the number of rows that each expert really has. Every expert's rows start at a new
tile, so that no tile is multiplied twice: on average half a tile per expert is empty. Tokens are
put in order, and back, by gathers in both directions (scatters are slow on TPU), and a gather past
the end reads zero: that is what padding gets. Empty rows hold copies of some token; their gate is
zero, and so are all gradients from them.
"""

import functools

import jax
import jax.numpy as jnp

from moe_embed_jax.kernels.tiles import Tiles
from moe_embed_jax.routing.rows import count_experts, sum_choices, take


def order(expert_TK, experts: int, tile: int):
    """How assignments are sorted by expert, each expert from a new tile of `tile` rows on.

    Returns `assignment_S` (row -> flat assignment; past the end for empty rows), `row_A` (its
    inverse; past the end for assignments without an expert) and the `Tiles`.
    """
    expert_A = expert_TK.reshape(-1)
    assignments = expert_A.shape[0]
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def in_sorted_tiles(kernel, tile, interpret, x_TD, expert_TK, gate_TK, weights):
    """y_TD of `reference.reference`, by a kernel on tiles of rows that belong to one expert.

    Args:
      kernel: the expert MLP on tiles of sorted rows, hashable, with the methods `forward` and
        `backward` of `kernels.experts.ActivationMLP` or `kernels.triton_experts.TritonMLP`.
      tile: rows of a tile. interpret: whether Pallas interprets the kernels.
    """
    return _forward(kernel, tile, interpret, x_TD, expert_TK, gate_TK, weights, save=False)[0]


def _fwd(kernel, tile, interpret, x_TD, expert_TK, gate_TK, weights):
    return _forward(kernel, tile, interpret, x_TD, expert_TK, gate_TK, weights, save=True)


def _forward(kernel, tile, interpret, x_TD, expert_TK, gate_TK, weights, save):
    sorting = assignment_S, row_A, tiles = order(expert_TK, count_experts(weights), tile)
    x_SD = _in_order(x_TD, assignment_S // expert_TK.shape[1])
    y_SD, saved = kernel.forward(x_SD, weights, tiles, interpret, save)
    y_TD = sum_choices(y_SD, row_A.reshape(gate_TK.shape), gate_TK)
    return y_TD, (x_TD, expert_TK, gate_TK, weights, sorting, saved)


def _bwd(kernel, tile, interpret, saved, dy_TD):
    del tile
    x_TD, expert_TK, gate_TK, weights, (assignment_S, row_A, tiles), saved = saved
    token_S = assignment_S // expert_TK.shape[1]
    x_SD, dy_SD = _in_order(x_TD, token_S), _in_order(dy_TD, token_S)
    gate_S1 = take(gate_TK.reshape(-1), assignment_S)[:, None].astype(jnp.float32)
    dx_SD, dgate_S1, dweights = kernel.backward(
        saved, x_SD, dy_SD, gate_S1, weights, tiles, interpret
    )
    experts = jnp.arange(count_experts(weights))
    is_used_E = jnp.any(expert_TK.reshape(-1) == experts[:, None], axis=1)
    dweights = jax.tree.map(
        lambda dw: jnp.where(is_used_E.reshape(-1, *[1] * (dw.ndim - 1)), dw, 0), dweights
    )
    dx_TD = sum_choices(dx_SD, row_A.reshape(gate_TK.shape), jnp.ones_like(gate_TK))
    dgate_TK = take(dgate_S1[:, 0], row_A).reshape(gate_TK.shape).astype(gate_TK.dtype)
    return dx_TD, None, dgate_TK, dweights


in_sorted_tiles.defvjp(_fwd, _bwd)
