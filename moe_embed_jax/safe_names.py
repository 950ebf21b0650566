"""Names that come from data and become file names: they stay inside their folder."""

import re
from pathlib import Path

from moe_embed_jax.errors import UserError

MOST_CHARACTERS = 120  # of a name; file systems take 255 bytes
_UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f\ud800-\udfff]")


def check_name(name: object, where: str) -> str:
    """Returns a name that a file may have; `where` (file, line, key) starts the error.

    Raises `UserError`: no text, empty, one of `/`, `\\`, control characters and halves of surrogate
    pairs in it, a point at its start, or too long.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"{where} must be a name, got {name!r:.60}")
    if _UNSAFE.search(name) or name.startswith(".") or len(name) > MOST_CHARACTERS:
        raise UserError(
            f"{where} is {name!r:.60}: a name that becomes a file's has no /, \\ or control "
            f"character, starts with no point and has {MOST_CHARACTERS} characters at most"
        )
    return name


def path_inside(folder: Path, name: object, where: str) -> Path:
    """folder/name, of which no part leads elsewhere; `where` starts the error.

    Raises `UserError` for a name that `check_name` refuses, and for a symbolic link out of the
    folder.
    """
    path = folder / check_name(name, where)
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{where}: {path} is a symbolic link out of its folder: put the file there")
    return path
