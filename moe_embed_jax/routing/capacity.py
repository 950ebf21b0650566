"""Cells of fixed size: shapes are static, and what overflows a cell is dropped.

The `capacity` expert layer gives every expert one cell of s assignments (Switch Transformer, arXiv
2101.03961); `exchange.all_to_all` gives every shard of experts one.
"""

import math

import jax
import jax.numpy as jnp

from moe_embed_jax.routing.rows import count_experts, sum_choices, take


def cell_size(assignments: int, destinations: int, capacity_factor: float) -> int:
    """s: `capacity_factor` times an equal share of the assignments, rounded up to 8 rows, but
    never more than all of them."""
    share = math.ceil(capacity_factor * assignments / destinations)
    return min(-(-share // 8) * 8, assignments)


def fill_cells(destination_TK, destinations: int, cell: int):
    """Which slot of which cell every assignment gets.

    Args:
      destination_TK: int32; `destinations` (or more) means "nowhere" (padding).
      cell: slots of each cell.

    Returns:
      (slot_TK, dropped). slot_TK: int32 destination * cell + place; destinations * cell for what
      has no slot; first choices are placed before second ones, earlier tokens before later ones.
      dropped: float32 scalar, assignments that had a destination and found its cell full.
    """
    tokens, top_k = destination_TK.shape
    by_choice_A = destination_TK.T.reshape(-1)
    is_for_AE = by_choice_A[:, None] == jnp.arange(destinations)
    place_A = jnp.sum(jnp.where(is_for_AE, jnp.cumsum(is_for_AE, axis=0) - 1, 0), axis=1)
    wanted_A = by_choice_A < destinations
    kept_A = wanted_A & (place_A < cell)
    slot_A = jnp.where(kept_A, by_choice_A * cell + place_A, destinations * cell)
    dropped = jnp.sum(wanted_A & ~kept_A).astype(jnp.float32)
    return slot_A.astype(jnp.int32).reshape(top_k, tokens).T, dropped


def into_cells(x_TD, slot_TK, slots: int):
    """x_SD: the token of every slot, zero in empty ones."""
    tokens, top_k = slot_TK.shape
    token_TK = jnp.broadcast_to(jnp.arange(tokens)[:, None], (tokens, top_k))
    token_S = jnp.full(slots, tokens).at[slot_TK].set(token_TK, mode="drop")
    return take(x_TD, token_S)


def capacity(
    expert_mlp, x_TD, expert_TK, gate_TK, weights, capacity_factor: float = 1.25
) -> tuple[jax.Array, jax.Array]:
    """The signature of `reference.reference`, and `capacity_factor`; drops what overflows a cell.

    The result equals the reference on the assignments that were kept.
    """
    experts, width = count_experts(weights), x_TD.shape[1]
    cell = cell_size(expert_TK.size, experts, capacity_factor)
    slot_TK, dropped = fill_cells(expert_TK, experts, cell)
    x_EsD = into_cells(x_TD, slot_TK, experts * cell).reshape(experts, cell, width)
    y_EsD = jax.vmap(expert_mlp)(x_EsD, weights)
    return sum_choices(y_EsD.reshape(-1, width), slot_TK, gate_TK), dropped
