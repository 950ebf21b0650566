"""Random access to the records of an ArrayRecord split that TFDS, or `pair_writer`, wrote."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.pairs.row import PairRow, decode_pair

_SHARD = re.compile(r".*\.array_record-(\d{5})-of-(\d{5})")
# Random access: reading ahead would fetch records that nobody asked for.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class Records:
    """The records (serialised `tf.train.Example`) of several files as one sequence."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = list(paths)
        self._readers = [_open_reader(path) for path in self._paths]
        self._stops = np.cumsum([reader.num_records() for reader in self._readers], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def __getitem__(self, row: int) -> bytes:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int] | np.ndarray) -> list[bytes]:
        """Batched read, under the name that Grain looks for; see `read`."""
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} asked for, there are {len(self)}")
        shards = np.searchsorted(self._stops, rows, side="right")
        out = [b""] * rows.size
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            in_shard = (rows[places] - self._start(shard)).tolist()
            records = self._read_shard(shard, in_shard)
            for place, record in zip(places.tolist(), records, strict=True):
                out[place] = record
        return out

    def read(self, rows: Sequence[int] | np.ndarray) -> list[PairRow]:
        """The rows in the order asked for, repetitions allowed; batches are several times faster.

        Raises:
          IndexError: a row number is not in [0, len).
          UserError: a record is damaged; names the file and the record.
        """
        found = []
        for row, record in zip(rows, self.__getitems__(rows), strict=True):
            try:
                found.append(decode_pair(record))
            except ValueError as error:
                shard = int(np.searchsorted(self._stops, row, side="right"))
                number = int(row) - self._start(shard)
                raise damaged(self._paths[shard], number, error) from error
        return found

    def _start(self, shard: int) -> int:
        return int(self._stops[shard - 1]) if shard else 0

    def _read_shard(self, shard: int, numbers: list[int]) -> list[bytes]:
        path, reader = self._paths[shard], self._readers[shard]
        try:
            records = _read(path, reader, numbers)
        except RuntimeError as error:
            raise damaged(path, _first_damaged(path, reader, numbers), error) from error
        if len(records) != len(numbers):
            why = f"{len(records)} records read, {len(numbers)} asked for"
            raise damaged(path, None, why)
        return records


def open_records(folder: Path, prefix: str, length: int) -> Records:
    """The records of the shards folder/<prefix>.array_record-*; `length` of them are expected.

    Raises `UserError` for a missing or damaged shard; names it.
    """
    paths = sorted(folder.glob(f"{prefix}.array_record-*"))
    matches = [_SHARD.fullmatch(path.name) for path in paths]
    numbers = [int(match[1]) for match in matches if match]
    shards = max((int(match[2]) for match in matches if match), default=0)
    if not shards or numbers != list(range(shards)):
        raise UserError(
            f"{folder}/{prefix}.array_record: shards {numbers} of {shards} are there; "
            "delete the folder and prepare again"
        )
    records = Records(paths)
    if len(records) != length:
        names = ", ".join(str(path) for path in paths)
        raise UserError(
            f"{names}: {len(records)} rows, {length} expected: damaged; "
            f"delete {folder} and prepare again"
        )
    return records


def _open_reader(path: Path) -> ArrayRecordReader:
    try:
        reader = storage.read_by_library(
            path, lambda: ArrayRecordReader(str(path), _READER_OPTIONS)
        )
    except (RuntimeError, ValueError) as error:
        raise damaged(path, None, error) from error
    if not reader.ok():
        raise damaged(path, None, "the index at its end cannot be read")
    return reader


def _read(path: Path, reader: ArrayRecordReader, numbers: list[int]) -> list[bytes]:
    return storage.read_by_library(path, lambda: reader.read(numbers))


def _first_damaged(path: Path, reader: ArrayRecordReader, numbers: list[int]) -> int | None:
    for number in numbers:
        try:
            _read(path, reader, [number])
        except RuntimeError:
            return number
    return None


def damaged(path: Path, record: int | None, why: object) -> UserError:
    """The error of a damaged file or record, to be raised."""
    place = f"{path}" if record is None else f"{path}: record {record}"
    return UserError(f"{place}: damaged ({why}); delete {path.parent} and prepare again")
