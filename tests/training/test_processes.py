"""Two processes of four devices = one of eight; a run stopped on one form continues on any other.

The runs share a compilation cache and are compared with one uninterrupted run on eight devices.
"""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, metric, run_python
from helpers import synthetic_data
from helpers.forked import run_forked
from helpers.two_processes import Together

from moe_embed_jax import Embedder, distributed
from moe_embed_jax.evaluation.heldout import evaluate_heldout, load_heldout

STEPS = 12
SAVED = 4  # the step that the moved runs continue from


@pytest.fixture(scope="module")
def config(data_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.py"
    top = dict(steps=STEPS, eval_every=0, checkpoint_every=SAVED, keep_checkpoints=3)
    top["data"] = synthetic_data.ONE_ROW_COUNT
    path.write_text(synthetic_data.config_text(data_dir, **top))
    return path


def command(config, workdir, *flags):
    return ["launch/train.py", f"--config={config}", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def whole_run(config, tmp_path_factory):
    """On eight devices of one process."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    result = run_python(command(config, workdir), devices=8)
    assert result.returncode == 0, result.stderr
    return workdir


def assert_same_numbers(workdir, whole_run):
    """The expert loads tell a router tie, which is no fault (see synthetic_data), from a fault."""
    np.testing.assert_array_equal(metric(workdir, "group"), metric(whole_run, "group"))
    np.testing.assert_array_equal(metric(workdir, "tokens"), metric(whole_run, "tokens"))
    loads = [metric(path, "expert_load") for path in (workdir, whole_run)]
    np.testing.assert_allclose(*loads, atol=1e-6, err_msg="a router tie, see config_text's seed")
    for name in ("loss", "contrastive_loss", "balance"):
        np.testing.assert_allclose(
            metric(workdir, name), metric(whole_run, name), atol=1e-5, rtol=0, err_msg=name
        )


def stopped_run(whole_run, workdir):
    """A copy of the whole run as it was when step SAVED was its newest checkpoint."""
    shutil.copytree(whole_run, workdir)
    for folder in (workdir / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > SAVED:
            shutil.rmtree(folder)
    (workdir / "results.json").unlink()


def test_each_process_reads_its_slice(tmp_path):
    """On a mesh in whose order the processes alternate: what they read, and what it adds up to."""
    arguments = ["tests/training/one_of_several.py", tmp_path]
    together = Together(arguments, tmp_path)
    together.wait()
    records = [json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2)]
    alone = tmp_path / "alone"
    alone.mkdir()
    result = run_forked(["tests/training/one_of_several.py", alone], devices=8)
    assert result.returncode == 0, result.stderr

    assert [len(record["prepared"]) for record in records] == [1, 0]
    refused = "process 0 failed here (failure); its message says why"
    assert [record["refused"] for record in records] == [
        [
            "no, says process 0",
            "7",
            "130",
            "another process failed to search; its message says why",
        ],
        [refused, "7", "KeyboardInterrupt", "document 300 holds a value that is not finite"],
    ]
    assert "process 1 was stopped here (Ctrl-C)" in together.output("err0")
    assert "[process 1] process 0 was stopped here (signal)" in together.output("err1")
    assert all(record["true_anywhere"] == [False, True] for record in records)
    assert all(record["kept"] for record in records)
    # One read per step and device: pairs of the even devices of the mesh, and of the odd ones.
    for index, record in enumerate(records):
        read = np.array(record["rows_read"]).reshape(len(record["rows"]), 4, -1)
        rows = np.array(record["rows"]).reshape(len(record["rows"]), 8, -1)
        np.testing.assert_array_equal(read, rows[:, index::2])
    expected = np.load(alone / "0.npz")
    for index in range(2):
        arrays = np.load(tmp_path / f"{index}.npz")
        assert set(arrays) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(arrays[name], expected[name], err_msg=name)

    assert "printed by process 0" in together.output("out0")
    assert together.output("out1") == ""
    assert "warning\n" in together.output("err0").splitlines(keepends=True)
    assert "[process 1] warning" in together.output("err1").splitlines()


FAILS_ALONE = """
import sys, jax
from moe_embed_jax import distributed, launching, processes
from moe_embed_jax.errors import UserError

def main():
    distributed.start()
    if jax.process_index() == int(sys.argv[1]):
        raise {"mistake": UserError, "fault": RuntimeError}[sys.argv[2]]("it fails alone")
    processes.wait_for_all("a place that one of them never reaches")

distributed.EXIT_WAIT = 2
sys.exit(launching.run(main))
"""


IS_INTERRUPTED = """
import signal, sys, threading, jax
from moe_embed_jax import distributed, launching, processes

def main():
    distributed.start()
    if jax.process_index() == int(sys.argv[1]):
        threading.Event().wait(3)
        signal.raise_signal(signal.SIGINT)
    threading.Timer(3, signal.raise_signal, [signal.SIGINT]).start()
    processes.from_process_0(jax.numpy.ones(3))

distributed.INTERRUPT_WAIT = 2
sys.exit(launching.run(main))
"""


@pytest.mark.parametrize("outside", [0, 1])
def test_ctrl_c_ends_processes_that_wait_for_each_other(tmp_path, outside):
    """One is interrupted in Python, the other one inside jax, where it waits for the first."""
    together = Together(["-c", IS_INTERRUPTED, outside], tmp_path)
    assert together.statuses(60) == [130, 130]
    line = "interrupted: the same command starts again, or continues"
    errors = [together.output(f"err{index}").splitlines() for index in range(2)]
    assert [[text for text in lines if "Gloo" not in text] for lines in errors] == [
        [line],
        [f"[process 1] {line}"],
    ]


@pytest.mark.parametrize(
    ("failing", "kind", "line"),
    [
        (0, "mistake", "error: it fails alone"),
        (1, "fault", "[process 1] RuntimeError: it fails alone"),
    ],
)
def test_a_process_that_fails_alone_ends_all_with_status_134(tmp_path, failing, kind, line):
    """As docs/tpu_pods.md says: after EXIT_WAIT, not after the 100 seconds of a lost heartbeat."""
    together = Together(["-c", FAILS_ALONE, failing, kind], tmp_path)
    start = time.monotonic()
    statuses = together.statuses(80)
    assert [128 - status if status < 0 else status for status in statuses] == [134, 134]
    assert time.monotonic() - start > 2
    assert line in together.output(f"err{failing}").splitlines()
    manual = " ".join((ROOT / "docs" / "tpu_pods.md").read_text().split())
    assert f"prints it, waits {distributed.EXIT_WAIT} seconds for the others" in manual


@pytest.mark.slow
def test_two_processes_equal_one(config, data_dir, whole_run, tmp_path):
    workdir = tmp_path / "run"
    together = Together(command(config, workdir), tmp_path)
    together.wait()
    assert "on 8 cpu device(s), 2 process(es)" in together.output("out0")
    assert together.output("out1") == ""
    assert "step 0" in together.output("err0") and "step 0" not in together.output("err1")
    assert len(metric(workdir, "loss")) == STEPS
    assert_same_numbers(workdir, whole_run)
    of_two, of_one = Embedder.load(workdir), Embedder.load(whole_run)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), of_two.params, of_one.params
    )
    # Ranks may differ by rounding from those of the whole run, but not from what this model gives.
    expected = evaluate_heldout(of_two, load_heldout(data_dir))
    found = json.loads((workdir / "results.json").read_text())["trained"]
    assert found.keys() == expected.keys()
    for name, metrics in expected.items():
        assert found[name] == pytest.approx(metrics, abs=1e-6), name


@pytest.mark.slow
def test_processes_stop_together_and_continue_as_one(config, whole_run, tmp_path):
    """Two processes continue a run of one; SIGTERM to one of them stops both; one continues it."""
    workdir = tmp_path / "run"
    stopped_run(whole_run, workdir)
    together = Together(command(config, workdir), tmp_path)
    deadline = time.monotonic() + 300
    while "resuming" not in together.output("out0"):
        assert together.members[0].poll() is None, together.output("err0")
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(together.members[1].pid, signal.SIGTERM)
    together.wait()
    # log_every is 3: the first step at which the processes agree on it.
    assert "stopped by SIGTERM after step 6" in together.output("err0")
    assert (workdir / "checkpoints" / "6").is_dir()
    assert len(metric(workdir, "loss")) == 6
    result = run_forked(command(config, workdir), devices=8)
    assert result.returncode == 0, result.stderr
    assert "after step 6" in result.stdout
    assert_same_numbers(workdir, whole_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "mesh"),
    [(4, (4, 1, 1, 1)), (1, (1, 1, 1, 1)), (8, (1, 2, 2, 2))],
    ids=["4 devices", "1 device", "2 slices of 2x2 devices"],
)
def test_run_moves_to_other_devices(config, whole_run, tmp_path, devices, mesh):
    workdir = tmp_path / "run"
    stopped_run(whole_run, workdir)
    axes = zip(("data", "fsdp", "expert", "slice"), mesh, strict=True)
    flags = [f"--config.mesh.{axis}={size}" for axis, size in axes]
    result = run_forked(command(config, workdir, *flags), devices=devices)
    assert result.returncode == 0, result.stderr
    assert f"after step {SAVED}" in result.stdout
    assert len(metric(workdir, "loss")) == STEPS
    assert_same_numbers(workdir, whole_run)
