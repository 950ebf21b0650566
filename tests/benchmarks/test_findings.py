"""The findings benchmark: its arms are what they say, its statistics, its runs."""

import argparse
import dataclasses
import gzip
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, load_benchmark
from helpers import synthetic_data

from moe_embed_jax import launching
from moe_embed_jax.config import save_json
from moe_embed_jax.evaluation.heldout import load_heldout
from moe_embed_jax.evaluation.retrieval import METRICS
from moe_embed_jax.interop.upcycle import upcycled_model
from moe_embed_jax.models.encoder import EncoderConfig, count_params
from moe_embed_jax.training.init import upcycle_config
from moe_embed_jax.training.optimizer import learning_rate
from moe_embed_jax.training.run_config import RunConfig

benchmark = load_benchmark("findings")

import findings_arms  # noqa: E402
import findings_numbers  # noqa: E402
import findings_report  # noqa: E402
import findings_runs  # noqa: E402
from findings_arms import ARMS, FINDINGS, SETTINGS  # noqa: E402

# As multilingual-e5-small.
E5 = EncoderConfig(
    vocab_size=250_037,
    num_layers=12,
    width=384,
    num_heads=12,
    ffn_width=1536,
    moe_every=0,
    positions="learned",
    max_positions=512,
)


PLACE = findings_runs.Place(
    pathlib.Path("work"), pathlib.Path("data"), e5="e5", pairs=pathlib.Path("pairs")
)


def model_of(arm: str) -> EncoderConfig:
    config = findings_runs.load_config(PLACE, arm)
    if not config.init.source:
        return config.model
    return upcycled_model(E5, upcycle_config(config)) if config.init.upcycle else E5


@pytest.mark.parametrize(
    ("finding", "arm", "other", "what"),
    [(key, *each) for key, finding in FINDINGS.items() for each in finding.comparisons],
)
def test_comparisons_are_of_what_they_say(finding, arm, other, what):
    assert {arm, other} <= set(FINDINGS[finding].arms)
    assert ARMS[arm].setting == ARMS[other].setting and ARMS[arm].devices == ARMS[other].devices
    (total, active), (other_total, other_active) = (count_params(model_of(a)) for a in (arm, other))
    layers = other_active - model_of(other).vocab_size * model_of(other).width
    difference = (active - other_active) / layers
    if "equal active" in what:  # but for routers and biases
        assert abs(difference) < 0.005
    elif "equal total" in what:
        assert total == other_total
    elif "more" in what:
        assert difference > 0.05


def test_arms():
    """Every arm is used, in its own way, and has a place."""
    used = [arm for finding in FINDINGS.values() for arm in finding.arms]
    assert set(used) == set(ARMS) and len({f.name for f in FINDINGS.values()}) == len(FINDINGS)
    configs = {arm: findings_runs.load_config(PLACE, arm) for arm in ARMS}
    for setting in SETTINGS:
        arms = [arm for arm in ARMS if ARMS[arm].setting == setting]
        assert len({repr((configs[arm], ARMS[arm].devices)) for arm in arms}) == len(arms)
        # What is no change of an arm is the same for all: steps, data, batch.
        assert len({(configs[arm].steps, configs[arm].batch_size) for arm in arms}) == 1
        for arm in arms:
            learning_rate(configs[arm].optimizer, configs[arm].steps)  # an error if never reached
    assert findings_arms.home("top-2") == "dense_vs_moe"  # also for the findings d and e
    assert findings_arms.arms_of(["a", "d"]).count("top-2") == 1
    assert configs["matryoshka"].loss.dims == {"128": 1.0, "42": 1.0}
    assert SETTINGS["scratch"].narrow == 42


def test_long_runs_on_given_pairs():
    """Finding g: 12 arms, the distilled ones with the teacher of the pairs."""
    arms = FINDINGS["g"].arms
    assert len(arms) == 12 and {ARMS[arm].setting for arm in arms} == {"pairs"}
    plain, taught = (findings_runs.load_config(PLACE, f"{k}-top-2") for k in ("pairs", "taught"))
    assert plain.data.pairs == taught.data.pairs == "pairs" and plain.data.rates is None
    assert (plain.data.teacher, taught.data.teacher) == ("", "pairs.work")
    assert plain.eval_every == 100 and plain.steps * plain.batch_size >= 100_000
    assert not dataclasses.replace(PLACE, pairs=None).is_possible("pairs-dense")
    assert dataclasses.replace(PLACE, pairs=None).is_possible("top-2")


def test_equal_wall_time():
    """The slower run is judged where it was when the faster one was done: at step 6 of 8."""
    curve = {0: 0.0, 4: 0.4, 8: 0.6}
    fast = {"seconds": 30.0, "steps": 8, "evaluations": curve}
    slow = {"seconds": 40.0, "steps": 8, "evaluations": curve}
    runs = {"a": {0: fast, 1: dict(fast)}, "b": {0: slow, 1: slow | {"seconds": None}}}
    findings_numbers.judge_at_equal_time(runs)
    assert fast["equal_time"] == pytest.approx(0.6)
    assert slow["equal_time"] == pytest.approx(0.5)
    assert "equal_time" not in runs["a"][1]  # no time of the other arm: it was interrupted


def run_of(score: float, loss, seed: int = 0) -> dict:
    return {"seed": seed, "held_out": {"128": {"all": score}}, "loss": loss}


def test_differences_and_verdicts():
    falling = np.linspace(5, 1, 8).tolist()
    runs = {
        "moe": {s: run_of(0.5 + s / 10, (np.array(falling) - 0.1).tolist()) for s in (0, 1, 2)},
        "dense": {s: run_of(0.4 + s / 10 + s / 1000, falling) for s in (0, 1, 3)},
        "none": {},
    }
    keys = ("held_out", "128", "all")
    found = findings_numbers.differences(runs, "moe", "dense", keys)
    np.testing.assert_allclose(found, [0.1, 0.099])  # only seeds that both have
    assert findings_numbers.differences(runs, "moe", "none", keys) == []
    assert findings_numbers.verdict("moe", "none", []) == "not run"
    better = findings_numbers.verdict("moe", "dense", found)
    assert better == "+0.099 ± 0.006: moe is better, the interval excludes 0"
    assert "dense is better" in findings_numbers.verdict("moe", "dense", [-0.1, -0.099])
    assert "moe is better" in findings_numbers.verdict("moe", "dense", [-0.1, -0.099], False)
    undecided = findings_numbers.verdict("moe", "dense", [0.1, -0.05, 0.02])
    assert "includes 0, no winner at this scale" in undecided
    assert "no verdict" in findings_numbers.verdict("moe", "dense", [0.5])
    np.testing.assert_allclose(
        findings_numbers.loss_differences(runs, "moe", "dense"), np.full((2, 4), -0.1)
    )


def test_trends():
    towards = np.array([[0.3, 0.2, 0.1, 0.05], [0.3, 0.21, 0.1, 0.06], [0.3, 0.2, 0.1, 0.06]])
    assert "moves it towards moe" in findings_numbers.trend("moe", "dense", towards)
    assert "moves it towards dense" in findings_numbers.trend("moe", "dense", -towards)
    mixed = towards * np.array([[1], [-1], [0.1]])
    assert "no direction" in findings_numbers.trend("moe", "dense", mixed)


def test_load_statistics():
    apart = np.zeros((4, 1, 8))  # four languages, an expert pair each
    for language in range(4):
        apart[language, 0, 2 * language : 2 * language + 2] = 0.5
    assert findings_numbers.mutual_information(apart) == pytest.approx(2)
    assert findings_numbers.mutual_information(np.full((4, 2, 8), 1 / 8)) == pytest.approx(0)
    # Batches of a language each: all experts are used, few by a batch.
    whole, of_batch = findings_numbers.effective_experts(np.concatenate([apart, apart]))
    assert whole == pytest.approx(8) and of_batch == pytest.approx(2)


# ---- Runs ----------------------------------------------------------------------------------------


TINY = {
    "health.stop_on_collapse": False,
    "batch_size": 16,
    "model.vocab_size": 512,
    "model.num_layers": 2,
    "model.width": 32,
    "model.num_heads": 2,
    "model.ffn_width": 48,
    "data.vocabulary.size": 512,
    "data.query_length": 16,
    "data.document_length": 24,
    "data.row_length": 48,
    "data.rates": {"translations": 0.7, "descriptions": 0.3},
    "optimizer.warmup_steps": 1,
}


@pytest.fixture
def tiny(monkeypatch, data_dir, tmp_path):
    """Flags of the benchmark for the synthetic data, with settings of its size."""
    sets = ("descriptions/aa", "descriptions/bb", "translations/aa", "translations/bb")
    changes = dict(steps=4, width=32, sets=sets, config=TINY)
    changes |= dict(languages="aa bb", every=3)
    monkeypatch.setitem(SETTINGS, "scratch", dataclasses.replace(SETTINGS["scratch"], **changes))
    for language in ("aa", "bb"):
        pairs = synthetic_data.pairs("translations", language, 24, 5)
        synthetic_data.write_beir(tmp_path / "xquad" / language, pairs)
    (data_dir / "retrieval" / "statistics.json").write_text("{}\n")
    flags = [f"--work={tmp_path}/work", f"--data_dir={data_dir}", f"--xquad={tmp_path}/xquad"]
    return [*flags, "--seeds=3,4", f"--report={tmp_path}/report"]


def call(monkeypatch, flags) -> int:
    monkeypatch.setattr(sys, "argv", ["findings.py", *flags])
    return launching.run(benchmark.main)


def test_all_runs(tiny, monkeypatch, tmp_path, capsys):
    """Which processes are started, on what, how often; a failure stops no other run."""
    started, failing = [], {"dense-4"}
    real_run = subprocess.run

    def run(command, **process):
        if command[1] == "-m":  # preparation
            return real_run(command, **process)
        flags = argparse.ArgumentParser()
        score = {name: 0.5 for name in METRICS} | {"queries": 1, "documents": 1}
        if command[1] == "launch/evaluate.py":
            for name in ("model", "dataset", "output", "dim"):
                flags.add_argument(f"--{name}")
            given = flags.parse_args(command[2:])
            sets = given.dataset.split(",")
            started.append((pathlib.Path(given.model).name, f"evaluate {given.dim} {len(sets)}"))
            found = {str(i): score for i in range(len(sets))}
            save_json(given.output, {dim: found for dim in given.dim.split(",")})
            return subprocess.CompletedProcess(command, 0)
        flags.add_argument("--workdir", type=pathlib.Path)
        given, config = launching.parse_with_config(flags, RunConfig, command[2:])
        started.append((given.workdir.name, f"train {config.steps}"))
        if given.workdir.name in failing:
            return subprocess.CompletedProcess(command, 2)
        assert len(load_heldout(config.data.dir)) == 4
        assert process["env"]["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "work/compiled")
        results = {name: score for name in load_heldout(config.data.dir)}
        save_json(given.workdir / "results.json", {"trained": results, "untrained": results})
        save_json(given.workdir / "config.json", dataclasses.asdict(config))
        save_json(given.workdir / "routing.json", {"aa": [[0.125] * 8], "bb": [[0.125] * 8]})
        record = dict(contrastive_loss=config.seed / 10, tokens=9, utilisation=0.5)
        record["expert_load"] = [[0.125] * 8]
        records = [json.dumps(record | {"step": step}) for step in range(config.steps)]
        (given.workdir / "metrics.jsonl").write_text("\n".join(records) + "\n")
        evaluation = json.dumps({"step": 0, "complete": True, "sets": results})
        (given.workdir / "evaluations.jsonl").write_text(evaluation + "\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    flags = [*tiny, "--findings=a,d", "--arms=top-2,dense,every-layer", "--jobs=2"]
    assert call(monkeypatch, flags) == 2
    out = capsys.readouterr()
    assert "not run:" not in out.out and "1 run(s) failed: dense with" in out.err
    assert "log.txt" in out.err
    runs = [f"{arm}-{seed}" for seed in (3, 4) for arm in ("top-2", "dense", "every-layer")]
    assert [name for name, what in started if what == "train 4"] == sorted(
        runs, key=[name for name, what in started if what == "train 4"].index
    )
    for name in set(runs) - failing:  # XQuAD in two languages and four held-out sets
        assert [w for n, w in started if n == name] == ["train 4", "evaluate 32,10 6"]
    page = (tmp_path / "report/dense_vs_moe.md").read_text()
    assert "**Not run:** dense (seeds 4); top-1 (seeds 3, 4)" in page
    assert "+0.000: one seed" in page  # top-2 - dense: of the seed that both have
    assert "every-layer - top-2" in (tmp_path / "report/moe_layers.md").read_text()
    numbers = json.loads((tmp_path / "report/dense_vs_moe.json").read_text())
    assert [(run["arm"], run["seed"]) for run in numbers] == [
        ("dense", 3),
        ("top-2", 3),
        ("top-2", 4),
    ]
    data = tmp_path / "work/scratch/data"
    assert sorted(load_heldout(data)) == sorted(SETTINGS["scratch"].sets)
    with gzip.open(tmp_path / "work/scratch/xquad/aa/queries.jsonl.gz", "rt") as file:
        assert [json.loads(line)["_id"] for line in file] == [f"q{i}" for i in range(0, 24, 3)]

    # Again: only what failed.
    failing.clear()
    started.clear()
    assert call(monkeypatch, flags) == 0
    assert {name for name, _ in started} == {"dense-4"}
    started.clear()
    assert call(monkeypatch, [*flags, "--jobs=0"]) == 0 and not started
    assert "**Not run:** top-1" in (tmp_path / "report/dense_vs_moe.md").read_text()
    index = (tmp_path / "report/README.md").read_text()
    assert "(moe_layers.md)" in index and "Packed or padded, in chunks or not: the same" in index
    # On another machine, which has the numbers: nothing is run, and the pages are the same.
    pages = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert call(monkeypatch, [*flags, f"--work={tmp_path}/elsewhere", "--reported"]) == 0
    assert not started
    of_text = [name for name in pages if not name.endswith(".png")]
    assert len(of_text) == 5
    for name in of_text:
        assert (tmp_path / "report" / name).read_bytes() == pages[name], name
    elsewhere = [f"--work={tmp_path}/elsewhere", "--reported", "--scratch_steps=5"]
    assert call(monkeypatch, [*flags, *elsewhere]) == 2
    assert "has 4 steps, not 5" in capsys.readouterr().err
    # Runs of other lengths are not mixed.
    assert call(monkeypatch, [*flags, "--jobs=0", "--scratch_steps=5"]) == 2
    assert "has 4 steps, not 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--findings=a,z", "there is no 'z'; choose from a, b, c, d, e, f, g"),
        ("--arms=e5-dense,best", "there is no 'best'; choose from"),
        ("--seeds=1,x", "--seeds=1,x: invalid literal"),
        ("--reported", "the numbers of finding c lack the loads of single steps"),
    ],
)
def test_mistakes(tiny, monkeypatch, capsys, flag, message):
    assert call(monkeypatch, [*tiny, flag]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_run(tiny, monkeypatch, tmp_path):
    """One arm without balance, over the devices of finding c, from start to page."""
    monkeypatch.setitem(ARMS, "balance-0", dataclasses.replace(ARMS["balance-0"], devices=2))
    flags = ["--findings=c", "--arms=balance-0", "--seeds=3"]
    assert call(monkeypatch, [*tiny, *flags]) == 0, (
        tmp_path / "work/balance/balance-0-3/log.txt"
    ).read_text()[-2000:]
    page = (tmp_path / "report/balance.md").read_text()
    assert "| balance-0 | no balance loss | 1 |" in page and "balance-0, seed 3" in page
    assert (tmp_path / "report/balance_load.png").stat().st_size > 1000
    log = (tmp_path / "work/balance/balance-0-3/log.txt").read_text()
    assert "on 2 cpu device(s)" in log
    scores = json.loads((tmp_path / "work/balance/balance-0-3/scores.json").read_text())
    assert set(scores["xquad"]) == {"32", "10"} == set(scores["held_out"])
    assert 0 < scores["xquad"]["32"]["xquad/aa"] <= 1


def test_pages_of_losses_only(tmp_path):
    runs = {"packed": {0: run_of(0, [3.0, 2.0]), 1: run_of(0, [3.5, 2.5], 1)}}
    runs |= {"padded": {0: run_of(0, [3.0, 2.0004])}, "chunked": {0: run_of(0, [3.0, 2.5])}}
    text = findings_report.curves(FINDINGS["f"], runs)
    assert "| padded - packed | 0.00e+00 | 4.00e-04 |" in text
    assert "padded and packed: the same within 0.01" in text
    assert "chunked and packed: NOT the same within" in text and "differ by up to 0.50" in text


def test_benchmarks_do_not_know_the_machine():
    text = findings_report.command("a", [0], findings_runs.Place(ROOT / "w", ROOT / "d"))
    assert str(ROOT) not in text
