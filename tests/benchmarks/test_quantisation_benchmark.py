"""The benchmark of quantisation-aware training: what it trains, its searches, its table."""

import argparse
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import load_benchmark

from moe_embed_jax import launching
from moe_embed_jax.config import save_json
from moe_embed_jax.embedder import unit_norm
from moe_embed_jax.search.compressed import Int8Vectors
from moe_embed_jax.search.knn import top_k
from moe_embed_jax.training.run_config import RunConfig

benchmark = load_benchmark("quantisation")


def test_every_index_is_searched():
    rng = np.random.default_rng(0)
    documents, queries = (unit_norm(rng.normal(size=(n, 16))).astype(np.float32) for n in (60, 9))
    found = benchmark.search_all(queries, documents, 10)
    assert [size for size, _ in found.values()] == [64, 16, 2, 2]
    np.testing.assert_array_equal(found["float32"][1], top_k(queries, documents, 10)[1])
    int8 = Int8Vectors.compress(documents).top_k(queries, 10)[1]
    np.testing.assert_array_equal(found["int8"][1], int8)
    exact = found["float32"][1]
    overlap = [
        np.mean([len({*a} & {*b}) for a, b in zip(exact, index, strict=True)])
        for _, index in found.values()
    ]
    assert overlap[0] == 10 and overlap[1] > overlap[2] > 3


def test_the_table_has_means_and_differences_by_seed():
    def run(int8, binary):
        return {
            "128 int8": {"bytes": 128, "ndcg_at_10": int8},
            "128 binary": {"bytes": 16, "ndcg_at_10": binary},
        }

    scores = {"afterwards": [run(0.1, 0.1), run(0.3, 0.2)], "trained": [run(0.2, 0.2)] * 2}
    lines = benchmark.table(scores).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        *("width", "index", "bytes a vector", "afterwards", "trained", "difference")
    ]
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert cells[:3] == ["128", "binary", "16"]
    assert cells[3].startswith("0.150 ±") and cells[4] == "0.200 ± 0.000"
    assert cells[5].startswith("+0.050 ±")
    assert "difference" not in benchmark.table({"trained": scores["trained"]})


def test_runs(tmp_path, monkeypatch, capsys):
    """Which trainings are started, and how often; an unknown arm is one line."""
    import findings_runs

    runs = []

    def run(command, check, cwd):
        flags = argparse.ArgumentParser()
        flags.add_argument("--workdir", type=pathlib.Path)
        arguments, config = launching.parse_with_config(flags, RunConfig, command[2:])
        runs.append((arguments.workdir.name, config.seed, config.steps, config.loss.quantisation))
        assert config.loss.dims == {"128": 1.0, "32": 1.0}
        save_json(arguments.workdir / "results.json", {})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(findings_runs, "prepare", lambda place, setting: None)
    scores = {"32 int8": {"bytes": 32, "ndcg_at_10": 0.5}}
    monkeypatch.setattr(benchmark, "judge", lambda folder, data_dir: scores)
    flags = [f"--work={tmp_path}", "--seeds=4", "--steps=9"]
    monkeypatch.setattr(sys, "argv", ["quantisation.py", *flags])
    for _ in range(2):  # nothing is trained twice
        assert launching.run(benchmark.main) == 0
        assert "+0.000" in capsys.readouterr().out
    forms = {"float32": 1.0, "int8": 1.0, "binary": 1.0}
    assert runs == [("afterwards-9-4", 4, 9, None), ("trained-9-4", 4, 9, forms)]
    monkeypatch.setattr(sys, "argv", ["quantisation.py", *flags, "--arms=none"])
    assert launching.run(benchmark.main) == 2
    assert "there is no 'none'; choose from afterwards, trained" in capsys.readouterr().err


def test_judging_reads_what_it_wrote(tmp_path):
    save_json(tmp_path / benchmark.SCORES, {"128 int8": {"bytes": 128, "ndcg_at_10": 0.25}})
    found = benchmark.judge(tmp_path, pathlib.Path("nowhere"))
    assert found == {"128 int8": {"bytes": 128, "ndcg_at_10": pytest.approx(0.25)}}
