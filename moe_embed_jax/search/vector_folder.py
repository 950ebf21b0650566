"""The files of kept vectors (see vectors.py): the array, the checksum of each chunk, JSON."""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import tensorstore as ts

from moe_embed_jax import storage
from moe_embed_jax.checksums import checksum
from moe_embed_jax.config import save_json
from moe_embed_jax.errors import UserError, first_line

CHUNKS = "chunks"
_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}]
_CHECKED = [*_CODECS, {"name": "crc32c"}]


def open_array(folder: Path, about: dict, rows: int, create: bool = False):
    """The array of `folder`, exactly as `about` says: a damaged zarr.json may say something else.
    Its chunks have `rows` rows.

    Raises `UserError` if it cannot be opened.
    """
    try:
        with storage.errors_of(folder):
            return _open_array(folder, about, rows, _CHECKED, create)
    except ValueError as error:
        with contextlib.suppress(ValueError):
            array = _open_array(folder, about, rows, _CODECS, create=False)
            print(
                f"warning: {folder} was written without checksums: damage would not be seen",
                file=sys.stderr,
                flush=True,
            )
            return array
        raise UserError(
            f"{folder / 'zarr.json'} is missing or damaged ({first_line(error)}): delete "
            f"{folder}, and repeat"
        ) from error


def _open_array(folder: Path, about: dict, rows: int, codecs: list[dict], create: bool):
    folder.mkdir(parents=True, exist_ok=True)
    shape = [about["texts"]["count"], about["width"]]
    return ts.open(
        {
            "driver": "zarr3",
            "kvstore": storage.kvstore(folder),
            "metadata": {"codecs": codecs, "chunk_key_encoding": {"name": "default"}},
        },
        create=create,
        open=True,  # what a killed call has made
        dtype=ts.dtype(about["dtype"]),
        shape=shape,
        fill_value=np.nan,  # a lost chunk must not read as zeros
        chunk_layout=ts.ChunkLayout(chunk_shape=[rows, shape[1]]),
    ).result()


def numpy_dtype(name: str):
    return ts.dtype(name).numpy_dtype


def chunk_file(folder: Path, number: int) -> Path:
    return folder / "c" / f"{number}" / "0"


def save_chunk_checksum(folder: Path, number: int) -> None:
    value = {"file": checksum(chunk_file(folder, number))}
    save_json(folder / CHUNKS / f"{number}.json", value)


def chunk_checksum(folder: Path, number: int) -> str:
    """What `checksums.checksum` said of the chunk's file when it was written."""
    name = f"{CHUNKS}/{number}.json"
    value = read_json(folder, name).get("file")
    if not (isinstance(value, str) and value.partition("-")[0].isdecimal()):
        raise damaged_file(folder, name, f"{value!r:.60} is no checksum")
    return value


def read_json(folder: Path, name: str) -> dict:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder / name} is missing: {folder} holds no vectors") from None
    except (IsADirectoryError, ValueError, RecursionError) as error:
        raise damaged_file(folder, name, first_line(error)) from None
    if not isinstance(content, dict):
        raise damaged_file(folder, name, "no JSON object")
    return content


def damaged_file(folder: Path, name: str, reason: str) -> UserError:
    return UserError(f"{folder / name} is damaged ({reason}): delete {folder}, and repeat")
