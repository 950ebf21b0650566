"""What a run says about itself before it starts."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from moe_embed_jax import mesh as mesh_module
from moe_embed_jax.data.batches import Batches
from moe_embed_jax.data.masked_batches import MaskedBatches
from moe_embed_jax.data.schedule import group_weights
from moe_embed_jax.losses.contrast import describe_negatives
from moe_embed_jax.models.encoder import EncoderConfig, count_params
from moe_embed_jax.training.run_config import MaskedRunConfig, Run, RunConfig


def describe_run(config: RunConfig, batches: Batches, mesh: jax.sharding.Mesh) -> str:
    """Mesh, parameters, data, negatives and an estimate of the time, one line each."""
    groups = batches.schedule.groups
    weights = group_weights(groups, config.data.language_exponent)
    shares: dict[str, float] = {}
    for group, weight in zip(groups, weights, strict=True):
        shares[group.task] = shares.get(group.task, 0.0) + float(weight)
    sources = ", ".join(f"{task} {share:.0%}" for task, share in shares.items())
    tokens = batches.mean_tokens
    seconds = _step_seconds(config.model, training_flops_per_token(config.model) * tokens, mesh)
    hard = [f"hard        {describe_hard_negatives(batches)}"] if batches.negatives else []
    return "\n".join(
        (
            *_mesh_and_model(config.model, mesh),
            f"data        {batches.store.lengths.shape[0]:,} pairs in {len(groups)} groups of one "
            f"source and language; batches from {sources}",
            f"batches     {config.batch_size} pairs, {tokens:,.0f} real tokens on average, in "
            f"{batches.row_length}-token rows; row counts per device {batches.buckets}"
            + (f", encoded {batches.chunk_rows} at a time" if batches.chunk_rows else ""),
            f"negatives   {describe_negatives(config.loss, config.batch_size, batches.negatives)}",
            *hard,
            _schedule(config, "pairs", batches.store.lengths.shape[0], seconds),
        )
    )


def describe_hard_negatives(batches: Batches) -> str:
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


def describe_masked_run(
    config: MaskedRunConfig, batches: MaskedBatches, mesh: jax.sharding.Mesh
) -> str:
    """`describe_run` of masked language modelling."""
    data, loss, table = config.data, config.loss, batches.table
    groups = batches.schedule.groups
    weights = group_weights(groups, data.language_exponent)
    most = sorted(zip(weights, groups, strict=True), key=lambda pair: -pair[0])[:5]
    languages = ", ".join(f"{group.language} {weight:.1%}" for weight, group in most)
    tokens = batches.mean_tokens
    flops = training_flops_per_token(config.model) * tokens
    flops += head_flops_per_prediction(config.model) * loss.mask_rate * tokens
    seconds = _step_seconds(config.model, flops, mesh)
    borders = "across documents" if data.across_documents else "inside documents"
    kind = "one language each" if data.one_language else "all languages in each"
    replaced = (loss.mask_share, loss.random_share, 1 - loss.mask_share - loss.random_share)
    return "\n".join(
        (
            *_mesh_and_model(config.model, mesh),
            f"data        {len(batches.store):,} documents in {len(groups)} languages, "
            f"{len(table):,} rows of {table.row_length} tokens; attention {borders}",
            f"batches     {config.batch_size} rows, {kind}, {tokens:,.0f} real tokens on average; "
            f"most often {languages}"
            + (f"; {batches.chunk_rows} rows at a time" if data.chunk_rows else ""),
            f"hidden      {loss.mask_rate:.0%} of the tokens: "
            f"{' / '.join(f'{share:.0%}' for share in replaced)} <mask> / random / kept; logits of "
            f"{loss.predictions_at_once} at a time",
            _schedule(config, "rows", len(table), seconds),
        )
    )


def _mesh_and_model(model: EncoderConfig, mesh: jax.sharding.Mesh) -> tuple[str, str]:
    total, active = count_params(model)
    placement = {0: "no layer", 1: "every layer"}.get(
        model.moe_every, f"every {model.moe_every}. layer"
    )
    return (
        f"mesh        {mesh_module.describe(mesh)}",
        f"model       {total:,} parameters, {active:,} active per token; {model.num_layers} "
        f"layers of width {model.width}, {placement} with {model.num_experts} experts, "
        f"top-{model.experts_per_token}",
    )


def _schedule(config: Run, unit: str, rows: int, step_seconds: float) -> str:
    return (
        f"schedule    {config.steps} steps = {config.steps * config.batch_size:,} {unit} = "
        f"{config.steps * config.batch_size / rows:.2f} epochs; "
        f"estimated {_duration(step_seconds * config.steps)} of training, from one timed matmul "
        "(the progress bar measures)"
    )


def training_flops_per_token(model: EncoderConfig) -> float:
    """Forward and backward matmul FLOPs per token, embeddings and attention scores left out."""
    _, active = count_params(model)
    return 6.0 * (active - model.vocab_size * model.width)


def head_flops_per_prediction(model: EncoderConfig) -> float:
    """The same of the language-model head, for each token that is predicted."""
    return 6.0 * model.width * (model.width + model.vocab_size)


def _step_seconds(model: EncoderConfig, flops: float, mesh: jax.sharding.Mesh) -> float:
    return estimate_seconds(model, flops) / (1 if _is_cpu(mesh) else mesh.size)


def estimate_seconds(model: EncoderConfig, flops: float) -> float:
    """Seconds of a step of so many matmul FLOPs on one device, if all ran like a timed matmul."""
    x_TD = jnp.ones((4096, model.width), model.dtype)
    w_DF = jnp.ones((model.width, model.ffn_width), model.dtype)
    matmul = jax.jit(lambda x, w: x @ w)
    matmul(x_TD, w_DF).block_until_ready()
    repeats = 5
    start = time.perf_counter()
    for _ in range(repeats):
        matmul(x_TD, w_DF).block_until_ready()
    rate = 2 * x_TD.size * model.ffn_width * repeats / (time.perf_counter() - start)
    # Softmax, norms, sorting by expert, optimiser: measured at about the cost of the matmuls.
    return 2.0 * flops / rate


def _is_cpu(mesh: jax.sharding.Mesh) -> bool:
    return next(iter(mesh.devices.flat)).platform == "cpu"  # fake devices share the same cores


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
