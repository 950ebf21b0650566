"""The tokenised data of one (mixture, vocabulary, lengths): what the training process reads.

A folder of ArrayRecord shards for the tokens, two small index arrays, and `spec.json`. Reading is
random access and never imports TensorFlow. A store is written once, atomically; from then on it
does not change, and its `spec["hash"]` stands for every token in it.

    shard-00000-of-00008.array_record    one record per row (a pair)
    lengths.npy       int32 [rows, 2]    tokens of the query and of the document, <s> </s> included
    content_ids.npy   int32 [rows, 2, 2] 64-bit content hashes of query and document (two int32)
    spec.json         what is in here, see `TokenStoreWriter`

and where rows have hard negatives, J in all, those of the first row first:

    negative_starts.npy    int64 [rows + 1] where those of a row begin; the last is J
    negative_lengths.npy   int32 [J]
    negative_ids.npy       int32 [J, 2]     content hashes

and where some of them have scores of a teacher (NaN where one is not known):

    document_scores.npy    float32 [rows]
    negative_scores.npy    float32 [J]

Records: `token_records`.
"""

import concurrent.futures
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from moe_embed_jax import storage
from moe_embed_jax.data.token_records import (
    FORMAT,
    Negatives,
    decode_record,
    encode_records,
    no_negatives,
)
from moe_embed_jax.errors import UserError
from moe_embed_jax.hashes import canonical_hash
from moe_embed_jax.new_folder import FolderWriter

SPEC = "spec.json"
INDEX = ("lengths", "content_ids")
NEGATIVE_INDEX = {"negative_starts": "<i8", "negative_lengths": "<i4", "negative_ids": "<i4"}
SCORE_INDEX = ("document_scores", "negative_scores")  # "<f4"
ROWS_PER_SHARD = 65536
# 16 records per compressed chunk halve the size of one; a random batch of 256 takes 3 ms.
WRITER_OPTIONS = "group_size:16"
# Read-ahead is for sequential reading; a batch is random access.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
OPENED_AT_ONCE = 16  # shards: in a bucket each waits for some requests
REMEDY = "delete {folder} and prepare the data again"


class TokenStoreWriter(FolderWriter):
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
        super().__init__(folder, last=SPEC, replace=True)
        self._spec = dict(spec)
        self._rows_per_shard = rows_per_shard
        self._groups: list[dict] = []
        self.rows = 0
        self._lengths: list[np.ndarray] = []
        self._content_ids: list[np.ndarray] = []
        self._negatives: list[Negatives] = []
        self._document_scores: list[np.ndarray] = []
        self._records_sha256 = hashlib.sha256()
        self._shards: list[Path] = []

    def start_group(self, task: str, language: str, rate: float) -> None:
        """The rows that follow belong to this task and language, sampled with weight `rate`."""
        self._close_group()
        self._groups.append(
            {"task": task, "language": language, "start": self.rows, "rate": float(rate)}
        )

    def write(self, sequences: Sequence[np.ndarray], content_ids: np.ndarray) -> None:
        """Appends a row: query, document and its hard negatives, if any.

        One int token sequence and one int32 [2] content id per text.
        """
        ids = [np.asarray(sequence, np.int32) for sequence in sequences]
        sizes = np.array([len(sequence) for sequence in ids], np.int64)
        content_ids = np.asarray(content_ids)
        negatives = Negatives(
            np.concatenate([np.zeros(0, np.int32), *ids[2:]]),
            sizes[2:],
            content_ids[2:],
            np.array([len(ids) - 2]),
        )
        self.write_batch(ids[:2], sizes[np.newaxis, :2], content_ids[np.newaxis, :2], negatives)

    def write_batch(
        self,
        ids: Sequence[np.ndarray],
        lengths: np.ndarray,
        content_ids: np.ndarray,
        negatives: Negatives | None = None,
        document_scores: np.ndarray | None = None,
    ) -> None:
        """Appends n rows, the same as n calls of `write` and much faster.

        Args:
          ids: two arrays; the tokens of all queries one after the other, of all documents.
          lengths: [n, 2] how many tokens belong to each text.
          content_ids: int32 [n, 2, 2].
          negatives: of these rows; None: they have none.
          document_scores: float32 [n] of a teacher, NaN where none is known; None: nowhere.
        """
        if not self._groups:
            raise RuntimeError("call start_group before write")
        if negatives is None:
            negatives = no_negatives(len(lengths))
        for record in encode_records(ids, lengths, negatives):
            if self.rows % self._rows_per_shard == 0:
                self._open_shard()
            self._writer.write(record)
            self._records_sha256.update(record)
            self.rows += 1
        self._lengths.append(lengths.astype(np.int32))
        self._content_ids.append(content_ids.astype(np.int32))
        own, scores = document_scores, negatives.scores
        if scores is None:
            scores = np.full(len(negatives.lengths), np.nan)
        self._negatives.append(negatives._replace(tokens=np.zeros(0, np.int32), scores=scores))
        self._document_scores.append(np.full(len(lengths), np.nan) if own is None else own)

    def write_json(self, name: str, value: dict) -> None:
        """Stores `value` beside the data; it is no part of the spec or its hash."""
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        (self.partial / name).write_text(text, encoding="utf-8")

    def _close_group(self) -> None:
        if self._groups:
            self._groups[-1]["stop"] = self.rows

    def _open_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._shards.append(self.partial / f"shard-{len(self._shards):05d}")
        self._writer = ArrayRecordWriter(str(self._shards[-1]), WRITER_OPTIONS)

    def _finish(self) -> None:
        if not self.rows:
            raise UserError(f"no row was written to {self._folder}: the chosen data is empty")
        self._close_group()
        self._writer.close()
        for index, shard in enumerate(self._shards):
            shard.rename(self.partial / _shard_name(index, len(self._shards)))
        arrays = self._index_arrays()
        for name, array in arrays.items():
            with (self.partial / f"{name}.npy").open("wb") as file:
                np.save(file, array)
        spec = {
            **self._spec,
            "format": FORMAT,
            "rows": self.rows,
            "shards": len(self._shards),
            "rows_per_shard": self._rows_per_shard,
            "groups": [group for group in self._groups if group["stop"] > group["start"]],
            "content": {
                "records": self._records_sha256.hexdigest(),
                **{name: _array_hash(array) for name, array in arrays.items()},
            },
        }
        spec["hash"] = canonical_hash(spec)
        # The spec is written last: a folder without it is not a store.
        text = json.dumps(spec, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        (self.partial / SPEC).write_text(text, encoding="utf-8")

    def _index_arrays(self) -> dict[str, np.ndarray]:
        lengths, content_ids = (np.concatenate(p) for p in (self._lengths, self._content_ids))
        arrays = {"lengths": lengths, "content_ids": content_ids}
        counts = np.concatenate([negatives.counts for negatives in self._negatives])
        if counts.any():  # else the store is what it was before there were any
            starts = np.concatenate([[0], np.cumsum(counts)])
            negative_lengths = np.concatenate([n.lengths for n in self._negatives])
            negative_ids = np.concatenate([n.content_ids for n in self._negatives])
            values = (starts, negative_lengths, negative_ids)
            for (name, dtype), value in zip(NEGATIVE_INDEX.items(), values, strict=True):
                arrays[name] = value.astype(dtype)
        parts = self._document_scores, [negatives.scores for negatives in self._negatives]
        scores = [np.concatenate(part).astype("<f4") for part in parts]
        if any(np.isfinite(array).any() for array in scores):
            arrays |= dict(zip(SCORE_INDEX, scores, strict=True))
        return arrays


class TokenStore:
    """Random access to a prepared token store. Open with `TokenStore.open(folder)`.

    Attributes:
      folder: where it lies.
      spec: the content of spec.json; `spec["hash"]` is the data-spec hash of checkpoints.
      groups: `spec["groups"]`: dicts with task, language, start, stop, rate; contiguous rows.
      lengths: int32 [rows, 2] tokens of query and document.
      content_ids: int32 [rows, 2, 2].
      negative_starts: int64 [rows + 1]: row i has the hard negatives starts[i]..starts[i + 1] - 1.
      negative_lengths: int32 [J] tokens of every hard negative.
      negative_ids: int32 [J, 2] content ids of the same.
      document_scores, negative_scores: float32 [rows], [J] of a teacher, NaN where none is known.
    """

    def __init__(self, folder: Path, spec: dict, arrays: dict[str, np.ndarray]):
        self.folder = folder
        self.spec = spec
        self.groups: list[dict] = spec["groups"]
        self.lengths = arrays["lengths"]
        self.content_ids = arrays["content_ids"]
        none = (
            np.zeros(len(self) + 1, np.int64),
            np.zeros(0, np.int32),
            np.zeros((0, 2), np.int32),
        )
        self.negative_starts, self.negative_lengths, self.negative_ids = (
            arrays.get(name, empty) for name, empty in zip(NEGATIVE_INDEX, none, strict=True)
        )
        counts = zip(SCORE_INDEX, (len(self), len(self.negative_lengths)), strict=True)
        self.document_scores, self.negative_scores = (
            arrays.get(name, np.full(count, np.nan, np.float32)) for name, count in counts
        )
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
        folder = storage.path(folder)
        spec = read_spec(folder)
        arrays = {}
        for name in [n for n in (*INDEX, *NEGATIVE_INDEX, *SCORE_INDEX) if n in spec["content"]]:
            path = folder / f"{name}.npy"
            try:
                with path.open("rb") as file:
                    array = np.load(file)
            # NumPy reads the shape by Python's tokenizer, and believes it.
            except (OSError, ValueError, EOFError, TokenError, SyntaxError, MemoryError) as error:
                reason = "is missing" if not path.exists() else f"cannot be read ({error})"
                raise UserError(f"{path} {reason}: {REMEDY.format(folder=folder)}") from error
            is_whole = name not in INDEX or array.shape[0] == spec["rows"]
            if not is_whole or _array_hash(array) != spec["content"][name]:
                raise UserError(
                    f"{path} is not the one {SPEC} was written with: {REMEDY.format(folder=folder)}"
                )
            arrays[name] = array
        store = cls(folder, spec, arrays)
        with concurrent.futures.ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
            list(pool.map(store._reader, range(spec["shards"])))
        return store

    def __len__(self) -> int:
        return self.spec["rows"]

    def read(self, rows: np.ndarray | Iterable[int]) -> list[list[np.ndarray]]:
        """The token sequences of `rows`, in that order, int32: [query, document, negatives...].

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
            start, stop = self.negative_starts[row : row + 2]
            expected = [*self.lengths[row].tolist(), *self.negative_lengths[start:stop].tolist()]
            if [len(s) for s in sequences] != expected:
                raise ValueError("its lengths differ from lengths.npy")
        except ValueError as error:
            raise self._damaged(shard, record, str(error)) from error
        return sequences

    def _read_records(self, shard: int, records: list[int]) -> list[bytes]:
        reader = self._reader(shard)
        with self._lock:
            try:
                found = self._read(shard, reader, records)
            except RuntimeError:
                found = []
            if len(found) == len(records):
                return found
            raise self._find_damage(shard, reader, records)

    def _read(self, shard: int, reader: ArrayRecordReader, records: list[int]) -> list[bytes]:
        return storage.read_by_library(self._paths[shard], lambda: reader.read(records))

    def _find_damage(self, shard: int, reader: ArrayRecordReader, records: list[int]) -> UserError:
        # One bad record fails the whole call: look for it, to be able to name it.
        for record in records:
            try:
                found = self._read(shard, reader, [record])
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
            reader = storage.read_by_library(
                path, lambda: ArrayRecordReader(str(path), READER_OPTIONS)
            )
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


def read_spec(folder: Path) -> dict:
    """spec.json of a token store. Raises `UserError`: missing, damaged or of another format."""
    path = folder / SPEC
    if not path.is_file():
        raise UserError(f"{path} is missing: {folder} is not a token store; prepare the data first")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        claimed = spec["hash"]
        actual = canonical_hash({key: value for key, value in spec.items() if key != "hash"})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a token store spec ({error}): {REMEDY.format(folder=folder)}"
        ) from error
    if spec.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {spec.get('format')!r:.40}, this version reads {FORMAT}: "
            f"{REMEDY.format(folder=folder)}"
        )
    if claimed != actual:
        raise UserError(
            f"{path} was changed after it was written (hash {claimed!s:.12}, content "
            f"{actual[:12]}): {REMEDY.format(folder=folder)}"
        )
    return spec


def _shard_name(index: int, shards: int) -> str:
    return f"shard-{index:05d}-of-{shards:05d}.array_record"


def _array_hash(array: np.ndarray) -> str:
    dtype = {"i8": "<i8", "f4": "<f4"}.get(array.dtype.str[1:], "<i4")
    return hashlib.sha256(np.ascontiguousarray(array, dtype=dtype).tobytes()).hexdigest()
