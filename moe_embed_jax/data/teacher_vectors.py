"""The vectors of a teacher for the texts of a token store, read at random while training.

launch/filter.py and launch/mine.py keep the vectors of distinct queries and documents in a work
folder, in a folder for each of their units:

    queries.zarr, documents.zarr   the vectors: `VectorStore`
    texts.npz                      which text has which, by content id; CRC-32 of all of a side

Content ids depend on texts alone, so the student may have another tokenizer, and may train on any
part of these pairs. The stores are made for reading in order. Before training they are copied, row
after row, to a folder on a disk, where a row costs one read:

    vectors.bin   [rows, W] in the dtype of the stores: units in order, queries before documents
    checks.npy    uint32 [rows]: CRC-32 of each
    about.json    what was copied; written last
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from moe_embed_jax import storage
from moe_embed_jax.data.npz_file import UNREADABLE, read_npz
from moe_embed_jax.data.text_files import written_whole
from moe_embed_jax.errors import UserError
from moe_embed_jax.hashes import canonical_hash, file_hash
from moe_embed_jax.new_folder import new_folder
from moe_embed_jax.ownership import own

SIDES = ("queries", "documents")
INDEX, VECTORS, CHECKS, ABOUT = "texts.npz", "vectors.bin", "checks.npy", "about.json"
COPIED = 8192  # rows at a time, as the stores' chunks
PARTS = ("key", "row", "crc")  # of each side in INDEX
MADE_BY = "the folder OUTPUT.work of launch/filter.py or launch/mine.py"


def _store(folder: Path, name: str):
    """The `VectorStore` of a side; a run without a teacher needs neither it nor TensorStore."""
    from moe_embed_jax.search.vectors import VectorStore

    return VectorStore(folder / f"{name}.zarr")


def write_index(folder: Path, sides: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes which text has which row of `folder`/queries.zarr and documents.zarr, which are whole.

    Args:
      sides: name of SIDES -> content ids int32 [n, 2] of texts, and the row [n] of each.
    """
    arrays = {}
    for name, (content_ids, row) in sides.items():
        key, first = np.unique(_keys(content_ids), return_index=True)
        arrays |= {f"{name}_key": key, f"{name}_row": np.asarray(row, np.int64)[first]}
    path = folder / INDEX
    if path.is_file():
        with contextlib.suppress(UserError):
            found = _read(path)
            if all(np.array_equal(array, found[name]) for name, array in arrays.items()):
                return
    for name in sides:
        crc = 0
        for part_NW in _slices(_store(folder, name)):
            crc = zlib.crc32(part_NW.tobytes(), crc)
        arrays[f"{name}_crc"] = np.uint32(crc)
    with written_whole(path) as file:
        np.savez(file, **arrays)


def _slices(store) -> Iterator[np.ndarray]:
    """The vectors of a `VectorStore` in order, some rows at a time."""
    for begin in range(0, len(store), COPIED):
        yield np.ascontiguousarray(store[begin : begin + COPIED])


def _keys(content_ids: np.ndarray) -> np.ndarray:
    """int64 [n] of int32 [n, 2]."""
    return np.ascontiguousarray(content_ids, "<i4").view("<i8")[:, 0]


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an index. Raises `UserError`: damaged."""
    try:
        return read_npz(path, [f"{name}_{part}" for name in SIDES for part in PARTS])
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it and unit.json beside it, and repeat the "
            "command that made it"
        ) from error


class TeacherVectors:
    """A teacher's vectors of the queries and documents of a token store, by row of the store.

    Attributes:
      width (W): of the vectors.
      has_negative: bool [J], which hard negatives of the store have a vector.
      content_hash: stands for teacher, texts and vectors.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        cache: str | os.PathLike,
        content_ids: np.ndarray,
        used: np.ndarray,
        negative_ids: np.ndarray,
    ):
        """
        Args:
          folder: work folder of launch/filter.py or launch/mine.py.
          cache: folder on a disk of this machine, to which the vectors are copied, unless they are
            there.
          content_ids: int32 [rows, 2, 2], of the token store.
          used: bool [rows], the rows that are trained on.
          negative_ids: int32 [J, 2], of the token store.

        Raises:
          UserError: no vectors, not all of them, damaged ones, or those of other pairs.
        """
        self.folder = storage.path(folder)
        units = [_Unit(path) for path in _unit_folders(self.folder)]
        widths = sorted({store.shape[1] for unit in units for store in unit.stores.values()})
        dtypes = {store.dtype for unit in units for store in unit.stores.values()}
        if len(widths) > 1 or len(dtypes) > 1:
            raise UserError(
                f"data.teacher={self.folder} holds vectors of several kinds (widths {widths}, "
                f"{', '.join(sorted(map(str, dtypes)))}): give {MADE_BY}, of one teacher"
            )
        (self.width,), (self._dtype,) = widths, dtypes
        about = [unit.about for unit in units]
        self.content_hash = canonical_hash({"units": about})
        self._rows = self._find_rows(units, content_ids, used)
        self._negatives, self.has_negative = self._find(units, "documents", negative_ids)
        self._copy = self._copied(units, cache)
        count = sum(len(store) for unit in units for store in unit.stores.values())
        try:
            with (self._copy / CHECKS).open("rb") as file:
                self._checks = np.load(file)
            if self._checks.shape != (count,):
                raise ValueError(f"{CHECKS} has the shape {self._checks.shape}")
            # An open file: it is on a disk of this machine.
            with (self._copy / VECTORS).open("rb") as file:
                self._vectors = np.memmap(file, self._dtype, "r", shape=(count, self.width))
        except (OSError, *UNREADABLE) as error:
            raise self._damaged(str(error)) from error

    def queries(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, W]: of the queries of these rows of the token store."""
        return self._at(self._rows["queries"][rows])

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, W]: of the own documents of these rows of the token store."""
        return self._at(self._rows["documents"][rows])

    def negatives(self, places: np.ndarray) -> np.ndarray:
        """float32 [n, W]: of these hard negatives of the token store; NaN where there is none."""
        vectors_NW = self._at(self._negatives[places])
        return np.where(self.has_negative[places][:, None], vectors_NW, np.nan)

    def _at(self, places: np.ndarray) -> np.ndarray:
        vectors_NW = np.ascontiguousarray(self._vectors[places])
        for place, vector_W in zip(places.tolist(), vectors_NW, strict=True):
            if zlib.crc32(vector_W.tobytes()) != self._checks[place]:
                raise self._damaged(f"vector {place}")
        return vectors_NW.astype(np.float32)

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self._copy / VECTORS} is damaged ({what}): delete {self._copy}, and repeat"
        )

    def _find_rows(self, units: list["_Unit"], content_ids, used) -> dict[str, np.ndarray]:
        """{side: int64 [rows], the place of each text's vector in the copy}."""
        rows = {}
        for column, name in enumerate(SIDES):
            rows[name], found = self._find(units, name, content_ids[:, column])
            missing = used & ~found
            if missing.any():
                raise UserError(
                    f"data.teacher={self.folder} has no vector of {missing.sum():,} of the "
                    f"{used.sum():,} {name} (the first is that of row {missing.argmax()} of the "
                    f"token store): give {MADE_BY}, made of the pairs that are trained on"
                )
        return rows

    def _find(self, units: list["_Unit"], side: str, content_ids) -> tuple[np.ndarray, np.ndarray]:
        """(the place of each text's vector in the copy, or 0; whether there is one)."""
        start, keys, places = 0, [], []
        for unit in units:
            for name, store in unit.stores.items():
                if name == side:
                    keys.append(unit.index[name][0])
                    places.append(unit.index[name][1] + start)
                start += len(store)
        key, first = np.unique(np.concatenate(keys), return_index=True)
        place, wanted = np.concatenate(places)[first], _keys(content_ids)
        at = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
        found = key[at] == wanted
        return np.where(found, place[at], 0), found

    def _copied(self, units: list["_Unit"], cache: str | os.PathLike) -> Path:
        cache = storage.path(cache).expanduser()
        if storage.is_remote(cache):
            raise UserError(
                f"data.dir={cache} is in a bucket, and a teacher's vectors are read at random: "
                "name a folder on a local disk in data.cache_dir"
            )
        target = cache / f"teacher-{self.content_hash[:16]}"
        with own(cache, inside=True, wait=True):
            if (target / ABOUT).is_file():
                return target
            print(f"data: copying the teacher's vectors to {target}")
            with new_folder(target, last=ABOUT, replace=True) as partial:
                checks = []
                with (partial / VECTORS).open("wb") as file:
                    for unit in units:
                        for name, store in unit.stores.items():
                            crc = 0
                            for part_NW in _slices(store):
                                file.write(part_NW.tobytes())
                                crc = zlib.crc32(part_NW.tobytes(), crc)
                                checks += [zlib.crc32(vector_W.tobytes()) for vector_W in part_NW]
                            if crc != unit.index[name][2]:
                                raise UserError(
                                    f"{store.folder} holds other vectors than {INDEX} beside it "
                                    "was written for: delete both, and repeat the command that "
                                    "made them"
                                )
                with (partial / CHECKS).open("wb") as file:
                    np.save(file, np.array(checks, np.uint32))
                text = json.dumps({"from": str(self.folder), "hash": self.content_hash}, indent=1)
                (partial / ABOUT).write_text(text + "\n", encoding="utf-8")
        return target


def width_of(folder: str | os.PathLike) -> int:
    """The width of the vectors in a work folder; 0: they are not there yet."""
    path = storage.path(folder)
    if not path.is_dir() or not any(path.iterdir()):
        return 0
    return _store(_unit_folders(path)[0], SIDES[0]).shape[1]


class _Unit:
    """Vectors and texts of one unit: `stores` and `index` (keys, rows) of each side."""

    def __init__(self, folder: Path):
        self.stores = {name: _store(folder, name) for name in SIDES}
        path = folder / INDEX
        if not path.is_file():
            raise UserError(
                f"{path} is missing: an earlier version made {folder}; delete every unit.json in "
                "it, and repeat the command that made it with a new --output: nothing is embedded "
                "again"
            )
        arrays = _read(path)
        self.index = {name: tuple(arrays[f"{name}_{part}"] for part in PARTS) for name in SIDES}
        self.about = {
            "texts": file_hash(path),
            **{name: store.about for name, store in self.stores.items()},
        }


def _unit_folders(folder: Path) -> list[Path]:
    """Those of launch/mine.py, one for each source and language, or of launch/filter.py, one for
    each chunk of each."""
    if not folder.is_dir():
        raise UserError(f"data.teacher={folder} is no folder: give {MADE_BY}")
    units = []
    for group in sorted(path for path in folder.iterdir() if path.is_dir()):
        chunks = sorted(path for path in group.iterdir() if path.is_dir())
        if (group / f"{SIDES[0]}.zarr") in chunks:
            units.append(group)
        else:
            units += [chunk for chunk in chunks if (chunk / f"{SIDES[0]}.zarr").is_dir()]
    if not units:
        raise UserError(f"data.teacher={folder} holds no vectors: give {MADE_BY}")
    return units
