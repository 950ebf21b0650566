"""The run of the suite itself: suite_files.py and the flags of the Makefile."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
import suite_files
from conftest import ROOT

DIES = """
import os, signal
import pytest
{at_collection}
def test_dies():
    os.kill(os.getpid(), signal.SIGSEGV)
"""
LIVES = """
import time
def test_lives():
    time.sleep(0.3)
"""


def run_suite(folder, *flags):
    """Runs the tests of a folder by the flags of the Makefile, with this suite's plug-in."""
    makefile = (ROOT / "Makefile").read_text()
    own = re.search(r"^PYTEST_FLAGS \?= (.+)$", makefile, re.MULTILINE).group(1).split()
    command = [sys.executable, "-m", "pytest", "-p", "suite_files", *own, *flags]
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("moment", ["collection", "run"])
def test_a_worker_that_dies_ends_the_run_with_its_file_named(tmp_path, moment):
    kill = "os.kill(os.getpid(), signal.SIGSEGV)" if moment == "collection" else ""
    (tmp_path / "test_a.py").write_text(DIES.format(at_collection=kill))
    (tmp_path / "test_b.py").write_text(LIVES)
    result = run_suite(tmp_path)
    assert result.returncode != 0
    where = "test_a.py" + ("" if moment == "collection" else "::test_dies")
    assert re.search(rf"^worker gw\d died in {where}$", result.stdout, re.MULTILINE), result.stdout
    assert "restarting disabled" in result.stdout


def test_a_test_that_waits_for_ever_ends_the_run_with_its_name(tmp_path):
    (tmp_path / "test_a.py").write_text("def test_waits():\n    __import__('time').sleep(600)")
    (tmp_path / "test_b.py").write_text(LIVES)
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert own["faulthandler_timeout"] < own["timeout"] == 900
    flags = ["--timeout=2", f"--timeout-method={own['timeout_method']}"]
    result = run_suite(tmp_path, *flags, "-o", "faulthandler_timeout=1")
    assert result.returncode != 0
    assert re.search(r"^worker gw\d died in test_a.py::test_waits$", result.stdout, re.MULTILINE)
    assert "in test_waits" in result.stderr  # where it waited


def test_slowest_files_are_printed_and_written(tmp_path, monkeypatch):
    (tmp_path / "test_a.py").write_text("def test_quick(): pass")
    (tmp_path / "test_b.py").write_text(LIVES)
    (tmp_path / "suite_files.py").write_text((ROOT / "tests" / "suite_files.py").read_text())
    command = [sys.executable, "-m", "pytest", "-p", "suite_files", "--write-file-seconds"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout
    listed = re.findall(r"([\d.]+) s  (test_.\.py)", result.stdout)
    assert [name for _, name in listed] == ["test_b.py", "test_a.py"]
    assert float(listed[0][0]) >= 0.3
    written = json.loads((tmp_path / "file_seconds.json").read_text())
    assert set(written) == {"test_a.py", "test_b.py"} and written["test_b.py"] >= 0.3


class Item:
    def __init__(self, path, text=""):
        path.write_text(text)
        self.path = path
        self.markers = []

    def add_marker(self, name):
        self.markers.append(name)


def test_slow_files_start_first_and_unknown_ones_before_all(monkeypatch, tmp_path):
    monkeypatch.setattr(suite_files, "SECONDS", tmp_path / "seconds.json")
    suite_files.SECONDS.write_text('{"test_a.py": 1, "test_b.py": 9, "test_c.py": 3}')
    items = [
        Item(tmp_path / name) for name in ("test_a.py", "test_b.py", "test_new.py", "test_c.py")
    ]
    suite_files.pytest_collection_modifyitems(items)
    order = [item.path.name for item in items]
    assert order == ["test_new.py", "test_b.py", "test_c.py", "test_a.py"]


def test_files_that_import_pytorch_or_tensorflow_are_marked(tmp_path):
    texts = [
        "import torch",
        "def f():\n    from transformers import AutoModel",
        'torch = pytest.importorskip("torch")',
        "import tensorflow as tf",
        "from seqio import Vocabulary",
        'def f():\n    skip_without("sentence_transformers", "faiss")',
        'skip_without("faiss")',
        "import torchless",
        "# import torch",
        "import jax",
    ]
    items = [Item(tmp_path / f"test_{i}.py", text) for i, text in enumerate(texts)]
    suite_files.pytest_collection_modifyitems(items)
    marked = {item.path.name for item in items if item.markers == ["frameworks"]}
    assert marked == {f"test_{i}.py" for i in range(6)}
