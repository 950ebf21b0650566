"""What stops a run: numbers that are not finite, routers that use a few experts only.

Whole runs are trained in this process, with a step that is spoilt on purpose.
"""

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import synthetic_data
from helpers.forked import run_forked
from hypothesis import given
from hypothesis import strategies as st

from moe_embed_jax import config as config_module
from moe_embed_jax import embedder
from moe_embed_jax.checkpoint import Checkpoints
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation import heldout_retrieval
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.routing.router import effective_experts
from moe_embed_jax.training import loop
from moe_embed_jax.training.health import Health, HealthConfig, spread
from moe_embed_jax.training.records import read_records
from moe_embed_jax.training.run_config import RunConfig

MODEL = EncoderConfig(num_layers=4, num_experts=4, experts_per_token=2, moe_every=2)
BALANCED = [0.25] * 4
COLLAPSED = [0.0, 0.5, 0.0, 0.5]

# ---- The measure ---------------------------------------------------------------------------------


@given(st.data())
def test_the_spread_lies_between_the_same_k_experts_and_all(data):
    experts = data.draw(st.integers(2, 12))
    k = data.draw(st.integers(1, experts - 1))
    # Shares that top-k can give: sums of sets of k experts.
    sets = data.draw(st.lists(st.permutations(range(experts)), min_size=1, max_size=8))
    load_E = np.zeros(experts)
    for chosen in sets:
        load_E[list(chosen[:k])] += 1 / (k * len(sets))
    found = spread(load_E, k)
    assert -1e-9 <= found <= 1 + 1e-9
    assert spread(np.random.default_rng(0).permutation(load_E), k) == pytest.approx(found)
    alone = np.zeros(experts)
    alone[list(sets[0][:k])] = 1 / k
    assert spread(alone, k) == pytest.approx(0)
    assert spread(np.full(experts, 1 / experts), k) == pytest.approx(1)


def test_effective_experts():
    assert effective_experts([0.25, 0.25, 0.25, 0.25, 0]) == pytest.approx(4)
    two, four = effective_experts([[0.5, 0.5, 0, 0], [0.25] * 4])
    assert (two, four) == (pytest.approx(2), pytest.approx(4))
    assert np.isnan(spread(np.full((2, 4), 0.25), 4)).all()  # top-4 of 4: no choice


# ---- The verdict on records ----------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=3)
    yield checkpoints
    checkpoints.close()


def records(loads, first=1, **values):
    """Steps with these loads [M, E] each."""
    return [
        {"step": step, "group": "web/de", "loss": 1.0, "grad_norm": 2.0, "expert_load": load}
        | values
        for step, load in enumerate(loads, first)
    ]


def judge(checkpoints, recent=(), warmup=2, **config):
    config = HealthConfig(**({"window": 4} | config))
    return Health(config, MODEL, warmup, checkpoints, list(recent))


def test_a_collapse_is_named_when_the_window_is_full(checkpoints):
    sick = [BALANCED, COLLAPSED]
    health = judge(checkpoints)
    health.check(records([sick] * 5))  # 2 of them in the warm-up
    message = (
        r"step 6, batch of web/de: the router has collapsed .* in layer 3: expert 1 gets 100.0% of "
        r"the tokens, 2.00 of 4 experts are in use \(spread 0.000\)\. Last good checkpoint: none "
        r"yet\. Try a higher loss.balance .*health.stop_on_collapse=False"
    )
    with pytest.raises(UserError, match=message):
        health.check(records([sick], first=6))
    judge(checkpoints, stop_on_collapse=False).check(records([sick] * 30))


def test_a_resumed_run_judges_as_an_uninterrupted_one(checkpoints):
    sick = records([[BALANCED, COLLAPSED]] * 6)
    for start in range(6):
        health = judge(checkpoints, recent=sick[:start])
        health.check(sick[start:5])
        with pytest.raises(UserError, match=r"step 6, .*layer 3"):
            health.check(sick[5:])


def test_an_expert_pair_for_every_language_is_no_collapse(checkpoints):
    """Batches are of one language, so each of them looks collapsed."""
    languages = [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    health = judge(checkpoints)
    health.check(records([[languages[step % 2]] * 2 for step in range(40)]))
    with pytest.raises(UserError, match=r"layer 1: .*; layer 3: "):
        health.check(records([[languages[0]] * 2] * 4, first=41))


def test_models_without_a_choice_are_not_judged(checkpoints):
    dense = dataclasses.replace(MODEL, moe_every=0)
    all_of_them = dataclasses.replace(MODEL, num_experts=2)
    config = HealthConfig(window=1)
    plain = [{k: v for k, v in r.items() if k != "expert_load"} for r in records([BALANCED] * 3)]
    Health(config, dense, 0, checkpoints, plain).check(plain)
    Health(config, all_of_them, 0, checkpoints, []).check(records([[[0.5, 0.5]] * 2] * 3))
    assert MODEL.moe_layers == [1, 3] and dense.moe_layers == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            dict(loss=float("nan")),
            r"step 7, batch of web/de: the loss is nan\. Last good .*none yet",
        ),
        (dict(loss=float("inf"), grad_norm=float("nan")), "the loss is inf"),
        (dict(grad_norm=float("inf")), "the norm of the gradient is inf"),
    ],
)
def test_numbers_that_are_not_finite(checkpoints, values, message):
    with pytest.raises(UserError, match=message):
        judge(checkpoints).check(records([[BALANCED] * 2], first=7, **values))


def test_the_checkpoint_whose_parameters_gave_no_loss_is_set_aside(checkpoints):
    for step in (3, 6):
        checkpoints.save(step, {}, params={"a": jnp.ones(3) * step})
    health = judge(checkpoints)
    with pytest.raises(UserError) as error:
        health.check(records([[BALANCED] * 2], first=7, loss=float("nan")))
    aside = checkpoints.folder.with_name("checkpoints_set_aside") / "6"
    assert f"with the parameters of checkpoint 6, moved to {aside}." in str(error.value)
    assert f"Last good checkpoint: {checkpoints.folder / '3'} (step 3)" in str(error.value)
    assert f"from there by --config.init.source={checkpoints.folder.parent}" in str(error.value)
    assert aside.is_dir() and checkpoints.latest_step() == 3
    assert Checkpoints(checkpoints.folder).latest_step() == 3
    # An infinite gradient is of good parameters: they stay.
    with pytest.raises(UserError, match=r"checkpoints/3 \(step 3\)"):
        health.check(records([[BALANCED] * 2], first=4, grad_norm=float("inf")))


def test_a_state_that_is_not_finite_is_named_by_leaf(checkpoints):
    good = {"params": {"a": jnp.ones(3), "b": jnp.ones((2, 2))}, "step": jnp.zeros((), jnp.int32)}
    health = judge(checkpoints)
    health.check_state(5, good)
    bad = good | {"mu": jnp.array([1.0, np.nan])}
    bad["params"] = good["params"] | {"b": jnp.array([[1.0, np.inf]])}
    with pytest.raises(UserError, match="not finite after step 5: mu, params/b"):
        health.check_state(5, bad)


@pytest.mark.parametrize(
    "values", [dict(least_spread=1.0), dict(least_spread=-1.0), dict(window=0)]
)
def test_bad_settings_are_refused(values):
    with pytest.raises(UserError, match=f"health.{next(iter(values))}="):
        HealthConfig(**values)


# ---- Whole runs ----------------------------------------------------------------------------------

STEPS = 10
SMALLEST = dict(num_layers=1, moe_every=1)


@pytest.fixture
def page(data_dir, monkeypatch):
    """A run that compiles fast, once, and is not evaluated."""
    monkeypatch.setattr(heldout_retrieval, "load_heldout", lambda *_: {})
    scope: dict = {}
    top = dict(steps=STEPS, log_every=2, checkpoint_every=2, keep_checkpoints=3)
    exec(synthetic_data.config_text(data_dir, **top), scope)
    values = scope["get_config"]()
    values["model"] |= SMALLEST
    values["data"] |= dict(row_length=24, texts_per_row=1)  # so all batches have one shape
    values["health"] = dict(window=3)
    return config_module.build(RunConfig, values)


def spoilt(monkeypatch, change):
    """From now on every step's (state, metrics) go through `change(step, state, metrics)`."""
    jit_train_step = loop.jit_train_step

    def jit_spoilt_step(*arguments):
        train_step = jit_train_step(*arguments)

        def step(state, batch):
            number = int(state.step) + 1
            return change(number, *train_step(state, batch))

        return step

    monkeypatch.setattr(loop, "jit_train_step", jit_spoilt_step)


def multiplied_after(step, factor):
    def change(number, state, metrics):
        if number == step:
            params = jax.tree.map(lambda leaf: leaf * factor, state.params)
            state = dataclasses.replace(state, params=params)
        return state, metrics

    return change


@pytest.fixture(scope="module")
def clean_run(data_dir, tmp_path_factory):
    return tmp_path_factory.mktemp("clean") / "run"


@pytest.mark.parametrize(
    ("every", "broken", "factor", "message", "last_good"),
    [
        # The state is spoilt after step `broken`, which the next step's loss shows ...
        (2, 5, np.nan, "step 6, batch of .*: the loss is nan. ", 4),
        (
            1,
            5,
            1e30,
            "step 6, batch of .*: the loss is nan with the parameters of checkpoint 5, ",
            4,
        ),
        # ... or the look at what is about to be saved.
        (2, 4, np.inf, "not finite after step 4: params/encoder/embeddings/norm/bias", 2),
    ],
)
def test_a_run_stops_and_goes_on_from_its_last_good_checkpoint(
    page, clean_run, monkeypatch, tmp_path, every, broken, factor, message, last_good
):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    if not clean_run.exists():
        assert loop.train(page, clean_run)
    page = dataclasses.replace(page, checkpoint_every=every)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoilt(patch, multiplied_after(broken, factor))
        with pytest.raises(UserError, match=message) as error:
            loop.train(page, run)
    # The handlers are what they were: a notebook goes on after a run.
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    path = run / "checkpoints" / str(last_good)
    assert f"Last good checkpoint: {path} (step {last_good})" in str(error.value)
    assert sorted(int(p.name) for p in path.parent.iterdir() if p.name.isdigit())[-1] == last_good
    embeddings = embedder.Embedder.load(run).encode(["tanara"])
    assert np.isfinite(embeddings).all()
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert read_records(run / "metrics.jsonl")[-1]["step"] >= broken
    assert loop.train(page, run)  # nothing is spoilt now: as if it never had been
    assert (run / "metrics.jsonl").read_text() == (clean_run / "metrics.jsonl").read_text()


def test_a_learning_rate_far_too_high(data_dir, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(synthetic_data.config_text(data_dir, checkpoint_every=1))
    run = tmp_path / "run"
    flags = [f"--config={config}", f"--workdir={run}"]
    flags += [f"--config.model.{key}={value}" for key, value in SMALLEST.items()]
    flags.append("--config.optimizer.peak_learning_rate=1e30")
    result = run_forked(["launch/train.py", *flags])
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "the loss is nan with the parameters of checkpoint 1, moved to" in line
    assert "Last good checkpoint: none yet. Try a lower optimizer.peak_learning_rate" in line
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.isdigit()]


def collapse(monkeypatch):
    """From now on runs start with routers that send every token to experts 2 and 3."""
    create_state = loop.create_state

    def create_collapsed(*arguments):
        state = create_state(*arguments)
        block = state.params["encoder"]["groups"]["block_0"]
        bias, kernel = block["norm_1"]["bias"], block["moe"]["router"]["kernel"]
        block["norm_1"]["bias"] = bias + 3.0
        block["moe"]["router"]["kernel"] = kernel.at[...].set(jnp.array([-1.0, -1.0, 0.9, 1.0]))
        return state

    monkeypatch.setattr(loop, "create_state", create_collapsed)


def test_a_run_whose_router_collapses(page, monkeypatch, tmp_path):
    page = dataclasses.replace(
        page, loss=dataclasses.replace(page.loss, balance=0.0), checkpoint_every=4
    )
    run = tmp_path / "run"
    collapse(monkeypatch)
    message = (
        r"step 5, batch of .*: the router has collapsed .* in layer 0: expert [23] gets 100.0% of "
        r"the tokens, 2.00 of 4 experts are in use .*checkpoints/4 \(step 4\)"
    )
    for _ in range(2):  # the second resumes from step 4 and needs the steps before it
        with pytest.raises(UserError, match=message):
            loop.train(page, run)
    assert (run / "report.png").is_file()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(records[-1]["expert_load"], [[0, 0, 0.5, 0.5]], atol=1e-6)
    # Whoever wants to goes on, in the same work directory.
    off = dataclasses.replace(page.health, stop_on_collapse=False)
    assert loop.train(dataclasses.replace(page, health=off), run)
