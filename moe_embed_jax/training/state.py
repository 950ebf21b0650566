"""What a checkpoint of a run holds, whatever the stage (stages/stage.py)."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from moe_embed_jax.mesh import replicated
from moe_embed_jax.models.encoder import abstract_params, init_params
from moe_embed_jax.sharding import optimizer_shardings, shardings, with_shardings

ONLY_TRAINING = ("log_scale", "projection")  # parts of `params` that no model folder has


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything a checkpoint holds. `step` counts finished updates.

    params: "encoder", and what the stage adds (`extra_params`): "head", the language-model
      head; "log_scale", the learned temperature; "projection", to a teacher's width.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def to_items(state: TrainState) -> dict:
    """The trees of a checkpoint: `params` (the encoder) and `mlm_head`, which model folders have,
    and `optimizer`, which only training needs."""
    training = {"step": state.step, "opt_state": state.opt_state}
    items = {"params": state.params["encoder"], "optimizer": training}
    if "head" in state.params:
        items["mlm_head"] = state.params["head"]
    training |= {name: state.params[name] for name in ONLY_TRAINING if name in state.params}
    return items


def from_items(items: dict) -> TrainState:
    """The inverse of `to_items`."""
    training = items["optimizer"]
    params = {"encoder": items["params"]}
    if "mlm_head" in items:
        params["head"] = items["mlm_head"]
    params |= {name: training[name] for name in ONLY_TRAINING if name in training}
    return TrainState(training["step"], params, training["opt_state"])


def restore_state(checkpoints, abstract: TrainState, step: int) -> TrainState:
    """The state that `checkpoints` (`Checkpoints`) hold of `step`, in the shapes and shardings of
    `abstract`.

    Checkpoints of the previous layout are converted: their optimiser state has the parts of
    `params` side by side, in one flat dict.
    """
    items = to_items(abstract)
    if any("encoder/" in path for path in checkpoints.shapes(step, "optimizer")):
        return from_items(checkpoints.restore(step, **items))
    opt_state = jax.tree.map(_flat, abstract.opt_state, is_leaf=_is_params)
    flat = items | {"optimizer": items["optimizer"] | {"opt_state": opt_state}}
    state = from_items(checkpoints.restore(step, **flat))
    state.opt_state = jax.tree.map(_nested, abstract.opt_state, state.opt_state, is_leaf=_is_params)
    return state


def _is_params(node) -> bool:
    """Whether a node of an optimiser's state has the structure of `TrainState.params`."""
    return isinstance(node, dict) and "encoder" in node


def _flat(node):
    """A tree of parameters in the previous layout; other nodes are unchanged."""
    if not _is_params(node):
        return node
    old_names = {"head": "mlm_head", "log_scale": "log_scale"}
    return node["encoder"] | {old_names[name]: node[name] for name in node if name != "encoder"}


def _nested(like, node):
    """The inverse of `_flat`; `like` is the tree that `_flat` was given."""
    if not _is_params(like):
        return node
    encoder = dict(node)
    parts = {"head": encoder.pop("mlm_head", None), "log_scale": encoder.pop("log_scale", None)}
    return {"encoder": encoder} | {name: parts[name] for name in like if name != "encoder"}


def init_state(stage, optimizer, seed: int) -> TrainState:
    key = jax.random.key(seed)
    extra = stage.extra_params(jax.random.fold_in(key, 1))
    params = {"encoder": init_params(stage.model, key)} | extra
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_state(stage, optimizer, mesh: jax.sharding.Mesh) -> TrainState:
    """The state as ShapeDtypeStructs with shardings: what restore and compilation are given."""
    params = {"encoder": abstract_params(stage.model)}
    params |= jax.eval_shape(lambda: stage.extra_params(jax.random.key(0)))
    opt_state = jax.eval_shape(optimizer.init, params)
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)
    placed = TrainState(
        replicated(mesh),
        shardings(params, stage.rules, mesh),
        optimizer_shardings(optimizer, opt_state, params, stage.rules, mesh),
    )
    return with_shardings(shapes, placed)


def create_state(stage, optimizer, mesh: jax.sharding.Mesh, seed: int) -> TrainState:
    """A fresh state, initialised in its final sharding; the same numbers on any mesh."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(stage, optimizer, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(lambda: init_state(stage, optimizer, seed), out_shardings=placed)()


def state_from_params(
    stage, optimizer, mesh: jax.sharding.Mesh, params: dict, seed: int = 0
) -> TrainState:
    """A state at step 0 around given parameters, which are in their shardings.

    Parts of the stage that are missing in `params` are made from `seed`; parts that it does
    not have are left out.
    """
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(stage, optimizer, mesh))
    extra = stage.extra_params(jax.random.fold_in(jax.random.key(seed), 1))
    missing = {name: tree for name, tree in extra.items() if name not in params}
    given = {name: tree for name, tree in params.items() if name in ("encoder", *extra)}
    params = given | jax.device_put(missing, replicated(mesh))
    with jax.set_mesh(mesh):
        opt_state = jax.jit(optimizer.init, out_shardings=placed.opt_state)(params)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), placed.step), params, opt_state)
