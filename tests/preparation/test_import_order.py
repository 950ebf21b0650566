"""TensorFlow and triton in one process: moe_embed_jax/triton_first.py."""

import ast
import importlib.util
import sys

import pytest
from conftest import ROOT, run_python

from moe_embed_jax import triton_first
from moe_embed_jax.errors import UserError

pytestmark = pytest.mark.frameworks
PACKAGE = ROOT / "moe_embed_jax"
BRING_TENSORFLOW = {"tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text"}
GUARD = "moe_embed_jax.triton_first"


def imports_in_order(path) -> list[str]:
    """Full names of what a module imports, also inside its functions, from top to bottom."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if hasattr(n, "lineno")]
    names = []
    for node in sorted(nodes, key=lambda node: node.lineno):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def brings_tensorflow(name: str) -> bool:
    return name.split(".")[0] in BRING_TENSORFLOW


MODULES = {
    path: names
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "launch").glob("*.py")])
    if any(map(brings_tensorflow, names := imports_in_order(path)))
}


def test_the_modules_that_import_tensorflow_import_triton_first():
    assert len(MODULES) >= 5
    for path, names in MODULES.items():
        assert GUARD in names, path
        first = next(i for i, name in enumerate(names) if brings_tensorflow(name))
        assert names.index(GUARD) < first, path


needs_triton = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="triton, which PyTorch for CUDA brings, is not"
)
# Ends the process where TensorFlow would be imported, and says whether triton is there.
STOPS = """
import os, sys

class Stop:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {bring_tensorflow}:
            print("triton" in sys.modules, flush=True)
            os._exit(0)

sys.meta_path.insert(0, Stop)
import {module}
"""


@needs_triton
@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_triton_is_there_when_tensorflow_is_imported(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    result = run_python(["-c", STOPS.format(bring_tensorflow=BRING_TENSORFLOW, module=module)])
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr


@needs_triton
def test_triton_can_be_imported_after_them():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    lines = [f"import {name}" for name in names]
    lines += ["import tensorflow, triton", "from triton._C import libtriton", "print('alive')"]
    result = run_python(["-c", "\n".join(lines)])
    assert result.returncode == 0 and result.stdout == "alive\n", result.stderr


def test_pytorch_is_refused_where_triton_would_crash(monkeypatch):
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "tensorflow", object())
    with pytest.raises(UserError, match="write `import triton` before"):
        triton_first.before_torch()


def test_without_triton_any_order_is_right(monkeypatch):
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "tensorflow", object())
    triton_first.before_torch()
    assert "triton" not in sys.modules
