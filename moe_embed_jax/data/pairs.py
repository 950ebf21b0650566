"""Prepared folders of text pairs with hard negatives: random access, and writing a new one::

    folder = PairFolder("pairs")
    rows = folder.read(range(*folder.groups["wiki", "de"]))

    with PairWriter("filtered", about={"filter": ...}) as writer:
        for row in kept:  # in groups: all rows of a (source, language) one after the other
            writer.write(row)

launch/prepare.py makes such folders from raw text; filtering and mining make new ones from old.
Files and format: `pair_files`. TensorFlow is not imported.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_embed_jax.data.builders.text_rows import damaged, open_records
from moe_embed_jax.data.hashes import file_hash
from moe_embed_jax.data.pair_files import (
    PREFIX,
    PairRow,
    ShardWriter,
    count_row,
    decode_pair,
    empty_group,
    lengths_name,
    make_manifest,
    shard_name,
    write_tfds_metadata,
)
from moe_embed_jax.data.pair_manifest import MANIFEST, manifest_text, read_manifest
from moe_embed_jax.data.safe_names import check_name
from moe_embed_jax.errors import UserError
from moe_embed_jax.new_folder import FolderWriter

__all__ = ["PairFolder", "PairRow", "PairWriter"]

ROWS_PER_SHARD = 65536
_NAME = re.compile(r"[\w.:]+")  # as seqio names its tasks


class PairFolder:
    """The rows of a prepared folder, by number.

    Attributes:
      folder: where it lies.
      manifest: the content of manifest.json.
      groups: (source, language) -> (start, stop) of its rows, in the order of the rows.
      content_hash: stands for every row and its place.
      data_source: the undecoded records, a sequence of bytes.
    """

    def __init__(self, folder: str | os.PathLike):
        """Raises `UserError` where something is missing or damaged; names the file."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.content_hash: str = self.manifest["content_hash"]
        self.groups: dict[tuple[str, str], tuple[int, int]] = {
            (group["source"], group["language"]): (group["start"], group["stop"])
            for group in self.manifest["groups"]
        }
        for name, sha256 in self.manifest.get("metadata", {}).items():
            self._check(name, sha256)
        self.data_source = open_records(self.folder, PREFIX, self.manifest["rows"])

    def __len__(self) -> int:
        return self.manifest["rows"]

    def read(self, rows: Sequence[int] | np.ndarray) -> list[PairRow]:
        """The rows in the order asked for, repetitions allowed; batches are several times faster.

        Raises:
          IndexError: a row number is not in [0, len).
          UserError: a record is damaged; names the file and the record.
        """
        records = self.data_source.__getitems__(rows)
        found = []
        for row, record in zip(rows, records, strict=True):
            try:
                found.append(decode_pair(record))
            except ValueError as error:
                raise damaged(*self.data_source.locate(row), error) from error
        return found

    def lengths(self) -> np.ndarray:
        """int32 [rows, 3]: characters of query and document, number of negatives."""
        for shard in self.manifest["shards"]:
            self._check(shard["lengths"], shard["lengths_sha256"])
        parts = [np.load(self.folder / shard["lengths"]) for shard in self.manifest["shards"]]
        return np.concatenate(parts)

    def verify(self) -> None:
        """Reads every file once; raises `UserError` that names one which was changed."""
        for shard in self.manifest["shards"]:
            for name, key in (("file", "sha256"), ("lengths", "lengths_sha256")):
                self._check(shard[name], shard[key])

    def _check(self, name: str, sha256: str) -> None:
        path = self.folder / name
        if not path.is_file():
            raise damaged(path, None, "it is missing")
        if file_hash(path) != sha256:
            raise damaged(path, None, f"its SHA-256 is not the one in {MANIFEST}")


class PairWriter(FolderWriter):
    """Writes a new prepared folder next to `folder` and moves it there when all is written.

    Use as a context manager; an exception inside leaves nothing at `folder`. Rows come group by
    group: all rows of a (source, language) one after the other.

    Attributes:
      rows: the number of rows written so far.
      manifest: the content of manifest.json, once the folder is written.
      partial: what becomes `folder`; other files that are written here appear with it.
    """

    def __init__(
        self, folder: str | os.PathLike, about: dict, rows_per_shard: int = ROWS_PER_SHARD
    ):
        """`about`: where the pairs come from (JSON values), kept in the manifest.

        Raises `UserError` if there is something at `folder` already.
        """
        super().__init__(folder)
        if self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
            raise UserError(f"{self._folder} exists and is not empty: choose another folder")
        self._about = json.loads(json.dumps(about))
        self._rows_per_shard = rows_per_shard
        self._groups: dict[tuple[str, str], dict] = {}
        self._current: tuple[str, str] | None = None
        self._shards: list[dict] = []
        self.rows = 0
        self.manifest: dict = {}

    def write(self, row: PairRow) -> None:
        """Appends a row.

        Raises:
          UserError: a text is empty or has half of a surrogate pair, a source or a language has a
            bad name.
          RuntimeError: the row belongs to a group that was left before.
        """
        key = (row.source, row.language)
        if key != self._current:
            if not _NAME.fullmatch(row.source):
                raise UserError(
                    f"row {self.rows}: source {row.source!r} must be of letters, digits, _ . and :"
                )
            check_name(row.source, f"row {self.rows}: its source")
            check_name(row.language, f"row {self.rows}: its language")
            if key in self._groups:
                raise RuntimeError(f"row {self.rows}: group {key} was left before; sort the rows")
            self._groups[key] = empty_group(*key, self.rows)
            self._current = key
        if not (row.document and all(row.negatives)):  # a text alone has no query
            raise UserError(f"row {self.rows} of {row.source}/{row.language}: a text is empty")
        if self._writer is None:
            self._writer = ShardWriter(self.partial / f"shard-{len(self._shards):05d}")
        try:
            self._writer.write(row)
        except UnicodeEncodeError as error:
            raise UserError(
                f"row {self.rows} of {row.source}/{row.language}: no UTF-8 ({error})"
            ) from error
        count_row(self._groups[key], row)
        self.rows += 1
        if len(self._writer) == self._rows_per_shard:
            self._end_shard()

    def _end_shard(self) -> None:
        index = len(self._shards)
        self._shards.append(self._writer.finish(self.partial / f"lengths-{index:05d}"))
        self._writer = None

    def _finish(self) -> None:
        if not self.rows:
            raise UserError(f"no pair was written to {self._folder}: nothing is left")
        if self._writer is not None:
            self._end_shard()
        count = len(self._shards)
        for i in range(count):
            for part, name in (("shard", shard_name), ("lengths", lengths_name)):
                (self.partial / f"{part}-{i:05d}").rename(self.partial / name(i, count))
        manifest = make_manifest(self._shards, self._groups.values(), self._about)
        self.manifest = write_tfds_metadata(self.partial, manifest)
        (self.partial / MANIFEST).write_text(manifest_text(self.manifest), encoding="utf-8")
