"""The tokenised data of one (mixture, vocabulary, lengths): what the training process reads.

A folder of ArrayRecord shards for the tokens, two small index arrays, and `spec.json`. Reading is
random access and never imports TensorFlow. Preparation writes a store once, atomically; from then
on it does not change, and its `spec["hash"]` stands for every token in it.

    shard-00000-of-00008.array_record    one record per row (a pair)
    lengths.npy       int32 [rows, 2]    tokens of the query and of the document, <s> </s> included
    content_ids.npy   int32 [rows, 2, 2] 64-bit content hashes of query and document (two int32)
    spec.json         what is in here, see `TokenStoreWriter`

A record is little-endian: uint32 magic, uint32 n, uint32 lengths[n], int32 tokens[sum(lengths)].
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from moe_embed_jax.data.data_spec import (
    canonical_hash,
    describe_spec_difference,
    planned_store_path,
    token_store_path,
    vocabulary_path,
)
from moe_embed_jax.errors import UserError

__all__ = [
    "TokenStore",
    "TokenStoreWriter",
    "decode_record",
    "describe_spec_difference",
    "encode_record",
    "encode_records",
    "planned_store_path",
    "token_store_path",
    "vocabulary_path",
]

FORMAT = 1
MAGIC = 0x4D454A00 | FORMAT  # "MEJ" and the format number
ROWS_PER_SHARD = 65536
# 16 records per compressed chunk halve the size of one; a random batch of 256 takes 3 ms.
WRITER_OPTIONS = "group_size:16"
# Read-ahead is for sequential reading; a batch is random access.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
REMEDY = "delete {folder} and prepare the data again"


def encode_record(sequences: Sequence[np.ndarray]) -> bytes:
    """One record from int token sequences."""
    header = np.array([MAGIC, len(sequences), *(len(s) for s in sequences)], dtype="<u4")
    return header.tobytes() + b"".join(np.asarray(s).astype("<i4").tobytes() for s in sequences)


def encode_records(ids: Sequence[np.ndarray], lengths: np.ndarray) -> list[bytes]:
    """`encode_record` of N rows at once; arguments as in `TokenStoreWriter.write_batch`."""
    count, texts = lengths.shape
    ends = np.cumsum(2 + texts + lengths.sum(axis=1))
    starts = ends - (2 + texts + lengths.sum(axis=1))
    words = np.empty(ends[-1] if count else 0, dtype="<i4")
    words[starts] = MAGIC
    words[starts + 1] = texts
    places = starts + 2 + texts
    for text in range(texts):
        length = lengths[:, text]
        words[starts + 2 + text] = length
        # Token i of a row's text goes to `places` + i; `ids` counts i over all rows.
        before = np.cumsum(length) - length
        words[np.repeat(places - before, length) + np.arange(len(ids[text]))] = ids[text]
        places = places + length
    data = words.tobytes()
    return [
        data[start:end]
        for start, end in zip((4 * starts).tolist(), (4 * ends).tolist(), strict=True)
    ]


def decode_record(record: bytes) -> list[np.ndarray]:
    """The int32 sequences of a record.

    Raises:
      ValueError: says what is wrong with the bytes.
    """
    if len(record) < 8 or len(record) % 4:
        raise ValueError(f"{len(record)} bytes cannot be a record")
    words = np.frombuffer(record, dtype="<i4")
    magic, count = int(words[0]), int(words[1])
    if magic != MAGIC:
        raise ValueError(f"it starts with {magic:#x} instead of {MAGIC:#x}")
    ends = 2 + count + np.cumsum(words[2 : 2 + count])
    if (
        count < 1
        or len(words) < 2 + count
        or ends[-1] != len(words)
        or (words[2:][:count] < 0).any()
    ):
        raise ValueError(f"its {len(words)} words do not match its header")
    return np.split(words[2 + count :].astype(np.int32, copy=False), ends[:-1] - 2 - count)


class TokenStoreWriter:
    """Writes a token store next to `folder` and moves it there when everything is written.

    Use as a context manager; an exception inside leaves no trace at `folder`:

        with TokenStoreWriter(folder, spec) as writer:
            writer.start_group("translations", "de", rate=0.2)
            writer.write([query_ids, document_ids], content_ids)

    Attributes:
      rows: the number of rows written so far.

    `spec` holds what the caller knows (mixture, vocabulary, lengths, prefixes, source checksums);
    the writer adds `format`, `rows`, `groups` (one per `start_group`, with their rows), `content`
    (SHA-256 of records, lengths and content ids) and `hash`, the SHA-256 of all the others.
    """

    def __init__(self, folder: str | os.PathLike, spec: dict, rows_per_shard: int = ROWS_PER_SHARD):
        self._folder = Path(folder)
        self._temporary = self._folder.with_name(f".{self._folder.name}.{os.getpid()}.partial")
        self._spec = dict(spec)
        self._rows_per_shard = rows_per_shard
        self._groups: list[dict] = []
        self.rows = 0
        self._lengths: list[np.ndarray] = []
        self._content_ids: list[np.ndarray] = []
        self._records_sha256 = hashlib.sha256()
        self._shards: list[Path] = []
        self._writer: ArrayRecordWriter | None = None

    def __enter__(self) -> "TokenStoreWriter":
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self._finish()
            return
        if self._writer is not None:
            self._writer.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def start_group(self, task: str, language: str, rate: float) -> None:
        """The rows that follow belong to this task and language, sampled with weight `rate`."""
        self._close_group()
        self._groups.append(
            {"task": task, "language": language, "start": self.rows, "rate": float(rate)}
        )

    def write(self, sequences: Sequence[np.ndarray], content_ids: np.ndarray) -> None:
        """Appends a row: one int token sequence and one int32 [2] content id per text."""
        lengths = np.array([[len(sequence) for sequence in sequences]], dtype=np.int64)
        self._append([encode_record(sequences)], lengths, np.asarray(content_ids)[np.newaxis])

    def write_batch(
        self, ids: Sequence[np.ndarray], lengths: np.ndarray, content_ids: np.ndarray
    ) -> None:
        """Appends N rows of S texts each, the same as N calls of `write` and much faster.

        Args:
          ids: S arrays; the tokens of all first texts one after the other, of all second, ...
          lengths: [N, S] how many tokens belong to each text.
          content_ids: int32 [N, S, 2].
        """
        self._append(encode_records(ids, lengths), lengths, content_ids)

    def _append(self, records: list[bytes], lengths: np.ndarray, content_ids: np.ndarray) -> None:
        if not self._groups:
            raise RuntimeError("call start_group before write")
        for record in records:
            if self.rows % self._rows_per_shard == 0:
                self._open_shard()
            self._writer.write(record)
            self._records_sha256.update(record)
            self.rows += 1
        self._lengths.append(lengths.astype(np.int32))
        self._content_ids.append(content_ids.astype(np.int32))

    def write_json(self, name: str, value: dict) -> None:
        """Stores `value` beside the data; it is no part of the spec or its hash."""
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        (self._temporary / name).write_text(text, encoding="utf-8")

    def _close_group(self) -> None:
        if self._groups:
            self._groups[-1]["stop"] = self.rows

    def _open_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._shards.append(self._temporary / f"shard-{len(self._shards):05d}")
        self._writer = ArrayRecordWriter(str(self._shards[-1]), WRITER_OPTIONS)

    def _finish(self) -> None:
        if not self.rows:
            shutil.rmtree(self._temporary, ignore_errors=True)
            raise UserError(f"no row was written to {self._folder}: the chosen data is empty")
        self._close_group()
        self._writer.close()
        for index, shard in enumerate(self._shards):
            shard.rename(self._temporary / _shard_name(index, len(self._shards)))
        lengths = np.concatenate(self._lengths)
        content_ids = np.concatenate(self._content_ids)
        np.save(self._temporary / "lengths.npy", lengths)
        np.save(self._temporary / "content_ids.npy", content_ids)
        spec = {
            **self._spec,
            "format": FORMAT,
            "rows": self.rows,
            "shards": len(self._shards),
            "rows_per_shard": self._rows_per_shard,
            "groups": [group for group in self._groups if group["stop"] > group["start"]],
            "content": {
                "records": self._records_sha256.hexdigest(),
                "lengths": _array_hash(lengths),
                "content_ids": _array_hash(content_ids),
            },
        }
        spec["hash"] = canonical_hash(spec)
        # The spec is written last: a folder without it is not a store.
        text = json.dumps(spec, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        (self._temporary / "spec.json").write_text(text, encoding="utf-8")
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._temporary.rename(self._folder)


class TokenStore:
    """Random access to a prepared token store. Open with `TokenStore.open(folder)`.

    Attributes:
      folder: where it lies.
      spec: the content of spec.json; `spec["hash"]` is the data-spec hash of checkpoints.
      groups: `spec["groups"]`: dicts with task, language, start, stop, rate; contiguous rows.
      lengths: int32 [rows, 2] tokens of query and document.
      content_ids: int32 [rows, 2, 2].
    """

    def __init__(self, folder: Path, spec: dict, lengths: np.ndarray, content_ids: np.ndarray):
        self.folder = folder
        self.spec = spec
        self.groups: list[dict] = spec["groups"]
        self.lengths = lengths
        self.content_ids = content_ids
        self._paths = [folder / _shard_name(i, spec["shards"]) for i in range(spec["shards"])]
        self._readers: dict[int, ArrayRecordReader] = {}
        # A reader is not documented to be safe for concurrent calls; prefetching makes them.
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "TokenStore":
        """Opens and checks everything but the tokens; those are checked as they are read.

        Raises:
          UserError: missing, incomplete or damaged file, or another format; names the file.
        """
        folder = Path(folder)
        spec = _read_spec(folder)
        arrays = []
        for name in ("lengths", "content_ids"):
            path = folder / f"{name}.npy"
            try:
                array = np.load(path)
            except (OSError, ValueError, EOFError) as error:
                reason = "is missing" if not path.exists() else f"cannot be read ({error})"
                raise UserError(f"{path} {reason}: {REMEDY.format(folder=folder)}") from error
            if array.shape[0] != spec["rows"] or _array_hash(array) != spec["content"][name]:
                raise UserError(
                    f"{path} is not the one spec.json was written with: "
                    f"{REMEDY.format(folder=folder)}"
                )
            arrays.append(array)
        store = cls(folder, spec, *arrays)
        for index in range(spec["shards"]):
            store._reader(index)
        return store

    def __len__(self) -> int:
        return self.spec["rows"]

    def read(self, rows: np.ndarray | Iterable[int]) -> list[list[np.ndarray]]:
        """The token sequences of `rows`, in that order: per row [query, document], int32 each.

        Raises:
          UserError: a record is damaged (names the file and the record in it), or a row is
            outside the store.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise UserError(f"row {rows.min()} or {rows.max()} is outside [0, {len(self)})")
        sequences: list = [None] * len(rows)
        shard_of_row, record_of_row = np.divmod(rows, self.spec["rows_per_shard"])
        for shard in np.unique(shard_of_row).tolist():
            places = np.flatnonzero(shard_of_row == shard)
            # Sorted, so that records of one compressed chunk are read together.
            places = places[np.argsort(record_of_row[places], kind="stable")]
            records = record_of_row[places].tolist()
            for place, record, data in zip(
                places, records, self._read_records(shard, records), strict=True
            ):
                sequences[place] = self._decode(shard, record, data, int(rows[place]))
        return sequences

    def _decode(self, shard: int, record: int, data: bytes, row: int) -> list[np.ndarray]:
        try:
            sequences = decode_record(data)
            if [len(s) for s in sequences] != self.lengths[row].tolist():
                raise ValueError("its lengths differ from lengths.npy")
        except ValueError as error:
            raise self._damaged(shard, record, str(error)) from error
        return sequences

    def _read_records(self, shard: int, records: list[int]) -> list[bytes]:
        reader = self._reader(shard)
        with self._lock:
            try:
                found = reader.read(records)
            except RuntimeError:
                found = []
            if len(found) == len(records):
                return found
            raise self._find_damage(shard, reader, records)

    def _find_damage(self, shard: int, reader: ArrayRecordReader, records: list[int]) -> UserError:
        # One bad record fails the whole call: look for it, to be able to name it.
        for record in records:
            try:
                found = reader.read([record])
            except RuntimeError as error:
                return self._damaged(shard, record, str(error))
            if len(found) != 1:
                return self._damaged(shard, record, "it cannot be read")
        return self._damaged(shard, records[0], "it was read only at the second attempt")

    def _reader(self, shard: int) -> ArrayRecordReader:
        if shard not in self._readers:
            path = self._paths[shard]
            if not path.is_file():
                raise UserError(f"{path} is missing: {REMEDY.format(folder=self.folder)}")
            reader = ArrayRecordReader(str(path), READER_OPTIONS)
            rows_per_shard = self.spec["rows_per_shard"]
            expected = min(rows_per_shard, len(self) - shard * rows_per_shard)
            found = reader.num_records() if reader.ok() else 0
            if found != expected:
                raise UserError(
                    f"{path} is cut short or damaged ({path.stat().st_size} bytes, {found} of "
                    f"{expected} records): {REMEDY.format(folder=self.folder)}"
                )
            self._readers[shard] = reader
        return self._readers[shard]

    def _damaged(self, shard: int, record: int, reason: str) -> UserError:
        return UserError(
            f"{self._paths[shard]}: record {record} is damaged ({reason}): "
            f"{REMEDY.format(folder=self.folder)}"
        )


def _read_spec(folder: Path) -> dict:
    path = folder / "spec.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: {folder} is not a token store; prepare the data first")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        claimed = spec["hash"]
        actual = canonical_hash({key: value for key, value in spec.items() if key != "hash"})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a token store spec ({error}): {REMEDY.format(folder=folder)}"
        ) from error
    if spec.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {spec.get('format')}, this version reads {FORMAT}: "
            f"{REMEDY.format(folder=folder)}"
        )
    if claimed != actual:
        raise UserError(
            f"{path} was changed after it was written (hash {claimed[:12]}, content "
            f"{actual[:12]}): {REMEDY.format(folder=folder)}"
        )
    return spec


def _shard_name(index: int, shards: int) -> str:
    return f"shard-{index:05d}-of-{shards:05d}.array_record"


def _array_hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<i4").tobytes()).hexdigest()
