"""Masked language modelling on documents (stage 1), as BERT (arXiv 1810.04805).

Packed rows go through the encoder, the states of masked tokens through the head (models/heads.py),
and the loss is the mean over all masked tokens of the global batch.
"""

import dataclasses
import math
import pathlib

import jax
from jax.sharding import PartitionSpec as P

from moe_embed_jax.data.batches import MaskedBatch, MaskedBatches, batch_specs
from moe_embed_jax.data.buckets import in_chunks
from moe_embed_jax.data.data_spec import held_out_path
from moe_embed_jax.data.document_rows import row_table
from moe_embed_jax.data.masking import make_masking, most_hidden
from moe_embed_jax.data.schedule import MixedSchedule, Schedule, group_weights
from moe_embed_jax.mesh import BATCH_SPEC
from moe_embed_jax.models.encoder import (
    EncoderConfig,
    encode_rows,
    gather_embeddings,
    in_compute_dtype,
)
from moe_embed_jax.models.heads import init_mlm_head, predict_tokens
from moe_embed_jax.models.remat import accumulated_loss, rematerialised_map
from moe_embed_jax.processes import process_0_first, wait_for_all
from moe_embed_jax.sharding import rules_for, specs
from moe_embed_jax.stages.stage import Workload, add_balance, check_divisible, slot_metrics
from moe_embed_jax.training import workdir as workdir_module
from moe_embed_jax.training.overview import (
    describe_mesh_and_model,
    describe_schedule,
    training_flops_per_token,
)
from moe_embed_jax.training.run_config import MaskedLossConfig, MaskedRunConfig

HEAD_RULES = (
    (r"(^|/)head/(dense|norm)/(kernel|scale|bias)$", P()),  # [D, D], [D]
    (r"(^|/)head/bias$", P()),  # [V]
)
FULL_ROW_SHARE = 0.97  # of rows of documents, see tests/data/test_document_rows.py

### Loss and parameters


@dataclasses.dataclass(frozen=True)
class MaskedLM:
    """The `Stage` (stages/stage.py). `vocabulary_size`: ids that there are (V may be more)."""

    objective = MaskedRunConfig.objective
    unit = "rows"
    loss_name = "masked_loss"
    Batch = MaskedBatch

    model: EncoderConfig
    loss: MaskedLossConfig
    vocabulary_size: int

    @property
    def rules(self) -> tuple:
        return (*HEAD_RULES, *rules_for(self.model))

    def extra_params(self, key: jax.Array) -> dict:
        return {"head": init_mlm_head(self.model, key, self.vocabulary_size)}

    def clip(self, params: dict) -> dict:
        return params

    def loss_and_metrics(self, params: dict, batch: MaskedBatch) -> tuple[jax.Array, dict]:
        sums, statistics = predict_batch(self, params, batch)
        loss, accuracy = sums.means()
        metrics = slot_metrics(batch.text_index_CRL) | {
            "masked_loss": loss,
            "accuracy": accuracy,
            "predictions": sums.count,
        }
        return add_balance(loss, metrics, self.loss.balance, statistics, statistics)

    @classmethod
    def open(cls, config: MaskedRunConfig, workdir: pathlib.Path, mesh, is_writer: bool):
        return MaskedLMRun(config, workdir, mesh, is_writer)

    @classmethod
    def workload(
        cls, config: MaskedRunConfig, mesh, query_tokens: float, document_tokens: float
    ) -> Workload:
        """The config decides the shape; documents are cut into rows, whatever their lengths."""
        del query_tokens, document_tokens
        check_divisible(config, mesh)
        model, length = config.model, config.data.row_length
        chunks, rows = in_chunks(config.batch_size // mesh.size, config.data.chunk_rows)
        most_masked = most_hidden(length, config.loss.mask_rate)
        tokens_CRL = (chunks, rows * mesh.size, length)
        predictions_CRP = (chunks, rows * mesh.size, most_masked)
        predictions = math.prod(predictions_CRP)
        flops = training_flops_per_token(model) * math.prod(tokens_CRL)
        return Workload(
            stage=cls(model, config.loss, model.vocab_size),
            chunks=chunks,
            rows=rows,
            tokens=FULL_ROW_SHARE * config.batch_size * length,
            batch_shapes=batch_shapes(tokens_CRL, most_masked),
            model_flops=flops + head_flops_per_prediction(model) * predictions,
            work="all token slots, and predictions",
            note=f"{config.batch_size} rows of {length} slots, in {chunks} chunk(s) of {rows} per "
            f"chip; {predictions:,} predictions; rows taken as {FULL_ROW_SHARE:.0%} full, which "
            "cut documents fill or more",
        )

    @staticmethod
    def longest_document(config: MaskedRunConfig) -> int:
        return config.data.row_length

    @staticmethod
    def memory_advice(config: MaskedRunConfig, chunk_rows: int) -> list[str]:
        cost = "gradients added up over more chunks"
        if config.model.num_moe_layers:  # the statistics of the routers need all chunks first
            cost = "GradCache, a third forward pass in place of the blocks' inputs"
        at_once = max(config.loss.predictions_at_once // 2, 1)
        return [
            f"data.chunk_rows={chunk_rows}: {cost}",
            f"loss.predictions_at_once={at_once}: fewer logits at a time (not on TPUs)",
        ]


def batch_shapes(tokens_CRL: tuple[int, int, int], most_masked: int) -> dict:
    """Shapes of the fields of a `MaskedBatch` with `most_masked` (P) predictions per row."""
    predictions_CRP = (*tokens_CRL[:2], most_masked)
    rows = ("token_CRL", "text_index_CRL", "position_CRL")
    return dict.fromkeys(rows, tokens_CRL) | dict.fromkeys(
        ("column_CRP", "target_CRP"), predictions_CRP
    )


def predict_batch(stage: MaskedLM, params: dict, batch: MaskedBatch):
    """(`MaskedSums`, routing statistics or None) of the whole batch.

    With several chunks, one chunk's activations exist at a time. Gradients are added up chunk by
    chunk; with experts, whose balance loss takes statistics of the whole batch, the chunks are
    computed twice, as in the contrastive step.
    """
    model = stage.model

    def local(encoder, head, batch: MaskedBatch):
        weights = {"encoder": gather_embeddings(model, encoder), "head": head}
        chunks = len(batch.token_CRL)
        rows = [array.reshape(-1, array.shape[-1]) for array in jax.tree.leaves(batch)]

        def block(weights, rows):
            *tokens, column_RP, target_RP = rows
            x_RLD, statistics = encode_rows(model, weights["encoder"], *tokens)
            at_once = stage.loss.predictions_at_once
            predictions = (x_RLD, column_RP, target_RP)
            sums = predict_tokens(model, at_once, weights["encoder"], weights["head"], *predictions)
            return sums, statistics

        def cast(weights):
            return weights | {"encoder": in_compute_dtype(model, weights["encoder"])}

        def loss_of_block(weights, _, rows):
            sums, _ = block(weights, rows)
            return sums.loss, sums

        def block_twice(weights, _, rows):
            return None, block(weights, rows)

        chunked = {
            "cast": cast,
            "slices": chunks,
            "params": weights,
            "x_RLD": None,
            "context": rows,
        }
        if chunks == 1:
            sums = block(weights, rows)
        elif model.num_moe_layers:
            _, sums = rematerialised_map(block_twice, gather=lambda whole: whole, **chunked)
        else:
            loss, others = accumulated_loss(loss_of_block, **chunked)
            sums = dataclasses.replace(others, loss=loss), None
        return jax.tree.map(lambda leaf: leaf[None], sums)

    # check_vma: see contrastive.encode_batch.
    placed = specs(params, stage.rules)
    sums = jax.shard_map(
        local,
        in_specs=(placed["encoder"], placed["head"], batch_specs(MaskedBatch)),
        out_specs=BATCH_SPEC,
        check_vma=False,
    )(params["encoder"], params["head"], batch)
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), sums)


def head_flops_per_prediction(model: EncoderConfig) -> float:
    """Forward and backward matmul FLOPs of the head, for each token that is predicted."""
    return 6.0 * model.width * (model.width + model.vocab_size)


### Data and evaluation of a run


class MaskedLMRun:
    """The `StageRun`: rows of documents, judged by pseudo-perplexity."""

    def __init__(self, config: MaskedRunConfig, workdir: pathlib.Path, mesh, is_writer: bool):
        self._config, self._mesh = config, mesh
        process_0_first("data", lambda: workdir_module.find_data(config, write=is_writer))
        # Not one after the other: every host may copy the data first.
        store, self._vocabulary = workdir_module.open_data(workdir, config, write=is_writer)
        wait_for_all("data of all")
        data, loss = config.data, config.loss
        masking = make_masking(self._vocabulary, loss.mask_rate, loss.mask_share, loss.random_share)
        table = row_table(
            store.lengths[:, 0], store.groups, data.row_length, config.seed, data.across_documents
        )
        kind = Schedule if data.one_language else MixedSchedule
        schedule = kind(
            list(table.groups), config.batch_size, config.steps, config.seed, data.language_exponent
        )
        self.batches = MaskedBatches(
            store, table, schedule, mesh, masking, self._vocabulary, config.seed, data.chunk_rows
        )
        self.data_spec = workdir_module.data_spec(store, config)
        self.stage = MaskedLM(config.model, loss, self._vocabulary.size)

    def describe(self) -> str:
        """Mesh, parameters, data, masking and an estimate of the time, one line each."""
        config, batches = self._config, self.batches
        data, loss, table = config.data, config.loss, batches.table
        groups = batches.schedule.groups
        weights = group_weights(groups, data.language_exponent)
        most = sorted(zip(weights, groups, strict=True), key=lambda pair: -pair[0])[:5]
        languages = ", ".join(f"{group.language} {weight:.1%}" for weight, group in most)
        tokens = batches.mean_tokens
        flops = training_flops_per_token(config.model) * tokens
        flops += head_flops_per_prediction(config.model) * loss.mask_rate * tokens
        borders = "across documents" if data.across_documents else "inside documents"
        kind = "one language each" if data.one_language else "all languages in each"
        at_a_time = f"; {batches.rows} rows at a time" if data.chunk_rows else ""
        replaced = (loss.mask_share, loss.random_share, 1 - loss.mask_share - loss.random_share)
        shares = " / ".join(f"{share:.0%}" for share in replaced)
        return "\n".join(
            (
                *describe_mesh_and_model(config.model, self._mesh),
                f"data        {len(batches.store):,} documents in {len(groups)} languages, "
                f"{len(table):,} rows of {table.row_length} tokens; attention {borders}",
                f"batches     {config.batch_size} rows, {kind}, {tokens:,.0f} real tokens on "
                f"average; most often {languages}{at_a_time}",
                f"masked      {loss.mask_rate:.0%} of the tokens: {shares} <mask> / random / kept; "
                f"logits of {loss.predictions_at_once} at a time",
                describe_schedule(config, self.stage.unit, len(table), flops, self._mesh),
            )
        )

    def held_out(self):
        from moe_embed_jax.evaluation.heldout_documents import HeldOutDocuments  # not to plan

        config = self._config
        folder = held_out_path(config.data.preparation(), config.data.dir)
        return HeldOutDocuments(folder, config.eval_languages)

    def trained_model(self, params: dict):
        from moe_embed_jax.evaluation.pseudo_perplexity import MaskedModel  # not to plan

        model, (encoder, head) = self._config.model, (params["encoder"], params["head"])
        return MaskedModel(model, encoder, head, self._vocabulary, self._mesh)
