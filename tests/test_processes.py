"""Two processes of four devices = one of eight; a run stopped on one form continues on any other.

The runs share a compilation cache and are compared with one uninterrupted run on eight devices.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import synthetic_data
from conftest import ROOT, metric, python_environment, run_python

STEPS = 12
SAVED = 4  # the step that the moved runs continue from


@pytest.fixture(scope="module")
def config(data_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.py"
    top = dict(steps=STEPS, eval_every=0, checkpoint_every=SAVED, keep_checkpoints=3)
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


class Together:
    """Two processes of one run, four devices each, with their output in files."""

    def __init__(self, arguments, folder, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.folder = folder
        self.members = []
        for index in range(2):
            variables = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            }
            with (folder / f"out{index}").open("w") as out, (folder / f"err{index}").open("w") as e:
                member = subprocess.Popen(
                    [sys.executable, *map(str, arguments)],
                    cwd=ROOT,
                    env=python_environment(4, **variables, **environment),
                    stdout=out,
                    stderr=e,
                )
            self.members.append(member)

    def output(self, name: str) -> str:
        return (self.folder / name).read_text()

    def wait(self, seconds: float = 600) -> None:
        """Until both have ended, with status 0."""
        try:
            for index, member in enumerate(self.members):
                assert member.wait(seconds) == 0, self.output(f"err{index}")
        finally:
            for member in self.members:
                member.kill()


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
    arguments = ["tests/one_of_several.py", tmp_path]
    together = Together(arguments, tmp_path)
    together.wait()
    records = [json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2)]
    alone = tmp_path / "alone"
    alone.mkdir()
    result = run_python(["tests/one_of_several.py", alone], devices=8)
    assert result.returncode == 0, result.stderr

    assert [len(record["prepared"]) for record in records] == [1, 0]
    assert [record["refused"][-1] for record in records] == ["0", "1"]
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


@pytest.mark.slow
def test_two_processes_equal_one(config, whole_run, tmp_path):
    workdir = tmp_path / "run"
    together = Together(command(config, workdir), tmp_path)
    together.wait()
    assert "on 8 cpu device(s), 2 process(es)" in together.output("out0")
    assert together.output("out1") == ""
    assert "step 0" in together.output("err0") and "step 0" not in together.output("err1")
    assert len(metric(workdir, "loss")) == STEPS
    assert_same_numbers(workdir, whole_run)
    results = [json.loads((path / "results.json").read_text()) for path in (workdir, whole_run)]
    for name, metrics in results[1]["trained"].items():
        assert results[0]["trained"][name] == pytest.approx(metrics, abs=0.02)


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
    result = run_python(command(config, workdir), devices=8)
    assert result.returncode == 0, result.stderr
    assert "after step 6" in result.stdout
    assert_same_numbers(workdir, whole_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "mesh"),
    [(4, (4, 1, 1)), (1, (1, 1, 1)), (8, (2, 2, 2))],
    ids=["4 devices", "1 device", "2x2x2 devices"],
)
def test_run_moves_to_other_devices(config, whole_run, tmp_path, devices, mesh):
    workdir = tmp_path / "run"
    stopped_run(whole_run, workdir)
    axes = zip(("data", "fsdp", "expert"), mesh, strict=True)
    flags = [f"--config.mesh.{axis}={size}" for axis, size in axes]
    result = run_python(command(config, workdir, *flags), devices=devices)
    assert result.returncode == 0, result.stderr
    assert f"after step {SAVED}" in result.stdout
    assert len(metric(workdir, "loss")) == STEPS
    assert_same_numbers(workdir, whole_run)
