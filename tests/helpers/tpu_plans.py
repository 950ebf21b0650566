"""Plans by the TPU compiler."""

import importlib.util
import json

import pytest

from helpers.forked import run_forked

tpu_aot = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="the TPU compiler is not installed: pip install -e .[plan]",
    ),
]


def plan(command, output):
    """(what it printed, the JSON) of launch/plan.py."""
    result = run_forked([*command, f"--output={output}"], timeout=800)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(output.read_text())
