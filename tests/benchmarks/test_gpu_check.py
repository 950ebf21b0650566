"""The script for the day that a GPU is there, in small, and what it does when a part fails."""

import importlib.util
import json

import pytest
from conftest import load_benchmark


@pytest.fixture(scope="module")
def gpu_check():
    return load_benchmark("gpu_check")


@pytest.mark.slow
def test_every_part_runs_in_small(gpu_check, tmp_path, capsys):
    output = tmp_path / "check.json"
    assert gpu_check.main(["--small", f"--output={output}"]) == 0
    report = json.loads(output.read_text())
    rows = {(row["part"], row["name"]): row for row in report["rows"]}
    assert {part for part, _ in rows} == set(gpu_check.PARTS)
    assert report["small"] and report["device"] == "cpu"
    differences = [row for (part, _), row in rows.items() if part == "correct"]
    assert len(differences) == 4 and all(0 < row["value"] < 2e-2 for row in differences)
    assert rows["step", "rate"]["value"] > 0 and rows["encoding", "Embedder.encode"]["value"] > 0
    if importlib.util.find_spec("sentence_transformers"):
        assert rows["torch experts", "grouped_mm, 48 tokens"]["value"] > 0
        assert rows["torch encoding", "least cosine of the two"]["value"] > 0.9999
        assert rows["torch encoding", "sentence-transformers, batches of 32"]["value"] > 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in gpu_check.PARTS) and "rates say nothing" in printed


def test_a_part_that_fails_is_a_row_and_the_exit_status(gpu_check, tmp_path, monkeypatch, capsys):
    def fails(sizes, rows):
        yield {"name": "before", "value": 1.0, "unit": "ms"}
        raise ValueError("no such kernel\nand more")

    def works(sizes, rows):
        yield {"name": "after", "value": len(rows) + 0.0, "unit": ""}

    monkeypatch.setattr(gpu_check, "PARTS", {"one": fails, "two": works})
    output = tmp_path / "check.json"
    assert gpu_check.main(["--small", f"--output={output}"]) == 1
    rows = json.loads(output.read_text())["rows"]
    assert [row["name"] for row in rows] == ["before", "failed", "after"]
    assert rows[1]["error"] == "ValueError: no such kernel" and rows[2]["value"] == 2
    assert "no such kernel" in capsys.readouterr().out


def test_a_kernel_that_differs_from_its_oracle_or_fails_is_an_error():
    import jax.numpy as jnp

    gpu_parts = load_benchmark("gpu_parts")
    oracle = {"a": jnp.ones(4), "b": jnp.ones(4)}

    def row(gradients):
        return gpu_parts.guarded("k", gpu_parts.compare, gradients, (), oracle, "float32")

    assert "error" not in row(lambda: {"a": jnp.ones(4), "b": jnp.ones(4) + 1e-5})
    far = row(lambda: {"a": jnp.ones(4), "b": jnp.ones(4) + 1e-3})
    assert "differs from the oracle" in far["error"]
    assert row(lambda: 1 / 0) == {"name": "k", "error": "ZeroDivisionError: division by zero"}


@pytest.mark.parametrize(
    ("flags", "line"), [(["--only=nothing"], "no part nothing"), ([], "JAX sees no GPU")]
)
def test_flags_that_cannot_be(gpu_check, flags, line, capsys):
    with pytest.raises(SystemExit) as refused:
        gpu_check.main(flags)
    assert refused.value.code == 2 and line in capsys.readouterr().err
