"""The benchmark of what filtering is worth: its three folders, its statistics, its runs."""

import argparse
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, load_benchmark
from helpers import synthetic_data

from moe_embed_jax import launching
from moe_embed_jax.config import save_json
from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.heldout import load_heldout
from moe_embed_jax.evaluation.retrieval import METRICS
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.pairs.row import PairRow
from moe_embed_jax.preparation.pair_writer import PairWriter
from moe_embed_jax.training.run_config import RunConfig


@pytest.fixture
def benchmark():
    return load_benchmark("filtering_effect")


@pytest.fixture
def noisy(tmp_path):
    """(folder, planted, kept) as benchmarks/consistency_noise.py leaves them."""
    with PairWriter(tmp_path / "noisy-164-0.1-0", {}) as writer:
        for source, language, count in (
            *synthetic_data.PAIR_GROUPS,
            ("aws_api", "aa", 30),
            ("google_api", "aa", 30),
        ):
            for query, document in synthetic_data.pairs(source, language, count, 1):
                writer.write(PairRow(query, document, (), source, language))
    pairs = PairFolder(tmp_path / "noisy-164-0.1-0")
    rng = np.random.default_rng(0)
    planted, kept = rng.random(len(pairs)) < 0.1, rng.random(len(pairs)) < 0.8
    np.save(tmp_path / "noisy-164-0.1-0.npy", planted)
    np.save(tmp_path / "noisy-164-0.1-0.kept k=2.npy", kept)
    return pairs.folder, planted, kept


def test_arms(benchmark, noisy, tmp_path):
    folder, planted, kept = noisy
    rows = PairFolder(folder).read(range(len(planted)))
    for _ in range(2):  # a second call finds them
        arms = benchmark.write_arms(folder, tmp_path / "work")
        assert [*arms] == ["noisy", "k=2", "right"] and arms["noisy"] == folder
        for arm, mask in (("k=2", kept), ("right", ~planted)):
            written = PairFolder(arms[arm])
            expected = [row for row, chosen in zip(rows, mask, strict=True) if chosen]
            assert written.read(range(len(written))) == expected
    (tmp_path / "noisy-164-0.1-0.kept k=2.npy").unlink()
    with pytest.raises(UserError, match=r"is missing: run benchmarks/consistency_noise"):
        benchmark.write_arms(folder, tmp_path / "other")


def test_interval(benchmark):
    mean, half = benchmark.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.302653 * 1.0 / np.sqrt(3), rel=1e-6)
    assert np.isnan(benchmark.interval([1.0])[1])
    noisy, filtered = [{"all": 0.1}, {"all": 0.3}], [{"all": 0.2}, {"all": 0.4}]
    lines = benchmark.table({"noisy": noisy, "filtered": filtered}).splitlines()
    assert lines[-1] == "| filtered - noisy | +0.100 ± 0.000 |"


def test_all_runs(benchmark, noisy, data_dir, tmp_path, monkeypatch, capsys):
    """Which trainings are started, on what, how often; launch/train.py itself has its own tests."""
    runs = []

    def run(command, check, cwd):
        assert command[1] == "launch/train.py" and not check and cwd == ROOT
        flags = argparse.ArgumentParser()
        flags.add_argument("--workdir", type=pathlib.Path)
        arguments, config = launching.parse_with_config(flags, RunConfig, command[2:])
        assert config.steps == 7 and pathlib.Path(config.data.vocabulary.path).is_file()
        assert [*load_heldout(config.data.dir)] == ["translations/aa"]
        runs.append((arguments.workdir.name, pathlib.Path(config.data.pairs).name, config.seed))
        if runs[-1] == ("right-7-4", "right", 4):
            return subprocess.CompletedProcess(command, 2)
        score = {"noisy": 0.2, "k=2": 0.3, "right": 0.5}[runs[-1][0].split("-")[0]]
        metrics = {name: score for name in METRICS} | {"queries": 1, "documents": 1}
        results = {"translations/aa": metrics}
        save_json(arguments.workdir / "results.json", {"trained": results})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    flags = [f"--noisy={noisy[0]}", f"--data_dir={data_dir}", f"--work={tmp_path}/work"]
    flags += ["--steps=7", "--sets=translations/aa", "--variant=smoke"]
    flags += [f"--vocabulary={vocabulary_path(synthetic_data.PREPARATION, data_dir)}"]
    monkeypatch.setattr(sys, "argv", ["filtering_effect.py", *flags, "--seeds=3"])
    for _ in range(2):  # nothing is trained twice
        assert launching.run(benchmark.main) == 0
        assert "| k=2 - noisy | +0.100 ± nan |" in capsys.readouterr().out
    arms = [("noisy", noisy[0].name), ("k=2", "k=2"), ("right", "right")]
    assert runs == [(f"{arm}-7-3", folder, 3) for arm, folder in arms]
    monkeypatch.setattr(sys, "argv", ["filtering_effect.py", *flags, "--seeds=4"])
    assert launching.run(benchmark.main) == 2
    assert "right-7-4 failed" in capsys.readouterr().err
