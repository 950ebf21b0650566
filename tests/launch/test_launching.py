"""The scripts that start a run on TPU machines, and the line that a launcher ends with where
something is refused or Ctrl-C comes."""

import errno
import gc
import os
import pathlib
import re
import resource
import subprocess

import numpy as np
import pytest
import safetensors.numpy
import yaml
from conftest import ROOT

from moe_embed_jax import launching


def tpu_vm(*arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    return subprocess.run(
        [ROOT / "launch" / "tpu_vm.sh", *arguments],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_tpu_vm_run_is_the_same_for_a_vm_and_a_slice():
    command = ("python", "launch/train.py", "--config=configs/quickstart.py:smoke", "--workdir=a b")
    result = tpu_vm("run", "--name=vm", "--zone=z", "--dry_run", "--", *command)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "+ gcloud compute tpus tpu-vm ssh vm --zone=z --worker=all '--command=cd moe_embed_jax && "
        "source .venv/bin/activate && echo $$ > run.pid && exec python launch/train.py "
        "--config=configs/quickstart.py:smoke --workdir=a\\ b'\n"
    )
    variables = {"TPU_NAME": "slice", "TPU_ZONE": "y", "TPU_PROJECT": "p", "TPU_DIR": "d"}
    of_slice = tpu_vm("run", "--dry_run", "--", *command, **variables)
    expected = result.stdout.replace("vm --zone=z", "slice --zone=y --project=p")
    assert of_slice.stdout == expected.replace("cd moe_embed_jax", "cd d")


def test_tpu_vm_install_and_stop():
    flags = ("--name=slice", "--zone=z", "--python=python3.11", "--dry_run")
    lines = tpu_vm("install", *flags).stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["git", "gcloud", "rm", "gcloud"]
    assert lines[1].endswith("scp source.tar.gz slice:moe_embed_jax.tar.gz --zone=z --worker=all")
    assert "python3.11 -m venv .venv" in lines[3] and "--editable .[tpu,gcs]" in lines[3]
    assert "kill -TERM $(cat run.pid)" in tpu_vm("stop", *flags).stdout


@pytest.mark.parametrize("action", ["install", "run", "stop"])
def test_tpu_vm_reaches_every_worker_of_every_slice(action):
    command = ["--", "python", "x.py"] if action == "run" else []
    flags = (action, "--name=n", "--zone=z", "--dry_run")
    of_one = tpu_vm(*flags, *command).stdout
    for of_several in (
        tpu_vm(*flags, "--slices", *command).stdout,
        tpu_vm(*flags, *command, TPU_SLICES="1").stdout,
    ):
        assert of_several.count("gcloud compute tpus queued-resources s") >= 1
        assert of_several == of_one.replace("tpu-vm", "queued-resources").replace(
            "--worker=all", "--node=all --worker=all"
        )


@pytest.mark.parametrize("action", ["install", "run", "stop"])
def test_tpu_vm_lines_for_the_workers_are_shell(action):
    command = ["--", "python", "x.py"] if action == "run" else []
    output = tpu_vm(action, "--name=n", "--zone=z", "--dry_run", *command).stdout
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {output.splitlines()[-1][2:]}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    line = words.split("--command=", 1)[1]
    subprocess.run(["bash", "-n", "-c", line], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to do: install, run or stop"),
        (["fly"], "unknown action fly; choose install, run or stop"),
        (["run", "--zone=z", "--", "ls"], r"--name \(or TPU_NAME\) is missing"),
        (["run", "--name=n", "--", "ls"], r"--zone \(or TPU_ZONE\) is missing"),
        (["run", "--name=n", "--zone=z"], "run needs a command"),
        (["stop", "--name=n", "--zone=z", "--", "ls"], "stop takes no command, but there is: ls"),
        (["run", "--name=n", "--zone=z", "--wrker=all"], "unknown argument --wrker=all"),
        (["install", "--name=n", "--zone=z", "--dir=a b"], "--dir=a b: use letters, digits"),
    ],
)
def test_tpu_vm_refuses_in_one_line(arguments, message):
    result = tpu_vm(*arguments)
    assert result.returncode == 2 and not result.stdout
    assert re.fullmatch(f"error: {message}.*\n", result.stderr), result.stderr


def gke_job(name: str) -> dict:
    """The job of one slice in a file of launch/."""
    *_, job = yaml.safe_load_all((ROOT / "launch" / name).read_text())
    if job["kind"] == "Job":
        return job
    assert job["kind"] == "JobSet"
    (replicated,) = job["spec"]["replicatedJobs"]
    assert replicated["replicas"] > 1
    # A slice is a node pool, and no pod starts again without the others.
    assert list(job["metadata"]["annotations"].values()) == ["cloud.google.com/gke-nodepool"]
    assert replicated["template"]["spec"]["backoffLimit"] == 0
    assert job["spec"]["failurePolicy"]["maxRestarts"] > 0
    return replicated["template"]


@pytest.mark.parametrize("name", ["gke_job.yaml", "gke_slices.yaml"])
def test_gke_job_fits_its_slice(name):
    job = gke_job(name)
    workers, pod = job["spec"]["completions"], job["spec"]["template"]["spec"]
    assert workers == job["spec"]["parallelism"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert workers * chips == int(rows) * int(columns)
    subprocess.run(["bash", "-n", "-c", pod["containers"][0]["args"][0]], check=True)


def test_one_slice_and_several_run_the_same():
    of_one, of_several = (
        gke_job(name)["spec"]["template"]["spec"] for name in ("gke_job.yaml", "gke_slices.yaml")
    )
    del of_one["subdomain"]  # a JobSet makes its own
    for pod in (of_one, of_several):
        ports = {port["containerPort"] for port in pod["containers"][0].pop("ports")}
        assert {8471, 8482} <= ports
    assert of_one == of_several


# ---- How launchers end ---------------------------------------------------------------------------


def refused(capfd, main) -> str:
    """The line of a launcher that ends with status 2."""
    assert launching.run(main) == 2
    out, line = capfd.readouterr()
    assert not out and line.startswith("error: ") and line.count("\n") == 1
    return line.removeprefix("error: ").rstrip()


def written_beyond_the_limit(path, write):
    """`write(path)` where no file may have more than 1,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("x" * 5000),
        lambda path: np.save(path, np.zeros(5000)),
        lambda path: safetensors.numpy.save_file({"x": np.zeros(5000)}, path),
    ],
    ids=["text", "numpy", "safetensors"],
)
def test_a_file_that_cannot_grow_is_one_line(capfd, tmp_path, write):
    path = tmp_path / "file.npy"
    line = refused(capfd, lambda: written_beyond_the_limit(path, write))
    assert line.startswith(f"{path}: ") and line.endswith(", then repeat the command")


def test_a_full_device_is_one_line(capfd):
    line = refused(capfd, lambda: pathlib.Path("/dev/full").write_text("x"))
    room = "there is no room left on this disk: make room, then repeat the command"
    assert line == f"/dev/full: {room}"


def refuse_wrapped(cause):
    try:
        raise cause
    except OSError as error:
        raise ValueError("it could not be saved") from error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "x", "a/b"), "a/b: there is no room left on this disk"),
        (OSError(errno.EDQUOT, "x", "a/b"), "a/b: the disk quota is used up"),
        (OSError(errno.EROFS, "x", "a/b"), "a/b: this file system is read-only"),
        (OSError(errno.EIO, "x", "a/b"), "a/b: reading or writing failed"),
        (PermissionError(errno.EACCES, "x", "a/b"), "a/b: permission denied: change"),
        (FileExistsError(errno.EEXIST, "x", "a/b"), "a/b: this exists already"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), "a/b: No such file"),
        (
            ValueError('RESOURCE_EXHAUSTED: "/a/b/c.1": [OS error 28: No space left on device]'),
            "/a/b/c.1: there is no room left on this disk",
        ),
        (
            ExceptionGroup("several", [ValueError("x"), OSError(errno.ENOSPC, "x", "a/b")]),
            "a/b: there is no room left on this disk",
        ),
    ],
)
def test_what_the_system_refuses_is_one_line(capfd, error, line):
    def main():
        raise error

    assert refused(capfd, main).startswith(line)
    if isinstance(error, OSError) and "disk" in line:
        assert refused(capfd, lambda: refuse_wrapped(error)).startswith(line)


def test_defects_keep_their_trace():
    """Also where something was refused, and handled, on the way."""

    def main():
        try:
            raise FileNotFoundError(errno.ENOENT, "No such file", "a/b")
        except OSError:
            {}["missing"]

    with pytest.raises(KeyError):
        launching.run(main)


def test_garbage_is_looked_for_seldom_in_a_launcher(monkeypatch):
    """A hundred times less often than Python does by itself: imports make objects that stay."""
    set_to = []
    monkeypatch.setattr(gc, "set_threshold", lambda *numbers: set_to.append(numbers))
    assert launching.run(lambda: None) == 0
    assert set_to and set_to[0][0] >= 100_000
