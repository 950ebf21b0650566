"""Launchers in this process, and the files that they leave."""

import importlib.util
import pathlib
import sys

from conftest import ROOT

from moe_embed_jax import launching


def launch(monkeypatch, name: str, *arguments) -> int:
    """Runs `launch/NAME.py ARGUMENTS`; returns its exit status."""
    path = ROOT / "launch" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"launch_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    return launching.run(module.main)


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    """Relative name -> content of every file."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
