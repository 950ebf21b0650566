"""A folder that keeps which command made it, of what: the same command finds its work done.

A command may be killed after its folder has appeared and before it ends; it can then be repeated
as it is.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable

from moe_embed_jax import checksums, storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.json_file import read_object

# {"command": SHA-256, "files": {name: checksum}, "crc32": of these}. It may be published, so it
# holds no paths of a machine. Folders of earlier versions have the command alone.
MADE_BY = "made_by.json"
CARD = "README.md"  # people edit it, and launch/verify_export.py does


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
    """Writes `command`, of `hash_command`, into a complete folder that is not yet in its place."""
    files = checksums.checksums(folder, ["."])
    files.pop(CARD, None)
    content = {"command": command, **json.loads(checksums.dump(files))}
    (folder / MADE_BY).write_text(json.dumps(content) + "\n")


def done_before(target: str | os.PathLike, command: str | None = None) -> bool:
    """Whether `target` was made by `command`, of `hash_command`. Its files are read for it.

    Without `command`: whether some command made it, before any input is looked at.

    Raises:
      UserError: something else is at `target`, or one of its files is damaged.
    """
    target = storage.path(target)
    if not target.exists():
        return False
    made = (target / MADE_BY).is_file()
    found = read_object(target / MADE_BY) if made else {}
    if made and command is None:
        return True
    if made and command == found.get("command"):
        if damage := checksums.find_damage(target, _files(found, target)):
            raise UserError(
                f"{target} is what this command made, but {damage}: remove it, and repeat the "
                "command"
            )
        return True
    why = ", made by another command or of other inputs" if made else ""
    raise UserError(f"{target} exists already{why}: name a new folder, nothing is overwritten")


def _files(found: dict, target: pathlib.Path) -> dict[str, str]:
    if "files" not in found:
        return {}
    try:
        return checksums.parse(json.dumps(found))
    except ValueError as error:
        raise UserError(
            f"{target / MADE_BY} was changed ({error}): remove {target}, and repeat the command"
        ) from None
