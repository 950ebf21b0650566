"""Every prediction carries how far predictions were from measurements, and the docs agree."""

import dataclasses
import io
import math
import re

import pytest
from conftest import ROOT, load_benchmark
from rich.console import Console

from moe_embed_jax.data.data_config import DataConfig
from moe_embed_jax.planning import error_bars
from moe_embed_jax.planning.aot import Plan
from moe_embed_jax.planning.cards import CARDS
from moe_embed_jax.planning.chips import CHIPS
from moe_embed_jax.planning.cost import Cost, Kernel
from moe_embed_jax.planning.memory import Memory
from moe_embed_jax.planning.picture import save_picture
from moe_embed_jax.planning.report import print_plan, to_json, to_markdown
from moe_embed_jax.planning.request import PLANNED_CONFIGS
from moe_embed_jax.planning.roofline import predict
from moe_embed_jax.planning.steps import Step

MEASURED = ROOT / "docs/measured/planner_validation.md"


@pytest.fixture(scope="module")
def validation():
    return load_benchmark("planner_validation")


def make_plan(step_name="train", chip=CHIPS["v5e"]):
    """A step of one kernel that takes 10 ms at the rate of large products."""
    cost = Cost(cycles=1.0 if step_name == "train" else 0.0)
    cost.kernels[Kernel("gmm", 10e-3 * chip.peak_flops * chip.kernel_share, 0.0, 0.0)] = 1
    step = Step(None, {"batch": ()}, 1, 1, 1e12, "slots", 1.0, "tokens", 100, None, 1, ())
    return Plan(
        config=PLANNED_CONFIGS["contrastive"](data=DataConfig(dir="no_data")),
        topology="v5e:1x1",
        chip=chip,
        mesh="data=1, one process",
        mesh_shape=(1, 1, 1),
        chips=1,
        step_name=step_name,
        step=step,
        compile_seconds=1.0,
        memory=Memory({"batch": 1}, 0, 0, 0),
        cost=cost,
        times=predict(cost, chip),
    )


def printed(plan) -> str:
    text = io.StringIO()
    print_plan(plan, Console(file=text, width=400))
    return text.getvalue()


def test_a_training_step_on_a_tpu_has_bounds():
    plan, band = make_plan(), error_bars.STEPS
    sentence = error_bars.describe("train", is_gpu=False)
    assert f"{band.low:g} to {band.high:g} times" in sentence and band.made_by in sentence
    assert f"{10 * band.low:.4g} to {10 * band.high:.4g} ms" in printed(plan)
    assert sentence in printed(plan) and sentence in to_markdown([plan])
    found = to_json(plan)
    assert found["error_bars"] == sentence
    assert found["predicted_step_seconds_bounds"] == pytest.approx(
        (10e-3 * band.low, 10e-3 * band.high), rel=1e-5
    )


@pytest.mark.parametrize(
    ("step_name", "chip", "says"),
    [
        ("knn", CHIPS["v5e"], "no knn step was among them"),
        ("train", CARDS["h100"], "no prediction for GPUs"),
    ],
)
def test_what_was_never_compared_says_so_and_has_no_bounds(step_name, chip, says):
    plan = make_plan(step_name, chip)
    assert says in printed(plan) and says in to_markdown([plan])
    assert says in to_json(plan)["error_bars"]
    assert to_json(plan)["predicted_step_seconds_bounds"] is None


def test_a_picture_carries_them(tmp_path, monkeypatch):
    texts = []
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "supxlabel", lambda self, text, **_: texts.append(text))
    save_picture(make_plan(), tmp_path / "plan.png")
    assert texts == [f"error bars: {error_bars.describe('train', is_gpu=False)}"]


# ---- the stored results --------------------------------------------------------------------------


def rows_of_the_page():
    lines = re.findall(r"^\| (?:product|collective|part|step) \|.*$", MEASURED.read_text(), re.M)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_band_is_that_of_the_measured_steps(validation):
    """Rounded outwards to hundredths; of the steps in the table, all of which are named."""
    rows = rows_of_the_page()
    names = {(case.name, case.topology) for case in validation.CASES}
    assert {(row[1], row[2]) for row in rows} <= names
    steps = [row for row in rows if row[0] == "step"]
    ratios = [float(row[3]) / float(row[4]) for row in steps]
    band = error_bars.STEPS
    assert len(steps) == band.steps
    assert math.floor(100 * min(ratios)) / 100 == band.low
    assert math.ceil(100 * max(ratios)) / 100 == band.high
    chips = {row[2].partition(":")[0] for row in steps}
    assert set(re.findall(r"v\d\w", band.chips)) == chips
    text = (ROOT / "docs/planning.md").read_text()
    assert f"{band.low:g} to {band.high:g} times" in text


def test_every_case_is_in_the_table_or_named_as_missing(validation):
    page = MEASURED.read_text()
    present = {(row[1], row[2]) for row in rows_of_the_page()}
    for case in validation.CASES:
        if (case.name, case.topology) not in present:
            assert f"{case.name} on {case.topology}" in page, "not compiled: say why on the page"
    assert all(name.split(",")[0] in page for name in validation.NOT_REBUILT)


def test_the_ratio_of_a_row_is_measured_over_predicted(validation):
    case = validation.CASES[0]
    found = {validation.key(case): {"predicted": case.measured / 2, "nothing hidden": 1.0}}
    (line,) = validation.table(found).splitlines()[2:]
    assert line.split(" | ")[6] == "2.00" and case.source in line


def test_seconds_of_a_step_follow_from_what_maxtext_reports(validation):
    """The 16B model has 15.8 billion parameters, of which each token takes 6 FLOPs."""
    decoder = validation.MAXTEXT_16B
    decoder = dataclasses.replace(decoder, rows=1)
    flops = 120e12 * validation.maxtext_seconds(decoder, 120)
    attention = 6 * 32 * 64 * 128 * 2048**2
    assert (flops - attention) / 6 / 2048 == pytest.approx(15.8e9, rel=0.01)


def test_attention_that_declares_nothing_is_priced(validation):
    """A causal mask leaves 10 of 16 blocks of scores of [2048, 2048] in blocks of 512."""
    cost, decoder = Cost(), validation.MAXTEXT_16B
    cost.kernels[Kernel("splash_mha_dkv_no_residuals", None, None, None)] = 3
    validation.price_attention(cost, decoder)
    scores = 6 * 64 * 2048**2 * 10 / 16
    ((kernel, count),) = cost.kernels.items()
    assert count == 3 and kernel.flops == 4 * 2 * scores * 128
    assert kernel.transcendentals == scores
