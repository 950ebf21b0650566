"""The benchmark of the hosts' side of filtering: what it measures, and what it makes of it."""

import argparse
import json
import sys

import pytest
from conftest import load_benchmark
from helpers import synthetic_data
from helpers.stand_in_teacher import pair

from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.preparation.pair_writer import PairWriter


@pytest.fixture
def benchmark():
    return load_benchmark("curation_rates")


def test_measures_every_step(benchmark, tmp_path, data_dir, monkeypatch, capsys):
    with PairWriter(tmp_path / "pairs", {}) as writer:
        for i in range(50):
            writer.write(pair(i % 40))
    tokenizer = vocabulary_path(synthetic_data.PREPARATION, data_dir)
    output = tmp_path / "rates.json"
    flags = ["--rows=45", "--width=8", f"--output={output}", f"--tokenizer={tokenizer}"]
    monkeypatch.setattr(sys, "argv", ["curation_rates.py", f"--pairs={tmp_path}/pairs", *flags])
    benchmark.main()
    report = json.loads(output.read_text())
    units = {name: (step["count"], step["unit"]) for name, step in report["steps"].items()}
    assert units == {
        "read pairs, find duplicates": (45, "pairs"),
        "tokenise": (units["tokenise"][0], "tokens"),
        "pack": (80, "texts"),  # 40 queries, 40 documents
        "write vectors": (80, "texts"),
        "read vectors": (80, "texts"),
        "write shards": (45, "pairs"),
        "copy shards (--finish)": (45, "pairs"),
    }
    assert all(step["per_second"] > 0 for step in report["steps"].values())
    assert units["tokenise"][0] > 3 * 80
    assert len(report["hours"]) == len(units) + 2
    assert "1,600,000,000 pairs on 16 hosts of 8 v5e" in capsys.readouterr().out


def test_hours(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "SLOTS_PER_SECOND", 100.0)
    monkeypatch.setattr(benchmark, "QUERIES_PER_SECOND", 10.0)
    monkeypatch.setattr(benchmark, "FULL", 0.5)
    steps = {
        "tokenise": {"unit": "tokens", "per_second": 40.0},
        "pack": {"unit": "texts", "per_second": 4.0},
        "write shards": {"unit": "pairs", "per_second": 5.0},
        benchmark.FINISH: {"unit": "pairs", "per_second": 8.0},
    }
    arguments = argparse.Namespace(total=3600.0, hosts=2, chips=4, tokens=20)
    cores, chips = "of a core, measured", "of all chips, predicted"
    assert benchmark.costs(arguments, steps) == [
        ("tokenise", 0.25, cores),  # 1800 pairs a host, 20 tokens of each, 40 a second
        ("pack", 0.25, cores),  # 2 texts of each, 4 a second
        ("write shards", 0.1, cores),
        (benchmark.FINISH, 0.125, cores),  # of all pairs, by one host
        ("embed", pytest.approx(1800 * 20 / 0.5 / 100 / 4 / 3600), chips),
        ("search", pytest.approx(1800 / 10 / 4 / 3600), chips),
    ]
