"""What every run says about itself before it starts: mesh, model, schedule, time."""

import time

import jax
import jax.numpy as jnp

from moe_embed_jax import mesh as mesh_module
from moe_embed_jax.models.encoder import EncoderConfig, count_params
from moe_embed_jax.training.run_config import Run


def describe_mesh_and_model(model: EncoderConfig, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    total, active = count_params(model)
    placement = {0: "no layer", 1: "every layer"}.get(
        model.moe_every, f"every {model.moe_every}. layer"
    )
    return (
        f"mesh        {mesh_module.describe(mesh)}",
        f"model       {total:,} parameters, {active:,} active per token; {model.num_layers} "
        f"layers of width {model.width}, {placement} with {model.num_experts} experts, "
        f"top-{model.experts_per_token}",
        *describe_router_gradient(model),
    )


def describe_router_gradient(model: EncoderConfig) -> list[str]:
    """A line where the router learns from all experts, because that costs time."""
    if not model.moe_every or model.router_gradient != "dense":
        return []
    return [
        f"router      learns from all {model.num_experts} experts: in the backward pass each of "
        "them computes every token"
    ]


def describe_schedule(
    config: Run, unit: str, rows: int, flops: float, mesh: jax.sharding.Mesh
) -> str:
    """
    Args:
      unit: what the batch size counts. rows: how many of them the data hold.
      flops: matmul FLOPs of a step over the whole mesh.
    """
    on_cpu = next(iter(mesh.devices.flat)).platform == "cpu"  # fake devices share the same cores
    step_seconds = estimate_seconds(config.model, flops) / (1 if on_cpu else mesh.size)
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


def estimate_seconds(model: EncoderConfig, flops: float) -> float:
    """Seconds of a step of `flops` on one device, if all of it ran like a timed matmul."""
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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
