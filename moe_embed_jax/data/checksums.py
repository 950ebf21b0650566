"""checksums.json of a folder of texts, {file: SHA-256}: a change is found when it is read."""

from pathlib import Path

from moe_embed_jax import json_file
from moe_embed_jax.config import save_json
from moe_embed_jax.data.hashes import file_hash
from moe_embed_jax.data.safe_names import check_name
from moe_embed_jax.errors import UserError

FILE = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Of every file that is in `folder` now, folders in it included."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    save_json(folder / FILE, {p.relative_to(folder).as_posix(): file_hash(p) for p in paths})


def verify_checksums(folder: Path) -> None:
    """Reads every file that checksums.json names; without one nothing is known, and nothing said.

    Raises `UserError` that names a file which is missing or was changed.
    """
    for name, expected in json_file.read_optional(folder / FILE).items():
        for part in name.split("/"):
            check_name(part, f"{folder / FILE}: a part of {name!r:.60}")
        path = folder / name
        if not path.is_file() or file_hash(path) != expected:
            fault = "was changed" if path.is_file() else "is missing"
            raise UserError(
                f"{path} {fault} since {folder / FILE} was written: prepare the data again, or "
                f"delete {FILE} if you meant to change it"
            )
