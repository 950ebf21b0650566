"""What a checkpoint of a run holds, and how gradients change it, whatever the objective.

`config` is the step's: of step.py (contrastive) or of masked_step.py. It has the encoder's config
(`model`), the sharding `rules` of all parameters, and `extra_params(key)`: those beside the
encoder's ("log_scale" of the contrastive loss, "mlm_head").
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from moe_embed_jax.mesh import replicated
from moe_embed_jax.models.encoder import init_params
from moe_embed_jax.sharding import (
    as_moments,
    optimizer_shardings,
    shardings,
    with_shardings,
)

HEAD = "mlm_head"  # a tree of its own in checkpoints
LOG_SCALE = "log_scale"  # of use to training alone


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything a checkpoint holds. `step` counts finished updates.

    `params` are the encoder's and those of the objective (`extra_params`), side by side.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def encoder_params(params: dict) -> dict:
    """Those of `TrainState.params` that are the encoder's."""
    return {name: tree for name, tree in params.items() if name not in (HEAD, LOG_SCALE)}


def to_items(state: TrainState) -> dict:
    """The trees of a checkpoint: the encoder alone and the language-model head, which others read,
    and all that training needs besides."""
    rest = {"step": state.step, "opt_state": state.opt_state}
    items = {"params": encoder_params(state.params), "optimizer": rest}
    if LOG_SCALE in state.params:
        rest[LOG_SCALE] = state.params[LOG_SCALE]
    if HEAD in state.params:
        items[HEAD] = state.params[HEAD]
    return items


def from_items(items: dict) -> TrainState:
    """The inverse of `to_items`."""
    rest = dict(items["optimizer"])
    step, opt_state = rest.pop("step"), rest.pop("opt_state")
    head = {HEAD: items[HEAD]} if HEAD in items else {}
    return TrainState(step, items["params"] | rest | head, opt_state)


def init_state(config, optimizer, seed: int) -> TrainState:
    key = jax.random.key(seed)
    params = init_params(config.model, key) | config.extra_params(jax.random.fold_in(key, 1))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_state(config, optimizer, mesh: jax.sharding.Mesh) -> TrainState:
    """The state as ShapeDtypeStructs with shardings: what restore and compilation are given."""
    shapes = jax.eval_shape(lambda: init_state(config, optimizer, 0))
    params, opt_state = shapes.params, shapes.opt_state
    placed = TrainState(
        replicated(mesh),
        shardings(params, config.rules, mesh),
        optimizer_shardings(optimizer, opt_state, params, config.rules, mesh),
    )
    return with_shardings(shapes, placed)


def create_state(config, optimizer, mesh: jax.sharding.Mesh, seed: int) -> TrainState:
    """A fresh state, initialised in its final sharding; the same numbers on any mesh."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(lambda: init_state(config, optimizer, seed), out_shardings=placed)()


def state_from_params(
    config, optimizer, mesh: jax.sharding.Mesh, params: dict, seed: int = 0
) -> TrainState:
    """A state at step 0 around given parameters, which are in their shardings: the encoder's, and
    those of the objective that there are; the others are made from `seed`."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))
    extra = config.extra_params(jax.random.fold_in(jax.random.key(seed), 1))
    missing = {name: tree for name, tree in extra.items() if name not in params}
    params = params | jax.device_put(missing, replicated(mesh))
    with jax.set_mesh(mesh):
        opt_state = jax.jit(optimizer.init, out_shardings=placed.opt_state)(params)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), placed.step), params, opt_state)


def updated(config, optimizer, state: TrainState, grads: dict) -> tuple[TrainState, jax.Array]:
    """(the state after one update, global norm of the gradient)."""
    grads = as_moments(grads, config.rules)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), optax.global_norm(grads)


def jit_step(step, config, optimizer, mesh: jax.sharding.Mesh, batch_shardings):
    """`step(state, batch) -> (state, metrics)` compiled for the mesh; `state` is donated."""
    state = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))
    jitted = jax.jit(
        step,
        in_shardings=(state, batch_shardings),
        out_shardings=(state, replicated(mesh)),
        donate_argnums=0,
    )

    def run(state: TrainState, batch):
        with jax.set_mesh(mesh):
            return jitted(state, batch)

    run.jitted = jitted
    return run
