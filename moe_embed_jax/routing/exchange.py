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
from moe_embed_jax.mesh import has_triton, platform
from moe_embed_jax.routing.blocked import blocked
from moe_embed_jax.routing.capacity import (
    capacity,
    cell_size,
    fill_cells,
    into_cells,
)
from moe_embed_jax.routing.dense_gradient import dense_router_gradient
from moe_embed_jax.routing.expert_mlp import ExpertMLP
from moe_embed_jax.routing.grouped import grouped
from moe_embed_jax.routing.ragged import ragged
from moe_embed_jax.routing.reference import reference
from moe_embed_jax.routing.rows import count_experts, in_float32, sum_choices


@dataclasses.dataclass(frozen=True)
class Experts:
    """How expert layers are computed.

    backend: one of `encoder_config.BACKENDS`, or "auto".
    exchange: one of `EXCHANGES`, used where the mesh has an `expert` axis.
    capacity_factor: of the cells of `capacity` and `all_to_all`; 1 is an equal share.
    router_gradient: "sparse", or "dense" (dense_gradient.py), which dropless ways have.
    """

    backend: str
    exchange: str
    capacity_factor: float
    router_gradient: str = "sparse"

    def layer(self, mlp: ExpertMLP) -> Callable:
        """(x_TD, expert_TK, gates, weights) -> (y_TD, dropped), for the mesh in context. `gates`:
        gate_TK; with the "dense" gradient (gate_TK, gate_TE)."""
        layer = self._layer(mlp)
        if self.router_gradient == "dense":
            return functools.partial(dense_router_gradient, layer, mlp.function)
        return layer

    def _layer(self, mlp: ExpertMLP) -> Callable:
        name = self._choose(mlp) if self.backend == "auto" else self.backend
        if name == "ragged" and platform() == "gpu" and not has_triton():
            raise UserError(
                "model.expert_backend='ragged' needs NVIDIA GPUs of compute capability 8.0 or more "
                "(A100, L4, H100): choose 'auto'"
            )
        kernel = {"grouped": mlp.kernel, "ragged": mlp.triton_kernel}.get(name)
        if name in ("grouped", "ragged") and kernel is None:
            raise UserError(
                f"model.expert_backend={name!r}: this expert MLP has no kernel for it; choose "
                "'blocked' or 'capacity'"
            )
        if name == "grouped":
            return functools.partial(grouped, kernel)
        if name == "ragged":
            return functools.partial(ragged, kernel)
        if name == "capacity":
            return functools.partial(capacity, mlp.function, capacity_factor=self.capacity_factor)
        return functools.partial(reference if name == "reference" else blocked, mlp.function)

    def _choose(self, mlp: ExpertMLP) -> str:
        """What "auto" is on the devices of the mesh: the fastest that drops nothing."""
        if platform() == "tpu" and mlp.kernel:
            return "grouped"
        if platform() == "gpu":
            # Not `blocked`: for every block of its loops a GPU waits for the host.
            return "ragged" if has_triton() and mlp.triton_kernel else "reference"
        return "blocked"


def apply_experts(
    mlp: ExpertMLP, x_RLD, expert_RLK, gates, weights, how: Experts
) -> tuple[jax.Array, jax.Array]:
    """Weighted expert outputs y_RLD and the number of dropped assignments (float32 scalar).

    Inside shard_map: everything is this device's own, also the weights of its e = E / shards
    experts. `expert_RLK == E` marks tokens that are not routed (padding): they get zero. `gates`:
    gate_RLK; with the "dense" gradient of the router (gate_RLK, gate_RLE).
    """
    layer = how.layer(mlp)
    if jax.lax.axis_size("expert") > 1:
        layer = functools.partial(EXCHANGES[how.exchange], layer, how.capacity_factor)
    inputs = x_RLD, expert_RLK, gates
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), inputs)
    y_TD, dropped = layer(*flat, weights)
    return y_TD.reshape(x_RLD.shape), dropped


def ring(layer, capacity_factor, x_TD, expert_TK, gates, weights):
    """Tokens go to the experts, one shard after the other."""
    del capacity_factor
    shards, own = jax.lax.axis_size("expert"), count_experts(weights)
    first = jax.lax.axis_index("expert") * own
    next_shard = [(shard, (shard + 1) % shards) for shard in range(shards)]
    # The backward pass of the scan sums the gradients of what it closes over: in float32, not in
    # bfloat16, where every ring step would add a rounding error.
    float32 = in_float32(weights)

    def ring_step(carry, _):
        (x_TD, expert_TK, gates, y_TD), dropped = carry
        here_TK = jnp.where(expert_TK >= first, expert_TK - first, own)
        here_TK = jnp.minimum(here_TK, own)  # `own`: not here
        cast = jax.tree.map(lambda w, like: w.astype(like.dtype), float32, weights)
        gates_here = gates
        if isinstance(gates, tuple):  # those of all experts: this shard's of them
            gate_TK, gate_TE = gates
            gates_here = gate_TK, jax.lax.dynamic_slice_in_dim(gate_TE, first, own, axis=1)
        added_TD, dropped_here = layer(x_TD, here_TK, gates_here, cast)
        rotating = (x_TD, expert_TK, gates, y_TD + added_TD)
        rotating = jax.lax.ppermute(rotating, "expert", next_shard)
        return (rotating, dropped + dropped_here), None

    # Rematerialised: the backward pass too has the activations of one step at a time.
    start = ((x_TD, expert_TK, gates, jnp.zeros_like(x_TD)), jnp.zeros((), jnp.float32))
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
