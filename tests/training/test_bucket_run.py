"""launch/train.py with data and work directory in a bucket."""

import json
import signal
import time

import pytest
from conftest import run_python
from helpers import synthetic_data
from helpers.forked import Forked, run_forked, start_forked

from moe_embed_jax import storage

RUN = dict(steps=24, eval_every=12, data=synthetic_data.ONE_ROW_COUNT)
FLAGS = ["--config.checkpoint_every=4", "--config.log_every=1"]


@pytest.fixture
def config(data_dir, bucket, tmp_path):
    """Of data in the bucket."""
    for file in data_dir.rglob("*"):
        if file.is_file():
            storage.copy(file, bucket / "data" / file.relative_to(data_dir).as_posix())
    path = tmp_path / "config.py"
    path.write_text(synthetic_data.config_text(bucket / "data", **RUN))
    return path


def command(config, workdir):
    return ["launch/train.py", f"--config={config}", f"--workdir={workdir}", *FLAGS]


def start(config, workdir, steps: int) -> Forked:
    """A run that has made so many steps, those of earlier runs included."""
    process = start_forked(command(config, workdir))
    deadline = time.monotonic() + 300
    while (storage.read_appended(workdir / "metrics.jsonl") or b"").count(b"\n") < steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def checkpoints(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def finished_checkpoints(workdir) -> list[int]:
    """Those that Orbax has finished; of others there may be files."""
    finished = (workdir / "checkpoints").glob("*/commit_success.txt")
    return [int(path.parent.name) for path in finished]


def test_stopped_killed_damaged_and_cut_off_it_has_the_records_of_a_local_run(
    config, data_dir, bucket, cloud_server, tmp_path
):
    local, workdir = tmp_path / "run", bucket / "run"
    local_config = tmp_path / "local.py"
    local_config.write_text(synthetic_data.config_text(data_dir, **RUN))
    result = run_python(command(local_config, local))
    assert result.returncode == 0, result.stderr

    process = start(config, workdir, steps=5)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM after step" in process.communicate(timeout=120)[1]
    assert process.returncode == 0

    process = start(config, workdir, steps=14)
    process.kill()
    process.communicate()
    damaged = max(finished_checkpoints(workdir))  # a save may have been cut off
    file = next(p for p in (workdir / "checkpoints" / str(damaged)).rglob("*") if "/d/" in str(p))
    file.write_bytes(file.read_bytes()[:-1] + b"?")

    process = start(config, workdir, steps=18)
    assert (workdir.parent / "run" / "checkpoints_set_aside" / str(damaged)).is_dir()
    cloud_server.stop()
    try:
        error = process.communicate(timeout=200)[1]
    finally:
        cloud_server.start()
    assert process.returncode == 2
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"error: {bucket}")
    assert "Cloud Storage cannot be reached" in error.splitlines()[-1]
    before = max(finished_checkpoints(workdir))

    # A kill in the middle of a removal leaves some files, without the one that was written last.
    storage.write(workdir / "checkpoints" / "2" / "params" / "manifest.ocdbt", b"")

    # Data from a copy are the same.
    result = run_forked([*command(config, workdir), f"--config.data.cache_dir={tmp_path / 'disk'}"])
    assert result.returncode == 0, result.stderr
    assert "copy data: 100%" in result.stderr
    assert f"resuming    {workdir} after step {before}" in result.stdout
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert storage.read_appended(workdir / name) == (local / name).read_bytes(), name
    results = [json.loads((folder / "results.json").read_text()) for folder in (workdir, local)]
    assert results[0] == results[1]
    assert checkpoints(workdir) == checkpoints(local)
    assert (workdir / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert list((workdir / "tensorboard").iterdir())


def test_a_bucket_that_does_not_exist(config):
    result = run_forked(command(config, "gs://no-such-bucket/run"))
    assert result.returncode == 2
    line = "error: gs://no-such-bucket/run: there is no such bucket: create it, or correct its name"
    assert result.stderr.splitlines()[-1] == line
