"""The shape of a step's batch: from the prepared data if they are there, else from assumptions."""

import dataclasses
import math
import pathlib

from moe_embed_jax.data.batches import Batches, in_chunks
from moe_embed_jax.data.data_spec import token_store_path
from moe_embed_jax.data.schedule import Schedule, mixture_groups
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.errors import UserError
from moe_embed_jax.pairs.manifest import MANIFEST
from moe_embed_jax.training.run_config import MaskedRunConfig, Run, RunConfig

PACKED_SHARE = 0.9  # real tokens among the slots of packed rows, see docs/contrastive_step.md
FULL_ROW_SHARE = 0.97  # of rows of documents, see tests/test_document_rows.py


@dataclasses.dataclass(frozen=True)
class Workload:
    """chunks (C) of `rows` rows per device, and real tokens of the global batch."""

    chunks: int
    rows: int
    tokens: float
    source: str


def workload(config: RunConfig, mesh, query_tokens: float, document_tokens: float) -> Workload:
    """Chunks and rows of a typical training step; `source` says where they come from.

    Args:
      query_tokens, document_tokens: mean lengths, used where no data are prepared.
    """
    _check_divisible(config, mesh)
    store = _prepared(config)
    data = config.data
    if store is not None:
        groups = mixture_groups(store.groups, data.rates)
        schedule = Schedule(
            groups, config.batch_size, config.steps, config.seed, data.language_exponent
        )
        batches = Batches(
            store,
            schedule,
            mesh,
            data.row_length,
            data.texts_per_row,
            0,
            data.chunk_rows,
            data.negatives,
        )
        needed = batches.mean_tokens / (mesh.size * data.row_length)
        rows = next(bucket for bucket in batches.buckets if bucket >= needed)
        source = f"the prepared data in {data.dir} (row counts {batches.buckets})"
        return Workload(*in_chunks(rows, data.chunk_rows), batches.mean_tokens, source)
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
    return Workload(*in_chunks(rows, data.chunk_rows), tokens * mesh.size, source)


def masked_workload(config: MaskedRunConfig, mesh) -> Workload:
    """The same of a step of masked language modelling, whose shape the config decides."""
    _check_divisible(config, mesh)
    slots = config.batch_size * config.data.row_length
    source = f"rows taken as {FULL_ROW_SHARE:.0%} full, which cut documents fill or more"
    shape = in_chunks(config.batch_size // mesh.size, config.data.chunk_rows)
    return Workload(*shape, FULL_ROW_SHARE * slots, source)


def _check_divisible(config: Run, mesh) -> None:
    if config.batch_size % mesh.size:
        raise UserError(
            f"batch_size={config.batch_size} is not divisible by the {mesh.size} chips of the "
            f"topology; choose a multiple of {mesh.size}"
        )


def _prepared(config: RunConfig) -> TokenStore | None:
    vocabulary = config.data.vocabulary
    if vocabulary.kind == "file" and not pathlib.Path(vocabulary.path).is_file():
        return None  # the store is named by the content of the file
    if config.data.pairs and not (pathlib.Path(config.data.pairs) / MANIFEST).is_file():
        return None  # and by that of the pairs
    path = token_store_path(config.data.preparation(), config.data.dir)
    return None if path is None else TokenStore.open(path)
