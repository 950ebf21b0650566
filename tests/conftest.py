import os
import pathlib
import subprocess
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # before anything imports jax

import pytest
import synthetic_data

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> pathlib.Path:
    """Prepared synthetic data, see synthetic_data.py."""
    return synthetic_data.write_data(tmp_path_factory.mktemp("data"))


def python_environment(devices: int, **environment) -> dict[str, str]:
    return {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        **environment,
    }


def run_python(arguments, devices: int = 1, timeout: float = 600, **environment):
    """Runs `python ARGUMENTS` in the repository on `devices` fake CPU devices."""
    env = python_environment(devices, **environment)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=env, timeout=timeout, capture_output=True, text=True, check=False
    )
