"""A folder that keeps which command made it, of what: the same command finds its work done.

A command may be killed after its folder has appeared and before it ends; it can then be repeated
as it is.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.json_file import read_object

MADE_BY = "made_by.json"  # {"command": SHA-256}: it may be published, so it holds no paths


def hash_command(name: str, options: dict, inputs: Iterable[str | os.PathLike]) -> str:
    """SHA-256 that stands for a command and the state of what it reads.

    Args:
      options: what decides the result, as JSON has it.
      inputs: files and folders. One counts as changed when the name, the size or the time of
        change of one of its files differs. Who reads them says what is wrong with one.
    """
    states = [[str(path), _state(storage.path(path))] for path in inputs]
    return hashlib.sha256(json.dumps([name, options, states]).encode()).hexdigest()


def _state(path: pathlib.Path) -> list:
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    statuses = [(file, file.stat()) for file in sorted(files) if file.exists()]
    return [[str(file), status.st_size, status.st_mtime_ns] for file, status in statuses]


def keep_command(folder: pathlib.Path, command: str) -> None:
    """Writes `command`, of `hash_command`, into a folder that is not yet in its place."""
    (folder / MADE_BY).write_text(json.dumps({"command": command}) + "\n")


def done_before(target: str | os.PathLike, command: str | None = None) -> bool:
    """Whether `target` was made by `command`, of `hash_command`.

    Without `command`: whether some command made it, before any input is looked at.

    Raises:
      UserError: something else is at `target`.
    """
    target = storage.path(target)
    if not target.exists():
        return False
    made = (target / MADE_BY).is_file()
    if made and command in (None, read_object(target / MADE_BY).get("command")):
        return True
    why = ", made by another command or of other inputs" if made else ""
    raise UserError(f"{target} exists already{why}: name a new folder, nothing is overwritten")
