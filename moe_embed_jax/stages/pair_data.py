"""The pairs of a contrastive run: batches, a teacher's vectors, and what is said about them."""

import collections
import math
from collections.abc import Collection

import numpy as np

from moe_embed_jax import storage
from moe_embed_jax.data.batches import PairBatches
from moe_embed_jax.data.data_spec import (
    CUT_TEXTS,
    STATISTICS,
    planned_store_path,
    token_store_path,
)
from moe_embed_jax.data.schedule import Group, Schedule, mixture_groups
from moe_embed_jax.data.teacher_vectors import TeacherVectors
from moe_embed_jax.data.teaching import Teaching
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.errors import UserError
from moe_embed_jax.json_file import read_object
from moe_embed_jax.pairs.manifest import MANIFEST
from moe_embed_jax.training.run_config import RunConfig

PACKED_SHARE = 0.9  # real tokens among the slots of packed rows, see docs/contrastive_step.md


def open_teaching(store: TokenStore, config: RunConfig) -> Teaching | None:
    """What `loss.distillation` learns from, for the rows of `store` that are trained on; None:
    nothing. Vectors are copied to `data.cache_dir`, or else to `data.dir`.

    Raises `UserError` where the vectors or the scores are missing.
    """
    data, distillation = config.data, config.loss.distillation
    if not distillation.is_on:
        return None
    used = np.zeros(len(store), bool)
    for group in mixture_groups(store.groups, data.rates):
        used[group.start : group.stop] = True
    teacher = None
    if distillation.reads_vectors:
        cache = data.cache_dir or data.dir
        teacher = TeacherVectors(data.teacher, cache, store.content_ids, used, store.negative_ids)
    scores_from = distillation.scores_from if distillation.scores else ""
    teaching = Teaching(store, teacher, distillation.takes_vectors, scores_from)
    if scores_from and not (used & teaching.scored_rows(data.negatives)).any():
        where = f"data.pairs={data.pairs} has no scores: make pairs by launch/mine.py, or take "
        if scores_from == "teacher":
            where = f"data.teacher={data.teacher} has no vectors of hard negatives: take "
        raise UserError(
            f"loss.distillation.scores={distillation.scores:g}: no pair has scores of two of its "
            f"documents, and {where}loss.distillation.scores_from="
            f"{'pairs' if scores_from == 'teacher' else 'teacher'!r}"
        )
    return teaching


def describe_teaching(teaching: Teaching, batches: PairBatches, config: RunConfig) -> str:
    """What a run learns from a teacher, and how much of it there is."""
    distillation = config.loss.distillation
    parts, lines = [f"{distillation.contrast:g} x contrastive"], []
    if distillation.vectors:
        parts.append(f"{distillation.vectors:g} x (1 - cosine)")
        lines.append(
            f"vectors of {teaching.width} dimensions for the student's {config.model.width}, by "
            f"{distillation.match}"
        )
    if distillation.batch_scores:
        parts.append(f"{distillation.batch_scores:g} x divergence over the batch")
        lines.append(
            f"scores of all documents of a batch by vectors of {teaching.width} dimensions"
        )
    if teaching.has_scores:
        parts.append(f"{distillation.scores:g} x divergence of scores")
        scored = teaching.scored_rows(batches.negatives)
        groups = batches.schedule.groups
        of_groups = np.concatenate([scored[group.start : group.stop] for group in groups])
        lines.append(
            f"scores of {of_groups.sum():,} of {len(of_groups):,} pairs from the "
            f"{distillation.scores_from}"
        )
    where = f", from {teaching.teacher.folder}" if teaching.teacher else ""
    return f"{'; '.join(lines)}{where}; the loss is {' + '.join(parts)}"


def describe_cut(config: RunConfig) -> str:
    """What preparation cut off, of the sources that are trained on; "" if nothing is known of it.

    Raises `UserError` for a damaged file of statistics.
    """
    path = planned_store_path(config.data.preparation(), config.data.dir) / STATISTICS
    if not path.is_file():
        return ""
    texts, tokens = collections.Counter(), 0
    for task, entry in read_object(path).items():
        if config.data.rates is None or config.data.rates.get(task):
            for name, (count, lost) in entry.get("cut", {}).items():
                texts[name] += count
                tokens += lost
    longest = dict.fromkeys(texts, config.data.document_length)
    if "query" in texts:
        longest["query"] = config.data.query_length
    counts = [
        f"{texts[name]:,} {CUT_TEXTS[name]} of over {most} tokens" for name, most in longest.items()
    ]
    return f"{', '.join(counts)}: {tokens:,} tokens are cut off" if counts else ""


def pair_batches(
    store: TokenStore, config: RunConfig, mesh, pad_id: int, teaching: Teaching | None = None
) -> PairBatches:
    data = config.data
    groups = mixture_groups(store.groups, data.rates)
    alone, tasks = config.loss.hard_negatives_only.split(), {group.task for group in groups}
    for name in alone:
        if name not in tasks:
            raise UserError(
                f"loss.hard_negatives_only: there is no source {name}; sources: "
                f"{', '.join(sorted(tasks))}"
            )
    schedule = Schedule(
        groups, config.batch_size, config.steps, config.seed, data.language_exponent
    )
    return PairBatches(
        store,
        schedule,
        mesh,
        data.row_length,
        data.texts_per_row,
        pad_id,
        data.chunk_rows,
        data.negatives,
        data.row_buckets,
        teaching,
        alone,
    )


def groups_without_negatives(
    store: TokenStore,
    groups: list[Group],
    batch_size: int,
    hard_negatives: int,
    alone: Collection[str] = (),
) -> list[Group]:
    """The groups whose batches never hold a negative for any pair.

    Args:
      hard_negatives: of a pair, at most, that the run uses.
      alone: tasks whose pairs have no other negatives than these.
    """
    without = []
    for group in groups:
        first, last = store.negative_starts[[group.start, group.stop]]
        if hard_negatives and last > first:
            continue
        if group.task in alone:
            without.append(group)
            continue
        ids_N22 = store.content_ids[group.start : group.stop]
        # A few rows tell it of nearly every group.
        if batch_size == 1 or (_same_side(ids_N22[:100]) and _same_side(ids_N22)):
            without.append(group)
    return without


def _same_side(ids_N22: np.ndarray) -> bool:
    """Whether all queries, or all documents, are one text."""
    return bool((ids_N22 == ids_N22[:1]).all(axis=(0, 2)).any())


def describe_hard_negatives(batches: PairBatches) -> str:
    """How many pairs of the run's groups have how many hard negatives."""
    most = batches.negatives
    counts = np.diff(batches.store.negative_starts)
    used = [counts[group.start : group.stop] for group in batches.schedule.groups]
    pairs_of_count = np.bincount(np.minimum(np.concatenate(used), most), minlength=most + 1)
    total = pairs_of_count.sum()
    if not pairs_of_count[1:].any():
        return (
            f"WARNING: none of the {total:,} pairs has a hard negative, data.negatives={most} has "
            "no effect; launch/mine.py finds some"
        )
    parts = [
        f"{pairs:,} ({pairs / total:.1%}) have "
        + (f"{most} or more" if count == most else str(count or "none"))
        for count, pairs in reversed(list(enumerate(pairs_of_count.tolist())))
        if pairs
    ]
    return f"of {total:,} pairs " + ", ".join(parts)


def typical_rows(
    config: RunConfig, mesh, query_tokens: float, document_tokens: float
) -> tuple[int, float, str]:
    """(rows of a device, tokens of the global batch, where these numbers come from)."""
    data = config.data
    store = _prepared_store(config)
    if store is not None:
        batches = pair_batches(store, config, mesh, pad_id=0)
        needed = batches.mean_tokens / (mesh.size * data.row_length)
        rows = next(bucket for bucket in batches.buckets if bucket >= needed)
        source = f"the prepared data in {data.dir} (row counts {batches.buckets})"
        return rows, batches.mean_tokens, source
    query_tokens = min(query_tokens, data.query_length)
    document_tokens = min(document_tokens, data.document_length)
    pairs = config.batch_size // mesh.size
    documents = 1 + data.negatives
    tokens = pairs * (query_tokens + documents * document_tokens)
    texts = pairs * (1 + documents)
    rows = math.ceil(max(tokens / (PACKED_SHARE * data.row_length), texts / data.texts_per_row))
    source = (
        f"assumed mean lengths of {query_tokens:g} and {document_tokens:g} tokens in rows "
        f"{PACKED_SHARE:.0%} full (no prepared data in {data.dir})"
    )
    return rows, tokens * mesh.size, source


def _prepared_store(config: RunConfig) -> TokenStore | None:
    data = config.data
    if data.vocabulary.kind == "file" and not storage.path(data.vocabulary.path).is_file():
        return None  # the store is named by the content of the file
    if data.pairs and not (storage.path(data.pairs) / MANIFEST).is_file():
        return None  # and by that of the pairs
    path = token_store_path(data.preparation(), data.dir)
    return None if path is None else TokenStore.open(path)
