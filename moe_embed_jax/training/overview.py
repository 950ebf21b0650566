"""What a run says about itself before it starts."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from moe_embed_jax import mesh as mesh_module
from moe_embed_jax.data.batches import Batches
from moe_embed_jax.data.schedule import group_weights
from moe_embed_jax.models.encoder import EncoderConfig, count_params
from moe_embed_jax.objectives.contrast import describe_negatives
from moe_embed_jax.training.run_config import RunConfig


def describe_run(config: RunConfig, batches: Batches, mesh: jax.sharding.Mesh) -> str:
    """Mesh, parameters, data, negatives and an estimate of the time, one line each."""
    total, active = count_params(config.model)
    groups = batches.schedule.groups
    weights = group_weights(groups, config.data.language_exponent)
    shares: dict[str, float] = {}
    for group, weight in zip(groups, weights, strict=True):
        shares[group.task] = shares.get(group.task, 0.0) + float(weight)
    sources = ", ".join(f"{task} {share:.0%}" for task, share in shares.items())
    model = config.model
    placement = {0: "no layer", 1: "every layer"}.get(
        model.moe_every, f"every {model.moe_every}. layer"
    )
    tokens = batches.mean_tokens
    seconds = estimate_step_seconds(model, tokens) / (1 if _is_cpu(mesh) else mesh.size)
    hard = [f"hard        {describe_hard_negatives(batches)}"] if batches.negatives else []
    return "\n".join(
        (
            f"mesh        {mesh_module.describe(mesh)}",
            f"model       {total:,} parameters, {active:,} active per token; {model.num_layers} "
            f"layers of width {model.width}, {placement} with {model.num_experts} experts, "
            f"top-{model.experts_per_token}",
            f"data        {batches.store.lengths.shape[0]:,} pairs in {len(groups)} groups of one "
            f"source and language; batches from {sources}",
            f"batches     {config.batch_size} pairs, {tokens:,.0f} real tokens on average, in "
            f"{batches.row_length}-token rows; row counts per device {batches.buckets}"
            + (f", encoded {batches.chunk_rows} at a time" if batches.chunk_rows else ""),
            f"negatives   {describe_negatives(config.loss, config.batch_size, batches.negatives)}",
            *hard,
            f"schedule    {config.steps} steps = {config.steps * config.batch_size:,} pairs = "
            f"{config.steps * config.batch_size / batches.store.lengths.shape[0]:.2f} epochs; "
            f"estimated {_duration(seconds * config.steps)} of training, from one timed matmul "
            "(the progress bar measures)",
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


def training_flops_per_token(model: EncoderConfig) -> float:
    """Forward and backward matmul FLOPs per token, embeddings and attention scores left out."""
    _, active = count_params(model)
    return 6.0 * (active - model.vocab_size * model.width)


def estimate_step_seconds(model: EncoderConfig, tokens: float) -> float:
    """Seconds per step of `tokens` tokens on one device, if all matmuls ran like a timed one."""
    x_TD = jnp.ones((4096, model.width), model.dtype)
    w_DF = jnp.ones((model.width, model.ffn_width), model.dtype)
    matmul = jax.jit(lambda x, w: x @ w)
    matmul(x_TD, w_DF).block_until_ready()
    repeats = 5
    start = time.perf_counter()
    for _ in range(repeats):
        matmul(x_TD, w_DF).block_until_ready()
    flops = 2 * x_TD.size * model.ffn_width * repeats / (time.perf_counter() - start)
    # Softmax, norms, sorting by expert, optimiser: measured at about the cost of the matmuls.
    return 2.0 * training_flops_per_token(model) * tokens / flops


def _is_cpu(mesh: jax.sharding.Mesh) -> bool:
    return next(iter(mesh.devices.flat)).platform == "cpu"  # fake devices share the same cores


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
