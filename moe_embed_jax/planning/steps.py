"""The steps that can be planned: the very functions that training, encoding and search run."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moe_embed_jax import embedder
from moe_embed_jax import inference_batches as calls
from moe_embed_jax.data.batches import abstract_batch
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import batch_sharding, replicated
from moe_embed_jax.models.encoder import abstract_params
from moe_embed_jax.planning.request import Assumptions
from moe_embed_jax.search import knn
from moe_embed_jax.sharding import rules_for, shardings, with_shardings
from moe_embed_jax.stages.registry import STAGES
from moe_embed_jax.training.optimizer import make_optimizer
from moe_embed_jax.training.overview import describe_router_gradient, training_flops_per_token
from moe_embed_jax.training.run_config import Run
from moe_embed_jax.training.state import abstract_state
from moe_embed_jax.training.step import jit_train_step


@dataclasses.dataclass(frozen=True)
class Step:
    """A step to compile.

    lower: traces it. arguments: what it is given, by kind, for the memory table. rows: of a device,
    in all its chunks.
    model_flops: of one step over all chips, for `work`. real_share: tokens among slots.
    unit, units: what a step works through ("tokens", "documents"), without padding.
    repeats: how often a whole run does it; None if the config does not say.
    unknown_trips: of loops that the data bound. notes: lines for the reader.
    """

    lower: object
    arguments: dict
    rows: int
    chunks: int
    model_flops: float
    work: str
    real_share: float
    unit: str
    units: float
    repeats: int | None
    unknown_trips: int
    notes: tuple[str, ...]


def train_step(config: Run, mesh, assumed: Assumptions) -> Step:
    """One update, in the shape that the stage says is typical."""
    load = STAGES[config.objective].workload(
        config, mesh, assumed.mean_query_tokens, assumed.mean_document_tokens
    )
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = abstract_state(load.stage, optimizer, mesh)
    batch = abstract_batch(mesh, load.stage.Batch, **load.batch_shapes)
    return Step(
        lower=lambda: jit_train_step(load.stage, optimizer, mesh).jitted.lower(state, batch),
        arguments={
            "parameters": state.params,
            "optimiser state": state.opt_state,
            "batch": batch,
        },
        rows=load.chunks * load.rows,
        chunks=load.chunks,
        model_flops=load.model_flops,
        work=load.work,
        real_share=load.tokens / math.prod(load.batch_shapes["token_CRL"]),
        unit="tokens",
        units=load.tokens,
        repeats=config.steps,
        unknown_trips=1,
        notes=(load.note, *describe_router_gradient(config.model)),
    )


def encode_step(config: Run, mesh, assumed: Assumptions) -> Step:
    """One full call of `Embedder.encode` for documents."""
    row_length = calls.row_length_of(STAGES[config.objective].longest_document(config))
    (rows,) = calls.call_rows(
        max(calls.TOKENS_PER_CALL // row_length, 1) * mesh.size, row_length, mesh.size
    )
    shapes = abstract_params(config.model)
    params = with_shardings(shapes, shardings(shapes, rules_for(config.model), mesh))
    ids = jax.ShapeDtypeStruct((rows, row_length), jnp.int32, sharding=batch_sharding(mesh))
    slots = rows * row_length

    return Step(
        # The embedder's own jitted function: a copy would be another step.
        lower=lambda: embedder._pool_rows.lower(config.model, params, ids, ids, ids),
        arguments={"parameters": params, "batch": (ids, ids, ids)},
        rows=rows // mesh.size,
        chunks=1,
        model_flops=training_flops_per_token(config.model) / 3 * slots,
        work="all token slots",
        real_share=1.0,
        unit="token slots",
        units=slots,
        repeats=None,
        unknown_trips=1,
        notes=(f"{rows // mesh.size} rows of {row_length} slots per chip and call, taken as full",),
    )


def knn_step(config: Run, mesh, assumed: Assumptions) -> Step:
    """One block of queries against all documents, which are all on the chips (`search.knn`)."""
    width, count = config.model.width, assumed.documents
    layout = knn.document_layout(count, mesh.size, load=None)
    everywhere = replicated(mesh)
    queries = jax.ShapeDtypeStruct((knn.QUERY_BLOCK, width), jnp.float32, sharding=everywhere)
    documents = jax.ShapeDtypeStruct(
        (layout.rows, width), jnp.float32, sharding=batch_sharding(mesh)
    )
    best = tuple(
        jax.ShapeDtypeStruct((knn.QUERY_BLOCK, assumed.neighbours), dtype, sharding=everywhere)
        for dtype in (jnp.float32, jnp.int32)
    )
    walked = math.ceil(math.ceil(count / mesh.size) / layout.block)
    return Step(
        lower=lambda: knn.search.lower(
            queries, documents, 0, count, best, layout.block, None, mesh
        ),
        arguments={"queries": queries, "documents": documents, "best so far": best},
        rows=knn.QUERY_BLOCK,
        chunks=1,
        model_flops=2.0 * knn.QUERY_BLOCK * count * width,
        work="all inner products",
        real_share=1.0,
        unit="queries",
        units=knn.QUERY_BLOCK,
        repeats=None,
        unknown_trips=walked,
        notes=(
            f"{knn.QUERY_BLOCK} queries, {count:,} documents of width {width}, "
            f"{assumed.neighbours} neighbours; each chip walks {walked} blocks of {layout.block}; "
            "float32 products cost several bfloat16 ones, so MFU (of bfloat16 peak) stays far "
            "below 100 %",
        ),
    )


STEPS = {"train": train_step, "encode": encode_step, "knn": knn_step}


def make_step(name: str, config: Run, mesh, assumed: Assumptions) -> Step:
    """`name`: a key of STEPS."""
    if name not in STEPS:
        raise UserError(f"--step={name}: choose from {', '.join(STEPS)}")
    return STEPS[name](config, mesh, assumed)
