"""Vectors on disk: an array [N, D] in TensorStore (zarr3), and what was embedded with what.

    zarr.json, c/    the array, in chunks of CHUNK rows, each with its CRC-32C
    chunks/N.json    size and CRC of the file of chunk N, which another chunk in its place has not
    about.json       texts (count and SHA-256), encoder (whatever identifies it), width, dtype
    progress.json    that all rows are there; written last

A chunk appears whole, and then its checksum, so whatever is there need not be embedded again:
`write_vectors` continues where a killed one stopped, and `write_part` lets many processes write
chunks of their own. Vectors of other texts or of another encoder are never taken for these.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from moe_embed_jax import storage
from moe_embed_jax.checksums import damage_of
from moe_embed_jax.config import differences, save_json
from moe_embed_jax.errors import LostConnection, UserError, first_line
from moe_embed_jax.ownership import own
from moe_embed_jax.parts import Part, not_done
from moe_embed_jax.processes import from_process_0, on_process_0, process_0_first
from moe_embed_jax.search import check_dtype
from moe_embed_jax.search.vector_folder import (
    CHUNKS,
    chunk_checksum,
    chunk_file,
    damaged_file,
    numpy_dtype,
    open_array,
    read_json,
    save_chunk_checksum,
)

Encode = Callable[[list[str]], np.ndarray]  # n texts -> float [n, D]

FORMAT = 1
CHUNK = 8192  # rows of a chunk: written at once, lost at most by a kill
ABOUT, PROGRESS = "about.json", "progress.json"
# The largest count of texts and width that are believed: a file that says more is damaged.
LIMITS = 2**36, 2**16


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
        self.folder = storage.path(folder)
        self.about = read_json(self.folder, ABOUT)
        try:
            self.shape = (self.about["texts"]["count"], self.about["width"])
            for size, limit in zip(self.shape, LIMITS, strict=True):
                if type(size) is not int or not 0 <= size <= limit:
                    raise ValueError(f"shape {self.shape}, of {LIMITS} at most")
            self.dtype = np.dtype(numpy_dtype(self.about["dtype"]))
        except (LookupError, TypeError, ValueError) as error:
            raise damaged_file(self.folder, ABOUT, repr(error)) from error
        if not _is_complete(self.folder, self.shape[0]):
            sizes = _chunk_sizes(self.shape[0])
            done = int(sizes[_chunks_there(self.folder, len(sizes))].sum())
            raise UserError(
                f"{self.folder}: {done} of {self.shape[0]} vectors are written; run the command "
                "that writes them again, it continues"
            )
        self._array = open_array(self.folder, self.about, CHUNK) if self.shape[0] else None
        self._to_compare = set()  # chunks; none in a folder of an earlier version
        if (self.folder / CHUNKS).is_dir():
            self._to_compare = set(range(len(_chunk_sizes(self.shape[0]))))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"step {step}: only contiguous rows can be read")
        if start >= stop:
            return np.zeros((0, self.shape[1]), self.dtype)
        for chunk in range(start // CHUNK, (stop - 1) // CHUNK + 1):
            path = chunk_file(self.folder, chunk)
            if not path.is_file():  # TensorStore would fill the rows
                raise self._damaged(f"{path} is missing")
            if chunk in self._to_compare:
                if damage := damage_of(path, chunk_checksum(self.folder, chunk)):
                    raise self._damaged(damage)
                self._to_compare.discard(chunk)
        try:
            with storage.errors_of(self.folder):
                return self._array[start:stop].read().result()
        except (LostConnection, PermissionError):
            raise
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
    folder = storage.path(folder)
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
    return _complete(storage.path(cache) / key, texts, encode, about, label)


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


def write_part(
    folder: str | os.PathLike,
    texts: Callable[[], Iterable[str]],
    encode: Encode,
    encoder: dict,
    dtype: str,
    part: Part,
) -> tuple[int, int]:
    """Embeds the chunks of a part into `folder`, or what of them is missing. One process does it,
    while others may do other parts.

    Arguments and errors as of `write_vectors`. Returns the shape of the part: (texts, D).
    """
    folder = storage.path(folder)
    about = _about(hash_texts(texts()), encode, encoder, dtype)
    with own(folder, wait=True):
        there_C = _start(folder, about)
    sizes = _chunk_sizes(about["texts"]["count"])
    own_C = np.array([part.has(number) for number in range(len(sizes))], bool)
    _embed(folder, texts(), encode, about, own_C & ~there_C, f"{folder.name} {part}")
    return int(sizes[own_C].sum()), about["width"]


def finish_vectors(
    folder: str | os.PathLike,
    texts: Callable[[], Iterable[str]],
    encode: Encode,
    encoder: dict,
    dtype: str,
) -> VectorStore:
    """The vectors that `write_part` wrote in several calls, as `write_vectors` leaves them.

    Arguments and errors as of `write_vectors`, which embeds nothing here.

    Raises `UserError` if a chunk is missing, too.
    """
    folder = storage.path(folder)
    about = _about(hash_texts(texts()), encode, encoder, dtype)
    there_C = _start(folder, about)
    if not there_C.all():
        missing = np.flatnonzero(~there_C).tolist()
        raise not_done(missing, len(there_C), f"chunks of {CHUNK:,} texts", folder)
    _end(folder, about)
    return VectorStore(folder)


def _complete(
    folder: Path, texts: Callable[[], Iterable[str]], encode: Encode, about: dict, label: str
) -> VectorStore:
    there_C = process_0_first(f"vectors {folder}", lambda: _start(folder, about))
    if len(there_C):  # a disk may show a chunk to one process, and not yet to another
        there_C = from_process_0(there_C).astype(bool)
    if not there_C.all():
        _embed(folder, texts(), encode, about, ~there_C, label)
    on_process_0(f"written {folder}", lambda: _end(folder, about))
    return VectorStore(folder)


def hash_texts(texts: Iterable[str]) -> tuple[int, str]:
    """How many, and a SHA-256 of all of them in their order."""
    sha256, count = hashlib.sha256(), 0
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        sha256.update(len(data).to_bytes(8, "little") + data)
        count += 1
    return count, sha256.hexdigest()


def _start(folder: Path, about: dict) -> np.ndarray:
    """bool [chunks]: which are written already. Makes the folder if it is new.

    What it is comes first: a kill at any time leaves a folder that is known, or an empty one.
    """
    count = about["texts"]["count"]
    if storage.has_entry(folder / ABOUT):
        found = differences(read_json(folder, ABOUT), about)
        if found:
            raise UserError(
                f"{folder} holds other vectors than asked for: {'; '.join(found)}. "
                "Delete it or choose another folder"
            )
    else:
        if folder.exists() and not (folder.is_dir() and _is_unused(folder)):
            raise UserError(f"{folder} holds something else: choose another folder")
        save_json(folder / ABOUT, about)
    chunks = len(_chunk_sizes(count))
    if _is_complete(folder, count):
        return np.ones(chunks, bool)
    if count:
        open_array(folder, about, CHUNK, create=True)
    return _chunks_there(folder, chunks)


def _end(folder: Path, about: dict) -> None:
    """Says that all rows are there."""
    if not (folder / PROGRESS).is_file() or not _is_complete(folder, about["texts"]["count"]):
        save_json(folder / PROGRESS, {"rows": about["texts"]["count"]})


def _chunk_sizes(count: int) -> np.ndarray:
    """int64 [chunks]: rows of each chunk of `count` rows."""
    return np.diff([*range(0, count, CHUNK), count])


def _chunks_there(folder: Path, chunks: int) -> np.ndarray:
    """bool [chunks]: those whose checksum is there."""
    written = {path.parent.name for path in (folder / "c").glob("*/0")}
    names = written & {path.stem for path in (folder / CHUNKS).glob("*.json")}
    return np.array([str(number) in names for number in range(chunks)], bool)


def _is_unused(folder: Path) -> bool:
    """Whether there is nothing but a file that a killed `save_json` left."""
    return all(path.name == f".{ABOUT}.partial" for path in folder.iterdir())


def _embed(
    folder: Path,
    texts: Iterable[str],
    encode: Encode,
    about: dict,
    wanted_C: np.ndarray,
    label: str,
) -> None:
    """Writes the wanted chunks. A chunk is encoded by itself, so it does not depend on others."""
    count = about["texts"]["count"]
    array = (
        open_array(folder, about, CHUNK) if jax.process_index() == 0 and wanted_C.any() else None
    )
    pending = None  # (chunk, its write): storage works while the next chunk is embedded
    texts, sizes = iter(texts), _chunk_sizes(count)
    total = int(sizes[wanted_C].sum())
    try:
        with tqdm(total=total, desc=label, unit=" texts", disable=None, leave=False) as bar:
            for number, size in enumerate(sizes.tolist()):
                chunk = list(itertools.islice(texts, size))
                start = number * CHUNK
                if len(chunk) < size:
                    raise _changed(count, start + len(chunk))
                if not wanted_C[number]:
                    continue
                x_ND = encode(chunk)
                finite_N = np.isfinite(x_ND).all(axis=1)
                if not finite_N.all():
                    row = start + int(np.argmin(finite_N))
                    raise UserError(f"{folder}: the encoder gives text {row} no finite vector")
                if array is not None:
                    _wait(folder, pending)
                    x_ND = x_ND.astype(numpy_dtype(about["dtype"]))
                    pending = number, array[start : start + size].write(x_ND)
                bar.update(size)
    finally:
        _wait(folder, pending)
    if next(texts, None) is not None:
        raise _changed(count, f"{count + 1} or more")


def _wait(folder: Path, pending: tuple | None) -> None:
    """For a chunk that is being written; None: there is none."""
    if pending is not None:
        number, write = pending
        with storage.errors_of(folder):
            write.result()
        save_chunk_checksum(folder, number)


def _changed(count: int, found: int | str) -> UserError:
    return UserError(f"the texts changed meanwhile: {count} before, {found} now")


def _is_complete(folder: Path, count: int) -> bool:
    """Whether progress.json says so. Earlier versions wrote there how many rows were."""
    if not storage.has_entry(folder / PROGRESS):
        return False
    rows = read_json(folder, PROGRESS).get("rows")
    if type(rows) is not int or not 0 <= rows <= count or (rows % CHUNK and rows != count):
        raise damaged_file(folder, PROGRESS, f"rows {rows!r} of {count}")
    return rows == count
