import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from moe_embed_jax import config as config_files
from moe_embed_jax.errors import UserError
from moe_embed_jax.models.encoder import EncoderConfig, init_params
from moe_embed_jax.sharding import path_of
from moe_embed_jax.training import loop
from moe_embed_jax.training.optimizer import (
    OptimizerConfig,
    decay_mask,
    learning_rate,
    learning_rates,
    make_optimizer,
)
from moe_embed_jax.training.run_config import RunConfig


def test_decay_mask_is_the_papers():
    """No decay on biases, norms and the single token-type row; matrices decay (paper_facts c).

    There are two groups of blocks: with one, the scan axis would not count as an axis anyway."""
    shapes = jax.eval_shape(lambda: init_params(EncoderConfig(num_layers=4), jax.random.key(0)))
    assert shapes["groups"]["block_0"]["norm_1"]["scale"].shape == (2, 768)
    flat = jax.tree_util.tree_flatten_with_path(decay_mask(shapes))[0]
    decayed = {path_of(path) for path, value in flat if value}
    kept = {path_of(path) for path, value in flat if not value}
    assert decayed == {
        "embeddings/token",
        "groups/block_0/attention/out/kernel",
        "groups/block_0/attention/qkv/kernel",
        "groups/block_0/feed_forward/down/kernel",
        "groups/block_0/feed_forward/up/kernel",
        "groups/block_1/attention/out/kernel",
        "groups/block_1/attention/qkv/kernel",
        "groups/block_1/moe/router/kernel",
        "groups/block_1/moe/w_in",
        "groups/block_1/moe/w_out",
    }
    assert all("bias" in path or "norm" in path or "token_type" in path for path in kept)


@pytest.mark.parametrize(
    ("schedule", "end"), [("cosine", 0), ("linear", 0), ("constant", 1), ("inverse_sqrt", 0.1**0.5)]
)
def test_schedules(schedule, end):
    config = OptimizerConfig(peak_learning_rate=2.0, schedule=schedule, warmup_steps=10)
    rate = learning_rate(config, steps=100)
    values = np.array([rate(step) for step in range(101)])
    assert 0 < values[0] < values[5] < values[10]
    assert values[10] == pytest.approx(2.0)
    assert values.max() == pytest.approx(2.0)
    assert values[100] == pytest.approx(2 * end, abs=1e-6)
    assert (np.diff(values[10:]) <= 1e-6).all()
    if schedule == "cosine":
        assert values[55] == pytest.approx(1.0)
    if schedule == "linear":
        assert values[55] == pytest.approx(1.0)


def test_the_rates_of_a_run_are_those_of_its_updates():
    """What metrics.jsonl says is what AdamW used: without decay, its first steps are the rate."""
    config = OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=3, weight_decay=0.0)
    rates = learning_rates(config, 8)
    assert rates.shape == (8,) and rates.dtype == np.float32
    optimizer = make_optimizer(config, 8)
    params = {"groups/x": jnp.ones((1, 2, 2))}
    state = optimizer.init(params)
    for rate in rates:  # with a gradient that does not change, Adam moves by the rate itself
        updates, state = optimizer.update({"groups/x": jnp.full((1, 2, 2), 0.1)}, state, params)
        np.testing.assert_allclose(-updates["groups/x"], rate, rtol=1e-4)


def test_a_frozen_router_stays_and_shortens_no_other_gradient():
    model = EncoderConfig(
        vocab_size=16, num_layers=4, width=8, num_heads=2, ffn_width=8, num_experts=2
    )
    params = init_params(model, jax.random.key(0))
    router = params["groups"]["block_1"]["moe"]["router"]
    gradients = jax.tree.map(jnp.ones_like, params)
    gradients["groups"]["block_1"]["moe"]["router"] = {"kernel": 1e6 * jnp.ones((2, 8, 2))}

    def updated(config, gradients):
        optimizer = make_optimizer(config, 8)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return updates

    # A large epsilon, so that what clipping makes of a gradient is seen in the update.
    config = OptimizerConfig(warmup_steps=0, epsilon=1.0)
    frozen = updated(dataclasses.replace(config, freeze_router=True), gradients)
    assert not frozen["groups"]["block_1"]["moe"]["router"]["kernel"].any()
    without = gradients | {}
    router["kernel"] *= 0  # decays by nothing
    without["groups"]["block_1"]["moe"]["router"] = {"kernel": jnp.zeros((2, 8, 2))}
    jax.tree.map(np.testing.assert_array_equal, frozen, updated(config, without))


def test_a_model_without_routers_has_none_to_freeze():
    model = EncoderConfig(
        vocab_size=16, num_layers=1, width=8, num_heads=2, ffn_width=8, moe_every=0
    )
    optimizer = make_optimizer(OptimizerConfig(freeze_router=True), 2000)
    with pytest.raises(UserError, match="this model has no routers; leave it out"):
        optimizer.init(init_params(model, jax.random.key(0)))


def test_warmup_must_end():
    with pytest.raises(UserError, match="warmup_steps=1000 must be below steps=1000"):
        make_optimizer(OptimizerConfig(), 1000)


def test_a_run_that_cannot_warm_up_claims_nothing(tmp_path):
    """The error comes before the data are made and before the work directory is this run's."""
    page = str(ROOT / "configs/quickstart.py")
    keys = {"steps": "20", "data.dir": str(tmp_path / "data")}
    config = config_files.load(RunConfig, page, keys)
    with pytest.raises(UserError, match="warmup_steps=20 must be below steps=20"):
        loop.train(config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_two_updates_by_hand():
    """Clipping, Adam with bias correction, decoupled decay, warm-up: two steps in NumPy.

    Adam's first step does not depend on the size of the gradient. Its second one does: only the
    first gradient is above the norm and is clipped.
    """
    config = OptimizerConfig(
        peak_learning_rate=0.1, schedule="constant", warmup_steps=1, weight_decay=0.5, clip_norm=1.0
    )
    params = {"w": jnp.full((2, 2), 2.0), "bias": jnp.full((2, 2), 2.0)}
    steps = [{"w": 3.0, "bias": 4.0}, {"w": 0.2, "bias": -0.1}]
    optimizer = make_optimizer(config, 10)
    state = optimizer.init(params)
    mean, square = dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
    for count, (gradients, rate) in enumerate(zip(steps, (0.05, 0.1), strict=True), start=1):
        full = {name: jnp.full((2, 2), value) for name, value in gradients.items()}
        updates, state = optimizer.update(full, state, params)
        norm = np.sqrt(4 * sum(value**2 for value in gradients.values()))
        assert (norm > 1) == (count == 1)
        for name, decay in (("w", 0.5), ("bias", 0.0)):
            clipped = gradients[name] / max(norm, 1)
            mean[name] = 0.9 * mean[name] + 0.1 * clipped
            square[name] = 0.999 * square[name] + 0.001 * clipped**2
            adam = mean[name] / (1 - 0.9**count)
            adam /= np.sqrt(square[name] / (1 - 0.999**count)) + 1e-8
            expected = -rate * (adam + decay * params[name])
            np.testing.assert_allclose(updates[name], expected, rtol=1e-4)
        params = jax.tree.map(jnp.add, params, updates)
