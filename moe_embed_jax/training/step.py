"""The training step: a pure function of (state, batch), jitted over the mesh.

The same function runs on one CPU core, on eight fake devices and on a pod, and is what the planner
compiles ahead of time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from moe_embed_jax.mesh import batch_sharding, replicated
from moe_embed_jax.models.encoder import EncoderConfig, encode_tokens, init_params
from moe_embed_jax.models.pooling import mean_pool, take_texts
from moe_embed_jax.objectives.balance import balance_loss
from moe_embed_jax.objectives.contrast import ContrastConfig
from moe_embed_jax.objectives.infonce import infonce
from moe_embed_jax.sharding import rules_for, with_shardings


@dataclasses.dataclass(frozen=True)
class LossConfig(ContrastConfig):
    """The contrastive loss, and `balance`: coefficient of the load-balancing loss (perfect
    balance = 1)."""

    balance: float = 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """A global batch of B pairs, packed per device; every leading axis is sharded over the mesh.

    token_RL, text_index_RL, position_RL: packed rows (text index -1: padding).
    query_slot_B, document_slot_B: where each text was packed (device-local row * S + text index).
    query_id_B2, document_id_B2: 64-bit content ids as two int32.
    """

    token_RL: jax.Array
    text_index_RL: jax.Array
    position_RL: jax.Array
    query_slot_B: jax.Array
    document_slot_B: jax.Array
    query_id_B2: jax.Array
    document_id_B2: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything a checkpoint holds. `step` counts finished updates."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What the step is made of; `slots` (S) is the most texts that share a row."""

    model: EncoderConfig
    loss: LossConfig
    slots: int


def loss_and_metrics(config: StepConfig, params: dict, batch: Batch):
    """Total loss (float32 scalar) and metrics of one batch."""
    x_RLD, statistics = encode_tokens(
        config.model, params, batch.token_RL, batch.text_index_RL, batch.position_RL
    )
    pooled_RSD = mean_pool(x_RLD, batch.text_index_RL, config.slots)
    contrast = infonce(
        config.loss,
        take_texts(pooled_RSD, batch.query_slot_B),
        take_texts(pooled_RSD, batch.document_slot_B)[:, None],  # no hard negatives yet
        batch.query_id_B2,
        batch.document_id_B2[:, None],
    )
    valid_RL = batch.text_index_RL >= 0
    metrics = {
        "contrastive_loss": contrast.loss,
        "accuracy": contrast.accuracy,
        "masked_candidates": contrast.masked,
        "utilisation": jnp.mean(valid_RL.astype(jnp.float32)),
        "tokens": jnp.sum(valid_RL),
    }
    loss = contrast.loss
    if statistics is not None:
        balance = balance_loss(statistics)
        loss += config.loss.balance * balance
        assigned_ME = statistics.assignments_E
        metrics["balance"] = balance
        metrics["router_entropy"] = jnp.mean(statistics.entropy / statistics.tokens)
        metrics["expert_load"] = assigned_ME / assigned_ME.sum(-1, keepdims=True)  # [M, E]
    return loss, metrics | {"loss": loss}


def train_step(config: StepConfig, optimizer, state: TrainState, batch: Batch):
    """One update. Returns the new state and metrics (device arrays, nothing is waited for)."""
    grad_fn = jax.grad(functools.partial(loss_and_metrics, config), has_aux=True)
    grads, metrics = grad_fn(state.params, batch)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics["grad_norm"] = optax.global_norm(grads)
    return TrainState(state.step + 1, params, opt_state), metrics


def init_state(model: EncoderConfig, optimizer, seed: int) -> TrainState:
    params = init_params(model, jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_state(model: EncoderConfig, optimizer, mesh: jax.sharding.Mesh) -> TrainState:
    """The state as ShapeDtypeStructs with shardings: what restore and compilation are given."""
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    return with_shardings(shapes, rules_for(model.moe_every), mesh)


def create_state(model: EncoderConfig, optimizer, mesh: jax.sharding.Mesh, seed: int) -> TrainState:
    """A fresh state, initialised in its final sharding; the same numbers on any mesh."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(lambda: init_state(model, optimizer, seed), out_shardings=placed)()


def jit_train_step(config: StepConfig, optimizer, mesh: jax.sharding.Mesh):
    """The compiled form: `step(state, batch) -> (state, metrics)`; `state` is donated."""
    state = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config.model, optimizer, mesh))
    step = jax.jit(
        functools.partial(train_step, config, optimizer),
        in_shardings=(state, batch_sharding(mesh)),
        out_shardings=(state, replicated(mesh)),
        donate_argnums=0,
    )

    def run(state: TrainState, batch: Batch):
        with jax.set_mesh(mesh):
            return step(state, batch)

    run.jitted = step
    return run
