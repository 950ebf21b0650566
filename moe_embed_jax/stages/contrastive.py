"""Contrastive training on pairs of texts (stages 2 and 3), with InfoNCE over the global batch."""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe_embed_jax.data.batches import FullPairBatch, PairBatch, batch_specs
from moe_embed_jax.data.buckets import in_chunks
from moe_embed_jax.data.schedule import group_weights
from moe_embed_jax.data.teacher_vectors import width_of
from moe_embed_jax.errors import UserError
from moe_embed_jax.losses.contrast import (
    clip_log_scale,
    describe_negatives,
    initial_log_scale,
    score_scale,
)
from moe_embed_jax.losses.distillation import (
    batch_score_loss,
    initial_projection,
    score_loss,
    vector_loss,
)
from moe_embed_jax.losses.infonce import infonce
from moe_embed_jax.mesh import BATCH_SPEC
from moe_embed_jax.models.encoder import (
    EncoderConfig,
    encode_rows,
    gather_embeddings,
    in_compute_dtype,
)
from moe_embed_jax.models.pooling import pool_texts, take_texts
from moe_embed_jax.models.remat import rematerialised_map
from moe_embed_jax.processes import process_0_first, wait_for_all
from moe_embed_jax.sharding import rules_for, specs
from moe_embed_jax.stages.pair_data import (
    describe_cut,
    describe_hard_negatives,
    describe_teaching,
    groups_without_negatives,
    open_teaching,
    pair_batches,
    typical_rows,
)
from moe_embed_jax.stages.stage import Workload, add_balance, check_divisible, slot_metrics
from moe_embed_jax.tokenizers.truncation import Truncation
from moe_embed_jax.training import workdir as workdir_module
from moe_embed_jax.training.overview import (
    describe_mesh_and_model,
    describe_schedule,
    training_flops_per_token,
)
from moe_embed_jax.training.run_config import LossConfig, RunConfig

PROJECTION_RULES = ((r"(^|/)projection$", P()),)  # [D, W]
SAME = "a batch is of one source and language, and there all queries or all documents are one text"

### Loss and parameters


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """The `Stage` (stages/stage.py). `texts_per_row` (S): the most texts that share a row.
    `teacher_width` (W): of the vectors that `loss.distillation` learns from."""

    objective = RunConfig.objective
    unit = "pairs"
    loss_name = "contrastive_loss"

    model: EncoderConfig
    loss: LossConfig
    texts_per_row: int
    teacher_width: int = 0

    @property
    def Batch(self) -> type:
        return FullPairBatch if self.loss.is_full else PairBatch

    @property
    def rules(self) -> tuple:
        """Those of the encoder; the temperature is a scalar and needs none."""
        projection = PROJECTION_RULES if self.loss.distillation.has_projection else ()
        return (*projection, *rules_for(self.model))

    def extra_params(self, key: jax.Array) -> dict:
        params = {}
        if self.loss.learn_temperature:
            params["log_scale"] = initial_log_scale(self.loss)
        if self.loss.distillation.has_projection:
            params["projection"] = initial_projection(key, self.model.width, self.teacher_width)
        return params

    def clip(self, params: dict) -> dict:
        if not self.loss.learn_temperature:
            return params
        return params | {"log_scale": clip_log_scale(self.loss, params["log_scale"])}

    def loss_and_metrics(self, params: dict, batch: PairBatch) -> tuple[jax.Array, dict]:
        query_BD, document_BMD, device_statistics = encode_batch(self, params, batch)
        contrast = infonce(
            self.loss,
            query_BD,
            document_BMD,
            batch.query_id_B2,
            batch.document_id_BM2,
            batch.valid_BM,
            params.get("log_scale"),
            batch.in_batch_B if self.loss.hard_negatives_only else None,
        )
        total, taught = self._with_distillation(
            contrast.loss, params, batch, query_BD, document_BMD
        )
        metrics = slot_metrics(batch.text_index_CRL) | {
            "contrastive_loss": contrast.loss,
            "accuracy": contrast.accuracy,
            "masked_candidates": contrast.masked,
        }
        if len(contrast.loss_of) > 1:
            metrics |= {f"loss_at_{name}": loss for name, loss in contrast.loss_of.items()}
        if self.loss.spread:
            total += self.loss.spread * contrast.spread
            metrics["spread"] = contrast.spread
        if self.loss.learn_temperature:
            metrics["temperature"] = jnp.exp(-clip_log_scale(self.loss, params["log_scale"]))
        statistics = jax.tree.map(lambda leaf: leaf.sum(axis=0), device_statistics)
        balanced = device_statistics if self.loss.balance_over == "device" else statistics
        return add_balance(total, metrics | taught, self.loss.balance, statistics, balanced)

    def _with_distillation(self, contrastive_loss, params, batch, query_BD, document_BMD):
        """(the loss with what is learned from a teacher, metrics of its terms)."""
        distillation = self.loss.distillation
        if not distillation.is_on:
            return contrastive_loss, {}
        loss, taught = distillation.contrast * contrastive_loss, {}
        widths = self.loss.widths(self.model.width)
        if distillation.vectors:
            taught["distillation_vectors"] = vector_loss(
                distillation,
                widths,
                jnp.concatenate([query_BD, document_BMD[:, 0]]),
                jnp.concatenate([batch.teacher_query_BW, batch.teacher_document_BW]),
                params.get("projection"),
            )
            loss += distillation.vectors * taught["distillation_vectors"]
        scale = score_scale(self.loss, params.get("log_scale"))
        if distillation.batch_scores:
            taught["distillation_batch_scores"] = batch_score_loss(
                distillation,
                widths,
                scale,
                (query_BD, document_BMD[:, 0]),
                (batch.teacher_query_BW, batch.teacher_document_BW),
                (batch.query_id_B2, batch.document_id_BM2[:, 0]),
                batch.in_batch_B if self.loss.hard_negatives_only else None,
            )
            loss += distillation.batch_scores * taught["distillation_batch_scores"]
        if distillation.scores:
            texts = query_BD, document_BMD, batch.valid_BM, batch.teacher_score_BM
            taught["distillation_scores"] = score_loss(distillation, widths, scale, *texts)
            loss += distillation.scores * taught["distillation_scores"]
        return loss, taught

    @classmethod
    def open(cls, config: RunConfig, workdir: pathlib.Path, mesh, is_writer: bool):
        return ContrastiveRun(config, workdir, mesh, is_writer)

    @classmethod
    def workload(
        cls, config: RunConfig, mesh, query_tokens: float, document_tokens: float
    ) -> Workload:
        check_divisible(config, mesh)
        data = config.data
        rows, tokens, source = typical_rows(config, mesh, query_tokens, document_tokens)
        chunks, rows = in_chunks(rows, data.chunk_rows)
        rows_of_all = (chunks, rows * mesh.size, data.row_length)
        pairs, documents = config.batch_size, 1 + data.negatives
        width = 0
        if config.loss.distillation.takes_vectors:
            width = width_of(data.teacher) or config.model.width
        return Workload(
            stage=cls(config.model, config.loss, data.texts_per_row, width),
            chunks=chunks,
            rows=rows,
            tokens=tokens,
            batch_shapes=batch_shapes(rows_of_all, pairs, documents)
            | full_shapes(config.loss, pairs, documents, width),
            model_flops=training_flops_per_token(config.model) * math.prod(rows_of_all),
            work="all token slots",
            note=f"{pairs} pairs in {chunks} chunk(s) of {rows} rows of {data.row_length} slots "
            f"per chip; {source}",
        )

    @staticmethod
    def longest_document(config: RunConfig) -> int:
        return config.data.document_length

    @staticmethod
    def memory_advice(config: RunConfig, chunk_rows: int) -> list[str]:
        cost = "GradCache, a third forward pass in place of the blocks' inputs"
        return [f"data.chunk_rows={chunk_rows}: {cost}"]


def full_shapes(loss: LossConfig, pairs: int, documents: int, teacher_width: int) -> dict:
    """Shapes of what a `FullPairBatch` has more than a `PairBatch`, if `loss` asks for one."""
    if not loss.is_full:
        return {}
    vectors = dict.fromkeys(("teacher_query_BW", "teacher_document_BW"), (pairs, teacher_width))
    scores = (pairs, documents if loss.distillation.scores else 0)
    return vectors | {"teacher_score_BM": scores, "in_batch_B": (pairs,)}


def batch_shapes(rows_CRL: tuple[int, int, int], pairs: int, documents: int) -> dict:
    """Shapes of the fields of a `PairBatch` of `pairs` (B) pairs with M `documents` each."""
    return {
        "token_CRL": rows_CRL,
        "text_index_CRL": rows_CRL,
        "position_CRL": rows_CRL,
        "query_slot_B": (pairs,),
        "document_slot_BM": (pairs, documents),
        "query_id_B2": (pairs, 2),
        "document_id_BM2": (pairs, documents, 2),
        "valid_BM": (pairs, documents),
    }


def encode_batch(stage: Contrastive, params: dict, batch: PairBatch):
    """(query_BD, document_BMD, routing statistics of every device or None).

    Every device encodes its own rows and takes its own texts from them; devices add up their
    gradients once, after the last chunk.
    """
    model = stage.model

    def local(params, batch: PairBatch):
        rows = (batch.token_CRL, batch.text_index_CRL, batch.position_CRL)
        pooled_RSD, statistics = encode_chunks(stage, gather_embeddings(model, params), rows)
        texts = [take_texts(pooled_RSD, s) for s in (batch.query_slot_B, batch.document_slot_BM)]
        return *texts, jax.tree.map(lambda leaf: leaf[None], statistics)

    # check_vma is off because the hand-written VJPs return per-device weight gradients; shard_map
    # itself sums the gradients of parameters over the axes that do not shard them.
    encoder = params["encoder"]
    return jax.shard_map(
        local,
        in_specs=(specs(encoder, rules_for(model)), batch_specs(type(batch))),
        out_specs=BATCH_SPEC,
        check_vma=False,
    )(encoder, batch)


def encode_chunk(stage: Contrastive, params: dict, rows):
    """(pooled_RSD, routing statistics) of one device's token_RL, text_index_RL, position_RL."""
    x_RLD, statistics = encode_rows(stage.model, params, *rows)
    return pool_texts(stage.model.pooling, x_RLD, rows[1], stage.texts_per_row), statistics


def encode_chunks(stage: Contrastive, params: dict, rows_CRL):
    """(pooled_RSD of the rows of all chunks, statistics); one chunk's activations exist at a time.

    With several chunks this is GradCache (arXiv 2101.06983): the backward pass encodes a chunk
    again when its gradient is due. Gradients and statistics are those of the whole batch.
    """
    chunks = len(rows_CRL[0])
    rows = [array_CRL.reshape(-1, array_CRL.shape[-1]) for array_CRL in rows_CRL]
    if chunks == 1:
        return encode_chunk(stage, params, rows)

    def block(params, _, rows):
        return encode_chunk(stage, params, rows)

    return rematerialised_map(
        block,
        gather=lambda params: params,
        cast=functools.partial(in_compute_dtype, stage.model),
        slices=chunks,
        params=params,
        x_RLD=None,
        context=rows,
    )


### Data and evaluation of a run


class ContrastiveRun:
    """The `StageRun`: batches of pairs, judged by retrieval."""

    def __init__(self, config: RunConfig, workdir: pathlib.Path, mesh, is_writer: bool):
        self._config, self._mesh = config, mesh
        self._truncation = Truncation()  # of all evaluations, so that each side is told once
        process_0_first("data", lambda: workdir_module.find_data(config, write=is_writer))
        # Not one after the other: every host may copy the data first.
        store, self._vocabulary = workdir_module.open_data(workdir, config, write=is_writer)
        wait_for_all("data of all")
        self._teaching = teaching = open_teaching(store, config)
        wait_for_all("teacher of all")
        width = teaching.width if teaching else 0
        self.stage = Contrastive(config.model, config.loss, config.data.texts_per_row, width)
        self.batches = pair_batches(store, config, mesh, self._vocabulary.pad_id, teaching)
        self.data_spec = workdir_module.data_spec(store, config)
        if teaching and teaching.teacher:
            self.data_spec["teacher"] = teaching.teacher.content_hash
        groups = self.batches.schedule.groups
        self._constant = groups_without_negatives(
            store, groups, config.batch_size, config.data.negatives, self.batches.alone
        )
        if len(self._constant) == len(groups):
            alone = "a batch is one pair, and none has hard negatives"
            raise UserError(
                f"no pair of {store.folder} has a negative in its batch (batch_size="
                f"{config.batch_size}, data.negatives={config.data.negatives}): "
                f"{alone if config.batch_size == 1 else SAME}, so the loss is always 0; use other "
                "pairs, larger batches or hard negatives"
            )

    def describe(self) -> str:
        """Mesh, parameters, data, negatives and an estimate of the time, one line each."""
        config, batches = self._config, self.batches
        groups, store = batches.schedule.groups, batches.store
        shares: dict[str, float] = {}
        weights = group_weights(groups, config.data.language_exponent)
        for group, weight in zip(groups, weights, strict=True):
            shares[group.task] = shares.get(group.task, 0.0) + float(weight)
        sources = ", ".join(f"{task} {share:.0%}" for task, share in shares.items())
        tokens = batches.mean_tokens
        at_a_time = f", encoded {batches.chunk_rows} at a time" if batches.chunk_rows else ""
        flops = training_flops_per_token(config.model) * tokens
        lines = [
            *describe_mesh_and_model(config.model, self._mesh),
            f"data        {len(store):,} pairs in {len(groups)} groups of one source and language; "
            f"batches from {sources}",
            f"batches     {config.batch_size} pairs, {tokens:,.0f} real tokens on average, in "
            f"{batches.row_length}-token rows; row counts per device {batches.buckets}{at_a_time}",
            f"negatives   {describe_negatives(config.loss, config.batch_size, batches.negatives)}",
        ]
        if cut := describe_cut(config):
            lines.append(f"cut         {cut}")
        if batches.negatives:
            lines.append(f"hard        {describe_hard_negatives(batches)}")
        if self._teaching:
            lines.append(f"teacher     {describe_teaching(self._teaching, batches, config)}")
        lines.append(describe_schedule(config, self.stage.unit, len(store), flops, self._mesh))
        if self._constant:
            names = ", ".join(group.name for group in self._constant[:5])
            more = f" and {len(self._constant) - 5} more" if len(self._constant) > 5 else ""
            lines.append(f"WARNING: the loss of {names}{more} is always 0: {SAME}")
        return "\n".join(lines)

    def held_out(self):
        from moe_embed_jax.evaluation.heldout_retrieval import HeldOutRetrieval  # not to plan

        config = self._config
        # A run on a folder of pairs is judged by the sets that lie in its data directory, if any.
        return HeldOutRetrieval(config.data.dir, bool(config.data.pairs), config.eval_languages)

    def trained_model(self, params: dict):
        """An `Embedder`, which embeds the held-out sets."""
        from moe_embed_jax.embedder import Embedder

        data = self._config.data
        lengths = {"query": data.query_length, "document": data.document_length}
        model, encoder = self._config.model, params["encoder"]
        embedder = Embedder(model, encoder, self._vocabulary, lengths, self._mesh)
        embedder.truncation = self._truncation
        return embedder
