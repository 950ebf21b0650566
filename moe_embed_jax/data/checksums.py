"""checksums.json of a folder of texts: a change is found when they are read."""

from pathlib import Path

from moe_embed_jax.checksums import FILE_NAME, checksums, dump, find_damage, parse
from moe_embed_jax.errors import UserError
from moe_embed_jax.safe_names import check_name


def write_checksums(folder: Path) -> None:
    """Of every file that is in `folder` now, folders in it included."""
    (folder / FILE_NAME).unlink(missing_ok=True)
    values = checksums(folder, ["."])
    (folder / FILE_NAME).write_text(dump(values) + "\n", encoding="utf-8")


def verify_checksums(folder: Path) -> None:
    """Reads every file that checksums.json names; without one nothing is known, and nothing said.

    Raises `UserError` that names a file which is missing or was changed.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): prepare the data again") from None
    for name in values:
        for part in name.split("/"):
            check_name(part, f"{path}: a part of {name!r:.60}")
    if damage := find_damage(folder, values):
        raise UserError(
            f"{damage}: prepare the data again, or delete {path} if you meant to change it"
        )
