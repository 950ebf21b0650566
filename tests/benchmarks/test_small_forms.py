"""Benchmarks of parts of the step run in small and write what they promise."""

import json

import pytest
from helpers.forked import run_forked


def report_of(tmp_path, script: str, *flags) -> dict:
    output = tmp_path / "report.json"
    result = run_forked([f"benchmarks/{script}", *flags, f"--output={output}"])
    assert result.returncode == 0, result.stderr
    return json.loads(output.read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_parts_of_a_step_add_up(tmp_path, dtype):
    small = ["--width=64", "--rows=2", "--row_length=16", "--layers=2", "--rounds=1"]
    report = report_of(tmp_path, "step_profile.py", *small, f"--dtype={dtype}")
    *parts, whole = report["parts"]
    assert whole["name"] == "whole step" and len(parts) == 4
    for key in ("seconds", "flops"):
        assert sum(part[key] for part in parts) == pytest.approx(whole[key])
    rate = 1e9 * report["plain_gflops"]
    assert report["ratio"] == pytest.approx(whole["seconds"] * rate / whole["flops"]) and rate > 0


def test_the_expert_layer_beside_dense_layers(tmp_path):
    small = ["--tokens=32,64", "--width=32", "--ffn_width=48", "--experts=4", "--rounds=1"]
    report = report_of(tmp_path, "expert_layer.py", *small, "--topologies=")
    assert report["ratio"] == max(report["ratios"].values()) > 0
    assert set(report["ratios"]) == {"32", "64"} and report["flops_ratio"] is None


def test_the_memory_of_the_loss(tmp_path):
    small = ["--devices=2", "--width=64", "--batches=64,4096", "--time_batches=16"]
    small += ["--step_batches=8", "--chunk_rows=2"]
    report = report_of(tmp_path, "loss_memory.py", *small)
    last = report["memory"][-1]
    assert report["ratio"] == last["dense_bytes"] / last["streamed_bytes"] > 2
    assert report["step_ratio"] > 1 and report["time_ratio"] > 0
