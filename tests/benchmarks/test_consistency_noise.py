"""The planted-noise benchmark: labels, counts, and a whole run; the default data as a folder."""

import json
import sys

import numpy as np
import pytest
from conftest import load_benchmark
from helpers import synthetic_wheels
from helpers.stand_in_teacher import StandInTeacher, pair

from moe_embed_jax import launching
from moe_embed_jax.curation import teacher as teacher_module
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.pairs.normal_form import normal_form
from moe_embed_jax.preparation import export_pairs
from moe_embed_jax.preparation.builders import package_texts, wheels
from moe_embed_jax.preparation.pair_writer import PairWriter


@pytest.fixture
def benchmark():
    return load_benchmark("consistency_noise")


def test_documents_change_places(benchmark):
    rows = [pair(i) for i in range(40)]
    rows += [pair(i)._replace(document="the same  Document") for i in range(40, 60)]
    changed, planted = benchmark.plant(rows, 0.5, np.random.default_rng(0))
    assert sorted(r.document for r in changed) == sorted(r.document for r in rows)
    assert [r.query for r in changed] == [r.query for r in rows]
    moved = [
        normal_form(a.document) != normal_form(b.document)
        for a, b in zip(rows, changed, strict=True)
    ]
    np.testing.assert_array_equal(planted, moved)
    assert 15 < planted.sum() <= 30
    again, _ = benchmark.plant(rows, 0.5, np.random.default_rng(0))
    assert again == changed
    assert not benchmark.plant(rows[:1], 1.0, np.random.default_rng(0))[1].any()


def test_scores(benchmark):
    planted = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], bool)
    keep = np.array([0, 0, 0, 1, 0, 1, 1, 1, 1, 1], bool)
    found = benchmark.score(planted, keep)
    assert found["precision"] == 0.75 and found["recall"] == 0.75 and found["F1"] == 0.75
    assert found["clean lost"] == pytest.approx(1 / 6)
    nothing = benchmark.score(np.zeros(3, bool), np.ones(3, bool))
    assert nothing["precision"] is nothing["recall"] is nothing["F1"] is None
    assert "| x | 3 | 0 | 0 | - | - | - | 0.000 |" in benchmark.table({"x": nothing})


def test_finds_planted_noise(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teacher_module.Embedder, "load", lambda name, **_: StandInTeacher())
    with PairWriter(tmp_path / "pairs", {}) as writer:
        for source, language in (("a", "de"), ("a", "en"), ("b", "en")):
            for i in range(60):
                writer.write(pair(i, source, language))
    flags = [
        "--teacher=model",
        f"--pairs={tmp_path}/pairs",
        "--count=150",
        "--noise=0.2",
        f"--work={tmp_path}/work",
        f"--output={tmp_path}/noise.json",
    ]
    monkeypatch.setattr(sys, "argv", ["consistency_noise.py", *flags])
    assert launching.run(benchmark.main) == 0
    found = json.loads((tmp_path / "noise.json").read_text())
    assert found["total"]["pairs"] == 150 and 25 <= found["total"]["planted"] <= 31
    # A document of other words: the right one ranks above it, and chance decides about a second.
    assert found["total"]["recall"] > 0.8 and found["total"]["precision"] == 1.0
    assert [*found["sources"]] == ["a", "b"]
    assert found["pairs_per_second_of_embedding"] > 0 and found["pairs_per_second_of_search"] > 0
    assert "| all | 150 |" in capsys.readouterr().out
    assert launching.run(benchmark.main) == 0  # with the vectors of the first run
    again = json.loads((tmp_path / "noise.json").read_text())
    assert again["total"] == found["total"]


def test_the_default_data_as_a_prepared_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(wheels.WHEELS_DIR_VARIABLE, raising=False)
    for name, wheel in synthetic_wheels.write_wheels(tmp_path / "wheels").items():
        monkeypatch.setitem(wheels.WHEELS, name, wheel)
    package_texts.prepare(tmp_path / "data", wheels_dir=tmp_path / "wheels")
    flags = [f"--data_dir={tmp_path}/data", f"--output={tmp_path}/pairs"]
    monkeypatch.setattr(sys, "argv", ["export_pairs", *flags])
    assert launching.run(export_pairs.main) == 0
    folder = PairFolder(tmp_path / "pairs")
    expected = []
    for config in package_texts.CONFIGS:
        rows, _ = package_texts.open_split(tmp_path / "data", config, "train")
        expected += [row._asdict() for row in rows.read(range(len(rows)))]
    assert [row._asdict() for row in folder.read(range(len(folder)))] == expected
    assert not any(row["negatives"] for row in expected)
    assert f"{len(expected):,} pairs" in capsys.readouterr().out
    assert launching.run(export_pairs.main) == 2
    assert "is not empty" in capsys.readouterr().err

    def draw(*more):
        flags = [f"--data_dir={tmp_path}/data", f"--output={tmp_path}/{len(more)}-{more[-1]}"]
        monkeypatch.setattr(sys, "argv", ["export_pairs", *flags, *more])
        assert launching.run(export_pairs.main) == 0
        drawn = PairFolder(flags[1].removeprefix("--output="))
        return [row._asdict() for row in drawn.read(range(len(drawn)))]

    rates = '--rates={"translations": 3, "aws_api": 1}'
    first = draw("--count=40", rates)
    sources = [row["source"] for row in first]
    assert {name: sources.count(name) for name in sources} == {"translations": 30, "aws_api": 10}
    assert draw("--seed=0", "--count=40", rates) == first  # the same in another place
    assert draw("--seed=1", rates, "--count=40") != first
    order = {tuple(row.items()): i for i, row in enumerate(expected)}
    places = [order[tuple(row.items())] for row in first]
    assert places == sorted(set(places))  # real rows, each once, in groups
    assert len(draw("--count=1000000", '--rates={"aws_api": 1}')) == sum(
        row["source"] == "aws_api" for row in expected
    )
    for flag, message in (
        ("--rates=x", "must be JSON"),
        ('--rates={"x": 1}', "unknown task 'x'"),
        ("--count=-1", "count=-1 must be 0"),
    ):
        command = ["export_pairs", f"--data_dir={tmp_path}/data", f"--output={tmp_path}/no", flag]
        monkeypatch.setattr(sys, "argv", command)
        assert launching.run(export_pairs.main) == 2
        assert message in capsys.readouterr().err
