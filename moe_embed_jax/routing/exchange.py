"""How a layer's tokens meet its experts on a mesh.

Tokens are sharded over all mesh axes. Without an `expert` axis every device has all experts and
routes its own tokens; no token moves. With one, experts stay on their shard, and tokens travel to
them:

  ring        Every device's tokens travel round the `expert` axis, and every shard adds what its
              experts make of them. Dropless; one step's activations at a time. Each device sends
              all of its tokens to every shard.
  all_to_all  Every assignment is sent to its shard alone, in cells of fixed size; what overflows a
              cell is dropped, and counted.

All of this runs inside the encoder's `shard_map`: sorting by expert never leaves a device.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import platform
from moe_embed_jax.routing.blocked import blocked
from moe_embed_jax.routing.capacity import (
    capacity,
    cell_size,
    fill_cells,
    into_cells,
)
from moe_embed_jax.routing.expert_mlp import ExpertMLP
from moe_embed_jax.routing.grouped import grouped
from moe_embed_jax.routing.rows import count_experts, in_float32, sum_choices


@dataclasses.dataclass(frozen=True)
class Experts:
    """How expert layers are computed.

    backend: one of `encoder_config.BACKENDS`; "auto" is `grouped` on TPU and `blocked` elsewhere.
    exchange: one of `EXCHANGES`, used where the mesh has an `expert` axis.
    capacity_factor: of the cells of `capacity` and `all_to_all`; 1 is an equal share.
    """

    backend: str
    exchange: str
    capacity_factor: float

    def layer(self, mlp: ExpertMLP) -> Callable:
        """(x_TD, expert_TK, gate_TK, weights) -> (y_TD, dropped), for the mesh in context."""
        name = self.backend
        if name == "auto":
            name = "grouped" if platform() == "tpu" and mlp.kernel else "blocked"
        if name == "grouped":
            if mlp.kernel is None:
                raise UserError(
                    "model.expert_backend='grouped': this expert MLP has no kernel; choose "
                    "'blocked' or 'capacity'"
                )
            return functools.partial(grouped, mlp.kernel)
        if name == "capacity":
            return functools.partial(capacity, mlp.function, capacity_factor=self.capacity_factor)
        return functools.partial(blocked, mlp.function)


def apply_experts(
    mlp: ExpertMLP, x_RLD, expert_RLK, gate_RLK, weights, how: Experts
) -> tuple[jax.Array, jax.Array]:
    """Weighted expert outputs y_RLD and the number of dropped assignments (float32 scalar).

    Inside shard_map: everything is this device's own, the weights those of its e = E / shards
    experts. `expert_RLK == E` marks tokens that are not routed (padding): they get zero.
    """
    layer = how.layer(mlp)
    if jax.lax.axis_size("expert") > 1:
        layer = functools.partial(EXCHANGES[how.exchange], layer, how.capacity_factor)
    flat = [a.reshape(-1, a.shape[-1]) for a in (x_RLD, expert_RLK, gate_RLK)]
    y_TD, dropped = layer(*flat, weights)
    return y_TD.reshape(x_RLD.shape), dropped


def ring(layer, capacity_factor, x_TD, expert_TK, gate_TK, weights):
    """Tokens go to the experts, one shard after the other."""
    del capacity_factor
    shards, own = jax.lax.axis_size("expert"), count_experts(weights)
    first = jax.lax.axis_index("expert") * own
    next_shard = [(shard, (shard + 1) % shards) for shard in range(shards)]
    # The backward pass of the scan sums the gradients of what it closes over: in float32, not in
    # bfloat16, where every ring step would add a rounding error.
    float32 = in_float32(weights)

    def ring_step(carry, _):
        (x_TD, expert_TK, gate_TK, y_TD), dropped = carry
        here_TK = jnp.where(expert_TK >= first, expert_TK - first, own)
        here_TK = jnp.minimum(here_TK, own)  # `own`: not here
        cast = jax.tree.map(lambda w, like: w.astype(like.dtype), float32, weights)
        added_TD, dropped_here = layer(x_TD, here_TK, gate_TK, cast)
        rotating = (x_TD, expert_TK, gate_TK, y_TD + added_TD)
        rotating = jax.lax.ppermute(rotating, "expert", next_shard)
        return (rotating, dropped + dropped_here), None

    # Rematerialised: the backward pass too has the activations of one step at a time.
    start = ((x_TD, expert_TK, gate_TK, jnp.zeros_like(x_TD)), jnp.zeros((), jnp.float32))
    ((*_, y_TD), dropped), _ = jax.lax.scan(jax.checkpoint(ring_step), start, length=shards)
    return y_TD, dropped


def all_to_all(layer, capacity_factor, x_TD, expert_TK, gate_TK, weights):
    """Every assignment goes to its shard, and back."""
    shards, own = jax.lax.axis_size("expert"), count_experts(weights)
    cell = cell_size(expert_TK.size, shards, capacity_factor)
    slots = shards * cell
    slot_TK, dropped = fill_cells(expert_TK // own, shards, cell)  # padding, E, has no shard
    expert_S = jnp.full(slots, own).at[slot_TK].set(expert_TK % own, mode="drop")

    def exchange(array_SX):
        cells = array_SX.reshape(shards, cell, *array_SX.shape[1:])
        return jax.lax.all_to_all(cells, "expert", 0, 0).reshape(array_SX.shape)

    x_SD, expert_S = exchange(into_cells(x_TD, slot_TK, slots)), exchange(expert_S)
    one_S1 = jnp.ones((slots, 1), gate_TK.dtype)
    y_SD, dropped_here = layer(x_SD, expert_S[:, None], one_S1, weights)
    return sum_choices(exchange(y_SD), slot_TK, gate_TK), dropped + dropped_here


EXCHANGES = {"ring": ring, "all_to_all": all_to_all}
