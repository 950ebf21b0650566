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


@pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="triton, which PyTorch for CUDA brings, is not"
)
def test_triton_can_be_imported_after_each_of_them():
    """All modules in one process: once triton is there, later imports of TensorFlow are harmless.

    The first module is another one in each process.
    """
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    for first in names:
        lines = [f"import {name}" for name in (first, *names)]
        lines += ["import tensorflow, triton", "from triton._C import libtriton", "print('alive')"]
        result = run_python(["-c", "\n".join(lines)])
        assert result.returncode == 0 and result.stdout == "alive\n", (first, result.stderr)


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
