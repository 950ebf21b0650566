"""The training step: a pure function of (state, batch), jitted over the mesh.

The same function runs on one CPU core, on eight fake devices and on a pod, and is what the planner
compiles ahead of time. What is minimised is the stage's (stages/stage.py).
"""

import functools

import jax
import optax

from moe_embed_jax.data.batches import batch_shardings
from moe_embed_jax.mesh import replicated
from moe_embed_jax.sharding import as_moments
from moe_embed_jax.training.state import TrainState, abstract_state


def train_step(stage, optimizer, state: TrainState, batch):
    """One update of a `Stage`. Returns the new state and metrics (device arrays, nothing is waited
    for)."""
    grads, metrics = jax.grad(stage.loss_and_metrics, has_aux=True)(state.params, batch)
    grads = as_moments(grads, stage.rules)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = stage.clip(optax.apply_updates(state.params, updates))
    state = TrainState(state.step + 1, params, opt_state)
    return state, metrics | {"grad_norm": optax.global_norm(grads)}


def jit_train_step(stage, optimizer, mesh: jax.sharding.Mesh):
    """The compiled form: `step(state, batch) -> (state, metrics)`; `state` is donated.

    `step.jitted` is what `jax.jit` returned, for `lower`.
    """
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(stage, optimizer, mesh))
    jitted = jax.jit(
        functools.partial(train_step, stage, optimizer),
        in_shardings=(placed, batch_shardings(stage.Batch, mesh)),
        out_shardings=(placed, replicated(mesh)),
        donate_argnums=0,
    )

    def step(state: TrainState, batch):
        with jax.set_mesh(mesh):
            return jitted(state, batch)

    step.jitted = jitted
    return step
