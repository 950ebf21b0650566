"""Whole runs of launch/train.py: resumed = uninterrupted, 8 devices = 1 device, refusals.

The runs share a compilation cache, so most of them take seconds.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import metric, run_python
from helpers import synthetic_data
from helpers.forked import run_forked, start_forked

from moe_embed_jax import config as config_files
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation import heldout_retrieval
from moe_embed_jax.evaluation.retrieval import mean_over_languages
from moe_embed_jax.ownership import is_owner_file, own
from moe_embed_jax.training import evaluation, loop
from moe_embed_jax.training.run_config import RunConfig

STEPS = 24
# Each run compiles one step; test_configs_run.py has runs whose batches differ in their rows.
RUN = dict(steps=STEPS, eval_every=12, data=synthetic_data.ONE_ROW_COUNT)


@pytest.fixture(scope="module")
def config(data_dir, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(synthetic_data.config_text(data_dir, **RUN))
    return path


def command(config, workdir, *flags):
    return ["launch/train.py", f"--config={config}", f"--workdir={workdir}", *flags]


def train(config, workdir, *flags, devices=1):
    return run_forked(command(config, workdir, *flags), devices=devices)


@pytest.fixture(scope="module")
def whole_run(config, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    result = run_python(command(config, workdir))  # with another hash seed than those it equals
    assert result.returncode == 0, result.stderr
    (workdir / "stdout.txt").write_text(result.stdout)
    return workdir


def losses(workdir) -> np.ndarray:
    return metric(workdir, "loss")


def assert_same_checkpoint(a, b, step=STEPS, items=("params", "optimizer")):
    for item in items:
        trees = [
            ocp.StandardCheckpointer().restore(path / "checkpoints" / str(step) / item)
            for path in (a, b)
        ]
        jax.tree.map(np.testing.assert_array_equal, *trees)


def assert_same_records(a, b):
    for name in ("metrics.jsonl", "evaluations.jsonl", "results.json"):
        assert (a / name).read_text() == (b / name).read_text(), name


def test_the_run_tells_what_it_does(whole_run):
    out = (whole_run / "stdout.txt").read_text()
    assert "mesh        data=1 x fsdp=1 x expert=1 on 1 cpu device(s), 1 process(es)" in out
    assert re.search(r"model +[\d,]+ parameters, [\d,]+ active per token", out)
    assert "negatives   Each query is compared with the 15 other documents" in out
    assert f"schedule    {STEPS} steps" in out
    for word in ("BM25", "untrained", "trained", "translations", "descriptions", "query:"):
        assert word in out
    assert (whole_run / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert list((whole_run / "tensorboard").glob("events.*"))
    records = [json.loads(s) for s in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:  # 16 rows of 48 tokens
        assert record["utilisation"] == pytest.approx(record["tokens"] / (16 * 48))
    # 16 queries of up to 16 tokens and 16 documents of up to 24.
    assert all(32 * 2 < record["tokens"] <= 16 * (16 + 24) for record in records)
    assert all(r["expert_load_min"] <= 1 <= r["expert_load_max"] for r in records)
    assert all(0 < r["router_entropy"] <= np.log(4) + 1e-5 for r in records)
    assert all(np.isclose(np.sum(record["expert_load"], axis=1), 1).all() for record in records)
    results = json.loads((whole_run / "results.json").read_text())
    assert set(results) == {"BM25", "untrained", "trained"}
    assert len(results["trained"]) == 6
    evaluations = [
        json.loads(s) for s in (whole_run / "evaluations.jsonl").read_text().splitlines()
    ]
    assert [(e["step"], e["complete"]) for e in evaluations] == [(0, True), (12, False), (24, True)]
    routing = json.loads((whole_run / "routing.json").read_text())
    assert set(routing) == {"aa", "bb", "cc"}
    assert all(np.allclose(np.sum(share, axis=1), 1) for share in routing.values())


def test_it_learns(whole_run):
    curve = losses(whole_run)
    assert curve[-6:].mean() < curve[:6].mean() - 0.3
    means = translations(whole_run / "results.json")
    assert means["trained"] > means["untrained"] + 0.05


def translations(results: pathlib.Path) -> dict[str, float]:
    """Of every column of results.json the mean nDCG@10 over the languages."""
    return {
        name: mean_over_languages(sets)["translations"]["ndcg_at_10"]
        for name, sets in json.loads(results.read_text()).items()
    }


def start_and_signal(config, workdir, signal_number, after_steps):
    """Starts a run, signals it when `after_steps` steps are in its journal; (status, stderr)."""
    metrics = workdir / "metrics.jsonl"

    def written():
        return metrics.read_text().count("\n") if metrics.exists() else 0

    before = written()
    process = start_forked(command(config, workdir), stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300

    def wait(steps):
        while written() < steps:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    wait(before + 1)  # not later: asking for the owner takes some steps' time
    with pytest.raises(UserError, match=f"in use by process {process.pid} "):
        own(workdir, inside=True).__enter__()
    wait(after_steps)
    process.send_signal(signal_number)
    output, _ = process.communicate(timeout=120)
    assert written() < STEPS, "the signal came too late to test anything"
    return process.returncode, output


def test_resume_after_sigterm_is_bitwise(config, whole_run, tmp_path):
    status, output = start_and_signal(config, tmp_path, signal.SIGTERM, after_steps=9)
    assert status == 0
    assert "stopped by SIGTERM after step" in output
    result = train(config, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "resuming" in result.stdout
    metrics = [(path / "metrics.jsonl").read_text() for path in (whole_run, tmp_path)]
    assert metrics[0] == metrics[1]
    assert_same_checkpoint(whole_run, tmp_path)


# launch/train.py where no file may be larger than argv[1] bytes.
LIMITED = """
import resource, runpy, sys
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.argv[0] = "launch/train.py"
runpy.run_path("launch/train.py", run_name="__main__")
"""


def test_resume_after_a_refused_checkpoint_and_kill_9_is_bitwise(config, whole_run, tmp_path):
    size = 260_000  # the vocabulary is smaller, the arrays of a checkpoint are larger
    arguments = ["-c", LIMITED, size, f"--config={config}", f"--workdir={tmp_path}"]
    result = run_forked(arguments)
    assert_refused(result, f"{tmp_path}/checkpoints/.*: the file would be larger than the limit")
    assert not [path for path in tmp_path.iterdir() if is_owner_file(path)]
    # The next run begins again: more lines than these are its own.
    lines = (tmp_path / "metrics.jsonl").read_text().count("\n")
    status, _ = start_and_signal(config, tmp_path, signal.SIGKILL, after_steps=max(9, lines + 1))
    assert status == -9
    # A line cut short by the kill must not matter either.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "gro')
    # And a damaged checkpoint: the run continues from the one before.
    checkpoints = tmp_path / "checkpoints"
    newest = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    damaged = checkpoints / f"{newest + 1}"
    shutil.copytree(checkpoints / f"{newest}", damaged)
    array = max(damaged.glob("params/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(array.read_bytes())
    data[len(data) // 2] ^= 1
    array.write_bytes(data)
    result = train(config, tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{array} was changed (its CRC-32 differs); moved to {tmp_path}" in result.stderr
    assert f"resuming    {tmp_path} after step {newest}" in result.stdout
    assert_same_records(whole_run, tmp_path)
    assert_same_checkpoint(whole_run, tmp_path)


# launch/train.py, whose part argv[1] is "preparation": SIGTERM comes while a stand-in for it works;
# or a number: SIGTERM comes in that evaluation of the process.
SIGNALLED = """
import os, runpy, signal, sys
from moe_embed_jax.evaluation import heldout_retrieval

part = sys.argv.pop(1)
evaluate, calls = heldout_retrieval.evaluate_heldout, []

def signalled(*arguments):
    calls.append(0)
    if part == str(len(calls)):
        os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(*arguments)

heldout_retrieval.evaluate_heldout = signalled
if part == "preparation":
    sys.executable = sys.argv.pop(1)
sys.argv[0] = "launch/train.py"
runpy.run_path("launch/train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_sigterm_in_preparation_or_evaluation_changes_no_result(data_dir, whole_run, tmp_path):
    """One run, stopped in both, and in its last evaluation; then all is as if it never had been."""
    prepared, config, run = tmp_path / "data", tmp_path / "config.py", tmp_path / "run"
    config.write_text(synthetic_data.config_text(prepared, **RUN))
    preparation = tmp_path / "python"
    preparation.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid\nkill -TERM $PPID\nexec sleep 99\n"
    )
    preparation.chmod(0o755)
    flags = [f"--config={config}", f"--workdir={run}"]

    result = run_forked(["-c", SIGNALLED, "preparation", preparation, *flags], timeout=60)
    assert result.returncode == 0, result.stderr
    assert "SIGTERM: nothing to save yet" in result.stderr and "error" not in result.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not (run / "checkpoints").exists()

    prepared.symlink_to(data_dir)
    result = run_forked(["-c", SIGNALLED, 1, *flags])
    assert result.returncode == 0, result.stderr
    assert "stopped by SIGTERM after step 1: saved" in result.stderr
    assert not (run / "results.json").exists()

    result = run_forked(["-c", SIGNALLED, 2, *flags])  # in the evaluation after the last step
    assert result.returncode == 0, result.stderr
    assert "after step 1" in result.stdout and "SIGTERM" in result.stderr
    for name in ("metrics.jsonl", "evaluations.jsonl", "results.json"):
        assert (run / name).read_text() == (whole_run / name).read_text(), name
    assert_same_checkpoint(whole_run, run)


class Killed(BaseException):
    """Stands for kill -9."""


def test_every_evaluation_is_recorded_once(config, whole_run, tmp_path, monkeypatch, capfd):
    """Killed before the first checkpoint, and twice between saving and evaluating; then the
    finished run is started again."""
    page = config_files.load(RunConfig, str(config), {})
    evaluate, write, calls = heldout_retrieval.evaluate_heldout, evaluation.append_record, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) in kills:
            raise Killed
        return evaluate(*arguments)

    def killed_after_writing(path, record):
        write(path, record)
        if record["step"] == 0:
            raise Killed

    monkeypatch.setattr(heldout_retrieval, "evaluate_heldout", killed)
    monkeypatch.setattr(evaluation, "append_record", killed_after_writing)
    kills = ()
    with pytest.raises(Killed):
        loop.train(page, tmp_path)
    monkeypatch.setattr(evaluation, "append_record", write)
    kills = (2, 4)  # at step 12, at step 24
    for lines in (1, 2):
        with pytest.raises(Killed):
            loop.train(page, tmp_path)
        assert (tmp_path / "evaluations.jsonl").read_text().count("\n") == lines
    assert len(calls) == 4
    for _ in range(2):
        assert loop.train(page, tmp_path)
        assert_same_records(whole_run, tmp_path)
        assert len(calls) == 5
    assert_same_checkpoint(whole_run, tmp_path)
    assert "trained" in capfd.readouterr().out  # the table is shown again


@pytest.mark.parametrize(("mesh", "chunk_rows"), [((8, 1, 1), 0), ((2, 2, 2), 1)])
def test_eight_devices_equal_one(config, whole_run, tmp_path, mesh, chunk_rows):
    """Sharded, and in one case in chunks too: the same losses as on one device in one piece."""
    flags = [
        f"--config.mesh.{axis}={n}"
        for axis, n in zip(("data", "fsdp", "expert"), mesh, strict=True)
    ]
    flags.append(f"--config.data.chunk_rows={chunk_rows}")
    result = train(config, tmp_path, *flags, devices=8)
    assert result.returncode == 0, result.stderr
    assert bool(chunk_rows) == (f"encoded {chunk_rows} at a time" in result.stdout)
    one, eight = losses(whole_run), losses(tmp_path)
    assert len(one) >= 20
    loads = [metric(path, "expert_load")[:20] for path in (whole_run, tmp_path)]
    np.testing.assert_allclose(*loads, atol=1e-6, err_msg="a router tie, see config_text's seed")
    np.testing.assert_allclose(eight[:20], one[:20], atol=1e-5, rtol=0)


def test_checkpoint_moves_to_another_mesh(config, whole_run, tmp_path):
    """A run stopped on one device, by Ctrl-C, continues on eight with the same batches."""
    status, output = start_and_signal(config, tmp_path, signal.SIGINT, after_steps=9)
    assert status == 130
    assert re.search(r"^interrupted: after step \d+: saved; the same command", output, re.M)
    result = train(config, tmp_path, "--config.mesh.expert=2", devices=8)
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(losses(tmp_path), losses(whole_run), atol=2e-5, rtol=0)


def assert_refused(result, message):
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.model.num_expert=4"], "unknown config key model.num_expert; did you mean"),
        (["--config.steps=many"], "config key steps='many' is a str; it must be a int"),
        (["--config.batch_size=15"], "batch_size=15 is not divisible by the 8 devices"),
        (["--config.mesh.expert=3"], "expert=3 does not fit 8 devices"),
        (["--config.data.row_length=8"], "row_length=8 is shorter than the longest prepared text"),
        (["--config.model.vocab_size=100"], "vocab_size=100 is smaller than the vocabulary"),
    ],
)
def test_bad_config_is_one_line(config, tmp_path, flags, message):
    assert_refused(train(config, tmp_path, *flags, devices=8), message)


def test_work_directory_of_another_config_is_refused(config, whole_run):
    before = (whole_run / "metrics.jsonl").read_bytes()
    result = train(config, whole_run, "--config.optimizer.b1=0.8")
    assert_refused(result, r"belongs to another config \(optimizer.b1: 0.9 -> 0.8\)")
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_changed_data_is_refused(whole_run, tmp_path):
    """Same config, but the prepared data behind it is not what the checkpoint was trained on."""
    other_data = tmp_path / "data"
    rows = dict(synthetic_data.GROUP_ROWS, descriptions=(64, 50, 10))
    synthetic_data.write_data(other_data, rows)
    config = tmp_path / "config.py"
    config.write_text(synthetic_data.config_text(other_data, **RUN))
    result = train(config, whole_run)
    assert_refused(result, "the data changed since the checkpoint .*descriptions/cc 9 rows")


def test_damaged_record_stops_the_run_with_its_name(tmp_path):
    data = synthetic_data.write_data(tmp_path / "data")
    shard = next(data.glob("tokens/*/shard-*.array_record"))
    content = bytearray(shard.read_bytes())
    content[2000:4000] = bytes(2000)  # the records start after a header of 64 bytes
    shard.write_bytes(content)
    config = tmp_path / "config.py"
    config.write_text(synthetic_data.config_text(data))
    assert_refused(train(config, tmp_path / "run"), re.escape(shard.name))
