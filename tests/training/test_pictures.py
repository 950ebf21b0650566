"""report.png: every run has one, and all that is drawn says what it is."""

import matplotlib.image
import numpy as np
import pytest

from moe_embed_jax.evaluation.heldout_retrieval import HeldOutRetrieval
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.stages.contrastive import Contrastive
from moe_embed_jax.training import pictures
from moe_embed_jax.training.expert_pictures import _stretches, _trailing_mean
from moe_embed_jax.training.run_config import InitConfig, RunConfig

STEPS = 30
LOSS, RATE, QUALITY = "Training loss", "Learning rate", "Held-out retrieval"
USE, OVER_STEPS, BY_LANGUAGE = "Experts in use", "expert over the run", "expert by language"


def run_of(model: EncoderConfig) -> RunConfig:
    return RunConfig(steps=STEPS, model=model, init=InitConfig(source="elsewhere"))


def records_of(model: EncoderConfig, steps: int) -> list[dict]:
    rng = np.random.default_rng(0)
    records = []
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "group": f"{('web', 'news')[step % 2]}/de",
            "learning_rate": 1e-3 * step,
            "contrastive_loss": 3.0 / step,
            "grad_norm": 1.0 + rng.random(),
        }
        if model.num_moe_layers:
            shape = model.num_moe_layers, model.num_experts
            record |= {"balance": 1.1, "expert_load": rng.dirichlet([3] * shape[1], shape[0])}
        records.append(record)
    return records


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """`draw_report`, which returns {title: axes} of what it drew, and writes a picture."""
    figures = []
    make = pictures.Figure
    monkeypatch.setattr(
        pictures, "Figure", lambda **options: figures.append(make(**options)) or figures[-1]
    )

    def draw(*arguments):
        path = tmp_path / "my_run" / "report.png"
        path.parent.mkdir(exist_ok=True)
        metric = HeldOutRetrieval.metric
        pictures.draw_report(path, *arguments, Contrastive.loss_name, metric)
        assert matplotlib.image.imread(path).std() > 0.05  # not an empty page
        (figure,) = figures
        titled = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
        for title, axes in titled.items():
            assert axes.get_ylabel() or BY_LANGUAGE in title
            assert axes.get_xlabel()
        return titled | {"": figure}

    yield draw
    for figure in figures:
        figure.clear()


def titles(found) -> list[str]:
    known = (LOSS, QUALITY, RATE, USE, OVER_STEPS, BY_LANGUAGE)
    return [word for word in known for title in found if word in title]


def evaluation(step: int) -> dict:
    return {"step": step, "sets": {"api/en": {"ndcg_at_10": 0.1}, "web/de": {"ndcg_at_10": 0.4}}}


@pytest.mark.parametrize(("layers", "experts"), [(2, 6), (12, 8), (12, 48), (1, 3)])
def test_a_finished_run_with_experts(drawn, layers, experts):
    every = 2 if layers > 1 else 1
    model = EncoderConfig(num_layers=layers, num_experts=experts, moe_every=every)
    shares = {"de": np.full((model.num_moe_layers, experts), 1 / experts)} | {
        "en": np.eye(experts)[: model.num_moe_layers]
    }
    arguments = run_of(model), records_of(model, STEPS), [evaluation(0), evaluation(STEPS)], shares
    found = drawn(*arguments)
    assert titles(found) == [LOSS, QUALITY, RATE, USE, OVER_STEPS, BY_LANGUAGE]
    assert "stopped" not in found[""].get_suptitle()
    by_step, by_language = (
        next(axes for title, axes in found.items() if word in title)
        for word in (OVER_STEPS, BY_LANGUAGE)
    )
    names = [f"layer {layer}" for layer in model.moe_layers]
    for axis, ends in ((by_step.yaxis, by_step.get_ylim()), (by_language.xaxis, None)):
        assert [label.get_text() for label in axis.get_ticklabels(minor=True)] == names
        count = model.num_moe_layers * experts
        assert len(axis.get_ticklabels()) == (count if count <= 64 else 0)
        assert ends is None or ends == (count - 0.5, -0.5)
    assert [label.get_text() for label in by_language.get_yticklabels()] == ["de", "en"]
    np.testing.assert_allclose(by_language.images[0].get_array()[0], 1.0)


def test_a_run_without_experts_or_evaluations(drawn):
    dense = EncoderConfig(moe_every=0)
    found = drawn(run_of(dense), records_of(dense, STEPS), [], {})
    assert titles(found) == [LOSS, RATE]


def test_a_run_that_was_stopped(drawn):
    """By a number that is not finite, of which the last record tells."""
    model = EncoderConfig(num_layers=2)
    records = records_of(model, 7)
    nothing = np.full((1, 8), np.nan)
    records[-1] |= {key: np.nan for key in ("contrastive_loss", "grad_norm", "balance")}
    records[-1] |= {"expert_load": nothing}
    found = drawn(run_of(model), records, [], {})
    assert titles(found) == [LOSS, RATE, USE, OVER_STEPS]
    assert found[""].get_suptitle() == "my_run, stopped after step 7 of 30"


@pytest.mark.parametrize("values", [{}, dict(contrastive_loss=np.nan, grad_norm=np.inf)])
def test_a_single_step(drawn, values):
    model = EncoderConfig(num_layers=2)
    (record,) = records_of(model, 1)
    assert titles(drawn(run_of(model), [record | values], [], {})) == [LOSS, RATE, USE, OVER_STEPS]


def test_means_over_steps():
    values = np.random.default_rng(0).random((9, 2, 3))
    expected = [values[max(0, i - 3) : i + 1].mean(axis=0) for i in range(9)]
    np.testing.assert_allclose(_trailing_mean(values, 4), expected)
    load_SME = _stretches([{"expert_load": load} for load in np.tile(values, (100, 1, 1))])
    assert load_SME.shape == (300, 2, 3)  # 3 steps in each: at most 400
    np.testing.assert_allclose(load_SME[:3], 3 * values.reshape(3, 3, 2, 3).mean(1), rtol=1e-5)
