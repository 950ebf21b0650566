"""The throughput benchmarks run at a tiny size and write what they promise; speed is not tested."""

import json

import pytest
from conftest import run_python

TINY = [
    "--vocabulary_size=512",
    "--query_length=16",
    "--document_length=24",
    "--layers=2",
    "--width=32",
    "--experts=4",
    "--rounds=2",
]


def run(script: str, data_dir, tmp_path, *flags) -> dict:
    output = tmp_path / "report.json"
    result = run_python(
        [f"benchmarks/{script}", *TINY, f"--data_dir={data_dir}", f"--output={output}", *flags],
        OMP_WAIT_POLICY="PASSIVE",  # PyTorch's spinning threads crawl beside other processes
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    assert report["ratio"] > 0 and report["ratio_cpu"] > 0 and "/" in report["compares"]
    for name, turns in report["rounds"].items():
        assert len(turns) == 2
        assert all(turn["tokens"] > 0 and turn["wall"] > 0 for turn in turns), name
        assert turns[-1]["idle_cpu"] < 1, f"{name} computes while it waits"
    assert report["tokens_per_second"]["ours"]["wall"]["median"] > 0
    return report


@pytest.mark.slow
def test_encode_throughput(data_dir, tmp_path):
    pytest.importorskip("sentence_transformers")
    flags = ["--texts=30", "--batch_sizes=8"]
    report = run("encode_throughput.py", data_dir, tmp_path, *flags)
    assert report["texts"] == 30 and report["tokens"] > 30 * 3
    assert report["agree"] and max(report["largest_difference"].values()) < 1e-5


@pytest.mark.slow
def test_train_throughput(data_dir, tmp_path):
    for package in ("sentence_transformers", "datasets", "accelerate"):
        pytest.importorskip(package)
    flags = ["--batch_size=16", "--steps=1", "--mini_batch_sizes=4,8"]
    report = run("train_throughput.py", data_dir, tmp_path, *flags)
    assert {"ratio_padded", "ratio_plain"} <= report.keys()
    assert all(0 < share <= 1 for share in report["utilisation"].values())
    assert report["utilisation"]["ours"] > report["utilisation"]["ours, padded"]
    # The same weights and pairs on both sides: the first batch has the same loss.
    losses = [ready["first_loss"] for ready in report["ready"].values()]
    assert len(losses) == 4 and max(losses) - min(losses) < 1e-3


@pytest.mark.slow
def test_knn(tmp_path):
    pytest.importorskip("faiss")
    output = tmp_path / "report.json"
    flags = ["--sizes=3000x16,500x8", "--queries=70", "--k=10", "--rounds=2"]
    result = run_python(["benchmarks/knn.py", *flags, f"--output={output}"])
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    assert report["agree"] and report["ratio"] > 0 and "/" in report["compares"]
    assert [search["documents"] for search in report["searches"]] == [3000, 500]
    for search in report["searches"]:
        assert search["same_neighbours"] > 0.99 and search["ratio_cpu"] > 0
        assert all(len(turns) == 2 for turns in search["rounds"].values())
