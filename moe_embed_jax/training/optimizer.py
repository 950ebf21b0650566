"""AdamW with the paper's decay mask, warm-up and schedules (paper 4.3 and 4.5)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_embed_jax.errors import UserError
from moe_embed_jax.sharding import path_of
from moe_embed_jax.training.run_config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate, for a run of `steps` steps; step 0 is the first update."""
    peak, warmup = config.peak_learning_rate, config.warmup_steps
    unit = max(warmup, 1)
    if warmup >= steps:
        raise UserError(f"optimizer.warmup_steps={warmup} must be below steps={steps}")
    after = {
        "cosine": optax.cosine_decay_schedule(peak, steps - warmup),
        "linear": optax.linear_schedule(peak, 0.0, steps - warmup),
        "inverse_sqrt": lambda step: peak * jnp.sqrt(unit / (jnp.maximum(step, 0) + unit)),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    # A warm-up that starts at 0 would make the first step a no-op.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def learning_rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    """float32 [steps]: the rate of every update of a run; the first is that of step 1."""
    return np.asarray(jax.jit(jax.vmap(learning_rate(config, steps)))(jnp.arange(steps)))


def decay_mask(params: dict) -> dict:
    """True where weight decay applies: matrices that are not biases.

    As the reference: nothing named "bias" and nothing with fewer than two non-unit axes. The scan
    axis of stacked blocks is not an axis of the parameter.
    """

    def decays(key_path, leaf) -> bool:
        path = path_of(key_path)
        is_stacked = re.search(r"(^|/)(groups|tail)/", path)
        shape = leaf.shape[1:] if is_stacked else leaf.shape
        return "bias" not in path and sum(n > 1 for n in shape) >= 2

    return jax.tree_util.tree_map_with_path(decays, params)


def router_mask(params: dict) -> dict:
    """True for the routers. Raises `UserError` where the model has none."""
    mask = jax.tree_util.tree_map_with_path(
        lambda key_path, _: "/moe/router/" in f"/{path_of(key_path)}", params
    )
    if not any(jax.tree.leaves(mask)):
        raise UserError("optimizer.freeze_router=True: this model has no routers; leave it out")
    return mask


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    # Before clipping, because a frozen router's gradient must not shorten the others; and after
    # AdamW, because that decays routers.
    frozen = [optax.masked(optax.set_to_zero(), router_mask)] * config.freeze_router
    return optax.chain(
        *frozen,
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
        *frozen,
    )
