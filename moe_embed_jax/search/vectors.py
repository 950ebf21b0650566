"""Vectors on disk: an array [N, D] in TensorStore (zarr3), and what was embedded with what.

    zarr.json, c/    the array, in chunks of CHUNK rows, each with its CRC-32C
    about.json       texts (count and SHA-256), encoder (whatever identifies it), width, dtype
    progress.json    rows that are complete

`write_vectors` continues where a killed one stopped. Vectors of other texts or of another encoder
are never taken for these.
"""

import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts
from tqdm import tqdm

from moe_embed_jax.config import differences, save_json
from moe_embed_jax.errors import UserError, first_line
from moe_embed_jax.processes import process_0_first, wait_for_all
from moe_embed_jax.search import check_dtype

Encode = Callable[[list[str]], np.ndarray]  # n texts -> float [n, D]

FORMAT = 1
CHUNK = 8192  # rows of a chunk: written at once, lost at most by a kill
ABOUT, PROGRESS = "about.json", "progress.json"
_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}]
_CHECKED = [*_CODECS, {"name": "crc32c"}]


class VectorStore:
    """Complete vectors, read by slices: `store[10:20]` is [10, D] in the stored dtype.

    Attributes:
      folder: where they lie.
      about: the content of about.json.
      shape: (N, D).
      dtype: NumPy's; bfloat16 is that of ml_dtypes.
    """

    def __init__(self, folder: str | os.PathLike):
        """Raises `UserError` where there are no vectors, or not all of them yet."""
        self.folder = Path(folder)
        self.about = _read_json(self.folder / ABOUT)
        try:
            self.shape = (self.about["texts"]["count"], self.about["width"])
            if not all(type(size) is int and size >= 0 for size in self.shape):
                raise ValueError(f"shape {self.shape}")
            self.dtype = np.dtype(_numpy_dtype(self.about["dtype"]))
        except (LookupError, TypeError, ValueError) as error:
            raise _damaged_file(self.folder / ABOUT, repr(error)) from error
        done = _rows_done(self.folder, self.shape[0])
        if done < self.shape[0]:
            raise UserError(
                f"{self.folder}: {done} of {self.shape[0]} vectors are written; run the command "
                "that writes them again, it continues"
            )
        self._array = _open(self.folder, self.about) if self.shape[0] else None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"step {step}: only contiguous rows can be read")
        if start >= stop:
            return np.zeros((0, self.shape[1]), self.dtype)
        for chunk in range(start // CHUNK, (stop - 1) // CHUNK + 1):
            path = self.folder / "c" / f"{chunk}" / "0"
            if not path.is_file():  # TensorStore would fill the rows
                raise self._damaged(f"{path} is missing")
        try:
            return self._array[start:stop].read().result()
        except (ValueError, OSError) as error:
            raise self._damaged(f"rows {start} to {stop}: {first_line(error)}") from error

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self.folder} holds damaged vectors ({reason}): delete it, and repeat")


def write_vectors(
    folder: str | os.PathLike,
    texts: Callable[[], Iterable[str]],
    encode: Encode,
    encoder: dict,
    dtype: str = "float32",
) -> VectorStore:
    """Embeds texts into `folder`, or what of it is missing; returns the complete store.

    All processes of a run call it together; process 0 writes.

    Args:
      texts: gives the texts from the first on, the same at every call. It is called twice: for
        their hash, then to embed them. Never in memory as a whole, if the iterable is not.
      encode: n texts to float [n, D]; [0, D] for none. Called with CHUNK texts at a time, and the
        same ones after a resume.
      encoder: identifies the encoder: whatever changes the vectors (weights, prefix, length).
      dtype: stored; one of search.DTYPES.

    Raises:
      UserError: `folder` holds something else, or vectors of other texts, of another encoder or in
        another dtype (the message names the difference); a vector that is not finite.
    """
    folder = Path(folder)
    about = _about(hash_texts(texts()), encode, encoder, dtype)
    return _complete(folder, texts, encode, about, folder.name)


def cached_vectors(
    cache: str | os.PathLike,
    texts: Callable[[], Iterable[str]],
    encode: Encode,
    encoder: dict,
    dtype: str = "float32",
    fingerprint: tuple[int, str] | None = None,
    label: str = "embedding",
) -> VectorStore:
    """The vectors of `texts` in a folder of `cache` that is theirs alone; embeds what is missing.

    The folder's name is a hash of encoder, texts, width and dtype, so that whatever was embedded
    once is found again, and nothing else. In a run of several processes, ask once for the same.

    Args:
      texts, encode, encoder, dtype: as of `write_vectors`, and its errors.
      fingerprint: `hash_texts(texts())` where the caller has it: the texts are then read once.
      label: of the progress bar.
    """
    about = _about(fingerprint or hash_texts(texts()), encode, encoder, dtype)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:40]
    return _complete(Path(cache) / key, texts, encode, about, label)


def _about(fingerprint: tuple[int, str], encode: Encode, encoder: dict, dtype: str) -> dict:
    check_dtype(dtype)
    count, sha256 = fingerprint
    return {
        "format": FORMAT,
        "texts": {"count": count, "sha256": sha256},
        "encoder": json.loads(json.dumps(encoder)),
        "width": int(encode([]).shape[1]),
        "dtype": dtype,
    }


def _complete(
    folder: Path, texts: Callable[[], Iterable[str]], encode: Encode, about: dict, label: str
) -> VectorStore:
    count = about["texts"]["count"]
    done = process_0_first(f"vectors {folder}", lambda: _start(folder, about))
    if done < count:
        _embed(folder, itertools.islice(texts(), done, None), encode, about, done, label)
    wait_for_all(f"written {folder}")
    return VectorStore(folder)


def hash_texts(texts: Iterable[str]) -> tuple[int, str]:
    """How many, and a SHA-256 of all of them in their order."""
    sha256, count = hashlib.sha256(), 0
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        sha256.update(len(data).to_bytes(8, "little") + data)
        count += 1
    return count, sha256.hexdigest()


def _start(folder: Path, about: dict) -> int:
    """Rows that are written already; makes the folder if it is new.

    What it is comes first: a kill at any time leaves a folder that is known, or an empty one.
    """
    if (folder / ABOUT).is_file():
        found = differences(_read_json(folder / ABOUT), about)
        if found:
            raise UserError(
                f"{folder} holds other vectors than asked for: {'; '.join(found)}. "
                "Delete it or choose another folder"
            )
    else:
        if folder.exists() and not (folder.is_dir() and _is_unused(folder)):
            raise UserError(f"{folder} holds something else: choose another folder")
        save_json(folder / ABOUT, about)
    if (folder / PROGRESS).is_file():
        return _rows_done(folder, about["texts"]["count"])
    if about["texts"]["count"]:
        _open(folder, about, create=True)
    save_json(folder / PROGRESS, {"rows": 0})
    return 0


def _is_unused(folder: Path) -> bool:
    """Whether there is nothing but a file that a killed `save_json` left."""
    return all(path.name == f"{ABOUT}.tmp" for path in folder.iterdir())


def _embed(
    folder: Path, texts: Iterator[str], encode: Encode, about: dict, done: int, label: str
) -> None:
    count = about["texts"]["count"]
    writes = jax.process_index() == 0
    array = _open(folder, about) if writes else None
    pending = None  # (end, what is being written): storage works while the next chunk is embedded

    def finish():
        end, future = pending
        future.result()
        save_json(folder / PROGRESS, {"rows": end})

    with tqdm(
        total=count, initial=done, desc=label, unit=" texts", disable=None, leave=False
    ) as bar:
        # A kill leaves whole chunks only, so chunks are the same after a resume.
        while chunk := list(itertools.islice(texts, CHUNK)):
            x_ND = encode(chunk)
            finite_N = np.isfinite(x_ND).all(axis=1)
            if not finite_N.all():
                row = done + int(np.argmin(finite_N))
                raise UserError(f"{folder}: the encoder gives text {row} no finite vector")
            start, done = done, done + len(chunk)
            if done > count:
                break
            if writes:
                if pending is not None:
                    finish()
                x_ND = x_ND.astype(_numpy_dtype(about["dtype"]))
                pending = done, array[start:done].write(x_ND)
            bar.update(len(chunk))
    if done != count:
        raise UserError(f"the texts changed meanwhile: {count} before, {done} or more now")
    if pending is not None:
        finish()


def _open(folder: Path, about: dict, create: bool = False):
    """The array of `folder`, exactly as `about` says: a damaged zarr.json may say something else.

    Raises `UserError` if it cannot be opened.
    """
    try:
        return _open_array(folder, about, _CHECKED, create)
    except ValueError as error:
        with contextlib.suppress(ValueError):
            array = _open_array(folder, about, _CODECS, create=False)
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


def _open_array(folder: Path, about: dict, codecs: list[dict], create: bool):
    folder.mkdir(parents=True, exist_ok=True)
    shape = [about["texts"]["count"], about["width"]]
    return ts.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder.absolute())},
            "metadata": {"codecs": codecs, "chunk_key_encoding": {"name": "default"}},
        },
        create=create,
        open=True,  # what a killed call has made
        dtype=ts.dtype(about["dtype"]),
        shape=shape,
        fill_value=np.nan,  # a lost chunk must not read as zeros
        chunk_layout=ts.ChunkLayout(chunk_shape=[CHUNK, shape[1]]),
    ).result()


def _numpy_dtype(name: str):
    return ts.dtype(name).numpy_dtype


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} holds no vectors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged_file(path, first_line(error)) from None
    if not isinstance(content, dict):
        raise _damaged_file(path, "no JSON object")
    return content


def _rows_done(folder: Path, count: int) -> int:
    rows = _read_json(folder / PROGRESS).get("rows")
    # A kill leaves whole chunks only.
    if type(rows) is not int or not 0 <= rows <= count or (rows % CHUNK and rows != count):
        raise _damaged_file(folder / PROGRESS, f"rows {rows!r} of {count}")
    return rows


def _damaged_file(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}): delete {path.parent}, and repeat")
