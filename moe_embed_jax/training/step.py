"""The training step: a pure function of (state, batch), jitted over the mesh.

The same function runs on one CPU core, on eight fake devices and on a pod, and is what the planner
compiles ahead of time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from moe_embed_jax.losses.contrast import clip_log_scale, initial_log_scale
from moe_embed_jax.losses.infonce import infonce
from moe_embed_jax.mesh import BATCH_SPEC, ROWS_SPEC
from moe_embed_jax.models.encoder import (
    EncoderConfig,
    encode_rows,
    gather_embeddings,
    in_compute_dtype,
)
from moe_embed_jax.models.pooling import pool_texts, take_texts
from moe_embed_jax.models.remat import in_pieces
from moe_embed_jax.routing.router import balance_loss, routing_metrics
from moe_embed_jax.sharding import rules_for, specs
from moe_embed_jax.training.run_config import LossConfig
from moe_embed_jax.training.state import LOG_SCALE, TrainState, encoder_params, jit_step, updated


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """A global batch of B pairs, packed per device into rows, and rows in chunks.

    token_CRL, text_index_CRL, position_CRL: packed rows (text index -1: padding). Every device has
      R / devices rows of each chunk; one chunk is encoded at a time.
    query_slot_B: where each query was packed (device-local row * S + text index).
    document_slot_BM: the same of its own document, then its M - 1 hard negatives.
    query_id_B2, document_id_BM2: 64-bit content ids as two int32.
    valid_BM: which documents are there (a query may have fewer hard negatives); the first always.

    Arrays with B are sharded over the mesh by pairs, those with C by rows.
    """

    token_CRL: jax.Array
    text_index_CRL: jax.Array
    position_CRL: jax.Array
    query_slot_B: jax.Array
    document_slot_BM: jax.Array
    query_id_B2: jax.Array
    document_id_BM2: jax.Array
    valid_BM: jax.Array


def batch_specs() -> Batch:
    """The PartitionSpec of every field."""
    fields = [field.name for field in dataclasses.fields(Batch)]
    return Batch(**{n: ROWS_SPEC if n.endswith("_CRL") else BATCH_SPEC for n in fields})


def batch_shardings(mesh: jax.sharding.Mesh) -> Batch:
    """The sharding of every field."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), batch_specs())


def abstract_batch(
    mesh: jax.sharding.Mesh, pairs: int, chunks: int, rows: int, row_length: int, negatives: int = 0
) -> Batch:
    """A batch of ShapeDtypeStructs: `pairs` (B) and `rows` (R, of a chunk) over all devices,
    `negatives` (N) hard negatives a pair."""
    placed = batch_shardings(mesh)
    documents = 1 + negatives

    def array(name, dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=getattr(placed, name))

    tokens = ("token_CRL", "text_index_CRL", "position_CRL")
    return Batch(
        **{name: array(name, jnp.int32, chunks, rows, row_length) for name in tokens},
        query_slot_B=array("query_slot_B", jnp.int32, pairs),
        document_slot_BM=array("document_slot_BM", jnp.int32, pairs, documents),
        query_id_B2=array("query_id_B2", jnp.int32, pairs, 2),
        document_id_BM2=array("document_id_BM2", jnp.int32, pairs, documents, 2),
        valid_BM=array("valid_BM", bool, pairs, documents),
    )


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What the step is made of; `slots` (S) is the most texts that share a row."""

    model: EncoderConfig
    loss: LossConfig
    slots: int

    @property
    def rules(self) -> tuple:
        """Shardings of all parameters; the temperature is a scalar and needs none."""
        return rules_for(self.model)

    def extra_params(self, key: jax.Array) -> dict:
        """Parameters of the loss, beside the encoder's."""
        del key
        return {LOG_SCALE: initial_log_scale(self.loss)} if self.loss.learn_temperature else {}


def encode_batch(config: StepConfig, params: dict, batch: Batch):
    """(query_BD, document_BMD, routing statistics of every device or None).

    Every device encodes its own rows and takes its own texts from them; devices add up their
    gradients once, after the last chunk.
    """
    model = config.model

    def local(params, batch: Batch):
        rows = (batch.token_CRL, batch.text_index_CRL, batch.position_CRL)
        pooled_RSD, statistics = encode_chunks(config, gather_embeddings(model, params), rows)
        texts = [take_texts(pooled_RSD, s) for s in (batch.query_slot_B, batch.document_slot_BM)]
        return *texts, jax.tree.map(lambda leaf: leaf[None], statistics)

    # check_vma is off because the hand-written VJPs return per-device weight gradients; shard_map
    # itself sums the gradients of parameters over the axes that do not shard them.
    encoder = encoder_params(params)
    query_BD, document_BMD, statistics = jax.shard_map(
        local,
        in_specs=(specs(encoder, rules_for(model)), batch_specs()),
        out_specs=BATCH_SPEC,
        check_vma=False,
    )(encoder, batch)
    return query_BD, document_BMD, statistics


def encode_chunk(config: StepConfig, params: dict, rows):
    """(pooled_RSD, routing statistics) of one device's token_RL, text_index_RL, position_RL."""
    x_RLD, statistics = encode_rows(config.model, params, *rows)
    return pool_texts(config.model.pooling, x_RLD, rows[1], config.slots), statistics


def encode_chunks(config: StepConfig, params: dict, rows_CRL):
    """(pooled_RSD of the rows of all chunks, statistics); one chunk's activations exist at a time.

    With several chunks this is GradCache (arXiv 2101.06983): the backward pass encodes a chunk
    again when its gradient is due. Gradients and statistics are those of the whole batch.
    """
    chunks = len(rows_CRL[0])
    rows = [array_CRL.reshape(-1, array_CRL.shape[-1]) for array_CRL in rows_CRL]
    if chunks == 1:
        return encode_chunk(config, params, rows)

    def block(params, _, rows, kept):
        return *encode_chunk(config, params, rows), kept

    cast = functools.partial(in_compute_dtype, config.model)
    return in_pieces(block, lambda params: params, cast, chunks, params, None, rows)


def loss_and_metrics(config: StepConfig, params: dict, batch: Batch):
    """Total loss (float32 scalar) and metrics of one batch."""
    query_BD, document_BMD, of_devices = encode_batch(config, params, batch)
    contrast = infonce(
        config.loss,
        query_BD,
        document_BMD,
        batch.query_id_B2,
        batch.document_id_BM2,
        batch.valid_BM,
        params.get(LOG_SCALE),
    )
    valid_CRL = batch.text_index_CRL >= 0
    metrics = {
        "contrastive_loss": contrast.loss,
        "accuracy": contrast.accuracy,
        "masked_candidates": contrast.masked,
        "utilisation": jnp.mean(valid_CRL.astype(jnp.float32)),
        "tokens": jnp.sum(valid_CRL),
    }
    if len(contrast.loss_of_width) > 1:
        metrics |= {f"loss_at_{width}": loss for width, loss in contrast.loss_of_width.items()}
    if config.loss.learn_temperature:
        metrics["temperature"] = jnp.exp(-clip_log_scale(config.loss, params[LOG_SCALE]))
    loss = contrast.loss
    if of_devices is not None:
        statistics = jax.tree.map(lambda leaf: leaf.sum(axis=0), of_devices)
        balance = balance_loss(of_devices if config.loss.balance_over == "device" else statistics)
        loss += config.loss.balance * balance
        metrics |= {"balance": balance} | routing_metrics(statistics)
    return loss, metrics | {"loss": loss}


def train_step(config: StepConfig, optimizer, state: TrainState, batch: Batch):
    """One update. Returns the new state and metrics (device arrays, nothing is waited for)."""
    grad_fn = jax.grad(functools.partial(loss_and_metrics, config), has_aux=True)
    grads, metrics = grad_fn(state.params, batch)
    state, grad_norm = updated(config, optimizer, state, grads)
    if config.loss.learn_temperature:
        state.params[LOG_SCALE] = clip_log_scale(config.loss, state.params[LOG_SCALE])
    return state, metrics | {"grad_norm": grad_norm}


def jit_train_step(config: StepConfig, optimizer, mesh: jax.sharding.Mesh):
    """The compiled form: `step(state, batch) -> (state, metrics)`; `state` is donated."""
    step = functools.partial(train_step, config, optimizer)
    return jit_step(step, config, optimizer, mesh, batch_shardings(mesh))
