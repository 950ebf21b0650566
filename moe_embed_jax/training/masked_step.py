"""The masked-language-model step of stage 1: a pure function of (state, batch), over the mesh.

The counterpart of step.py: packed rows go through the encoder, the states of hidden tokens through
the head (models/heads.py), and the loss is the mean over all hidden tokens of the global batch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from moe_embed_jax.mesh import BATCH_SPEC, ROWS_SPEC
from moe_embed_jax.models.encoder import (
    EncoderConfig,
    encode_rows,
    gather_embeddings,
    in_compute_dtype,
)
from moe_embed_jax.models.heads import init_mlm_head, predict_tokens
from moe_embed_jax.models.remat import in_pieces, loss_in_pieces
from moe_embed_jax.routing.router import balance_loss, routing_metrics
from moe_embed_jax.sharding import MLM_HEAD_RULES, rules_for, specs
from moe_embed_jax.training.run_config import MaskedLossConfig
from moe_embed_jax.training.state import HEAD, TrainState, encoder_params, jit_step, updated


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class MaskedBatch:
    """A global batch of rows, in chunks: every device has R / devices rows of each chunk.

    token_CRL, text_index_CRL, position_CRL: packed rows (text index -1: padding) after hiding.
    column_CRP: where in its row a token is to be predicted.
    target_CRP: which one it was; -1 where a row has fewer than P.
    """

    token_CRL: jax.Array
    text_index_CRL: jax.Array
    position_CRL: jax.Array
    column_CRP: jax.Array
    target_CRP: jax.Array


def batch_specs() -> MaskedBatch:
    """The PartitionSpec of every field: sharded by rows."""
    return MaskedBatch(*[ROWS_SPEC] * len(dataclasses.fields(MaskedBatch)))


def batch_shardings(mesh: jax.sharding.Mesh) -> MaskedBatch:
    """The sharding of every field."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), batch_specs())


def abstract_batch(
    mesh: jax.sharding.Mesh, chunks: int, rows: int, row_length: int, predictions: int
) -> MaskedBatch:
    """A batch of ShapeDtypeStructs: `rows` (R, of a chunk) over all devices."""
    sizes = MaskedBatch(*[row_length] * 3, *[predictions] * 2)
    return jax.tree.map(
        lambda size, placed: jax.ShapeDtypeStruct((chunks, rows, size), jnp.int32, sharding=placed),
        sizes,
        batch_shardings(mesh),
    )


@dataclasses.dataclass(frozen=True)
class MaskedStepConfig:
    """What the step is made of; `vocabulary_size`: ids that there are (V may be more)."""

    model: EncoderConfig
    loss: MaskedLossConfig
    vocabulary_size: int

    @property
    def rules(self) -> tuple:
        """Shardings of all parameters."""
        return (*MLM_HEAD_RULES, *rules_for(self.model))

    def extra_params(self, key: jax.Array) -> dict:
        """Parameters beside the encoder's: a fresh head."""
        return {HEAD: init_mlm_head(self.model, key, self.vocabulary_size)}


def predict_batch(config: MaskedStepConfig, params: dict, batch: MaskedBatch):
    """(`MaskedSums`, routing statistics or None) of the whole batch.

    With several chunks, one chunk's activations exist at a time. Gradients are added up chunk by
    chunk; with experts, whose balance loss takes statistics of the whole batch, the chunks are
    computed twice, as in the contrastive step.
    """
    model = config.model

    def local(encoder, head, batch: MaskedBatch):
        weights = {"encoder": gather_embeddings(model, encoder), "head": head}
        chunks = len(batch.token_CRL)
        rows = [array.reshape(-1, array.shape[-1]) for array in jax.tree.leaves(batch)]

        def block(weights, rows):
            *tokens, column_RP, target_RP = rows
            x_RLD, statistics = encode_rows(model, weights["encoder"], *tokens)
            at_once = config.loss.predictions_at_once
            predictions = (x_RLD, column_RP, target_RP)
            sums = predict_tokens(model, at_once, weights["encoder"], weights["head"], *predictions)
            return sums, statistics

        def cast(weights):
            return weights | {"encoder": in_compute_dtype(model, weights["encoder"])}

        def loss_of_block(weights, _, rows):
            sums, _ = block(weights, rows)
            return sums.loss, sums

        def block_twice(weights, _, rows, kept):
            return None, block(weights, rows), kept

        if chunks == 1:
            sums = block(weights, rows)
        elif model.num_moe_layers:
            _, sums = in_pieces(block_twice, lambda whole: whole, cast, chunks, weights, None, rows)
        else:
            loss, others = loss_in_pieces(loss_of_block, cast, chunks, weights, None, rows)
            sums = dataclasses.replace(others, loss=loss), None
        return jax.tree.map(lambda leaf: leaf[None], sums)

    # check_vma: see step.encode_batch.
    encoder = encoder_params(params)
    placed = (specs(encoder, rules_for(model)), specs({HEAD: params[HEAD]}, MLM_HEAD_RULES)[HEAD])
    sums = jax.shard_map(
        local,
        in_specs=(*placed, batch_specs()),
        out_specs=BATCH_SPEC,
        check_vma=False,
    )(encoder, params[HEAD], batch)
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), sums)


def loss_and_metrics(config: MaskedStepConfig, params: dict, batch: MaskedBatch):
    """Total loss (float32 scalar) and metrics of one batch."""
    sums, statistics = predict_batch(config, params, batch)
    loss, accuracy = sums.means()
    valid_CRL = batch.text_index_CRL >= 0
    metrics = {
        "masked_loss": loss,
        "accuracy": accuracy,
        "predictions": sums.count,
        "utilisation": jnp.mean(valid_CRL.astype(jnp.float32)),
        "tokens": jnp.sum(valid_CRL),
    }
    if statistics is not None:
        balance = balance_loss(statistics)
        loss += config.loss.balance * balance
        metrics |= {"balance": balance} | routing_metrics(statistics)
    return loss, metrics | {"loss": loss}


def train_step(config: MaskedStepConfig, optimizer, state: TrainState, batch: MaskedBatch):
    """One update. Returns the new state and metrics (device arrays, nothing is waited for)."""
    grad_fn = jax.grad(functools.partial(loss_and_metrics, config), has_aux=True)
    grads, metrics = grad_fn(state.params, batch)
    state, grad_norm = updated(config, optimizer, state, grads)
    return state, metrics | {"grad_norm": grad_norm}


def jit_train_step(config: MaskedStepConfig, optimizer, mesh: jax.sharding.Mesh):
    """The compiled form: `step(state, batch) -> (state, metrics)`; `state` is donated."""
    step = functools.partial(train_step, config, optimizer)
    return jit_step(step, config, optimizer, mesh, batch_shardings(mesh))
