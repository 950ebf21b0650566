"""Writes prepared folders of text pairs::

    with PairWriter("filtered", about={"filter": ...}) as writer:
        for row in kept:  # in groups: all rows of a (source, language) one after the other
            writer.write(row)

    pairs-train.array_record-00000-of-00008  one tf.train.Example per pair
    lengths-00000-of-00008.npy               int32 [rows, 3], see `LENGTHS`
    dataset_info.json, features.json         so that tfds.builder_from_directory reads the folder
    manifest.json                            counts, ranges, checksums; written last

A shard is a function of its rows alone, byte for byte. TensorFlow is not imported.
"""

import json
import os
import re
from pathlib import Path

from moe_embed_jax import triton_first  # noqa: F401  # isort: skip
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from moe_embed_jax.errors import UserError
from moe_embed_jax.hashes import file_hash
from moe_embed_jax.new_folder import FolderWriter
from moe_embed_jax.pairs.manifest import (
    LENGTHS,
    MANIFEST,
    NAME,
    SPLIT,
    count_row,
    empty_group,
    lengths_name,
    make_manifest,
    manifest_text,
    sealed,
    shard_name,
)
from moe_embed_jax.pairs.row import TEXTS, PairRow, encode_pair
from moe_embed_jax.safe_names import check_name

ROWS_PER_SHARD = 65536
METADATA = ("dataset_info.json", "features.json")  # of TFDS
# 16 records per compressed chunk halve the size of one, and cost little in random access.
_WRITER_OPTIONS = "group_size:16"
_SOURCE_NAME = re.compile(r"[\w.:]+")  # as seqio names its tasks


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
        super().__init__(folder, last=MANIFEST)
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
            if not _SOURCE_NAME.fullmatch(row.source):
                raise UserError(
                    f"row {self.rows}: source {row.source!r} must be of letters, digits, _ . and :"
                )
            check_name(row.source, f"row {self.rows}: its source")
            check_name(row.language, f"row {self.rows}: its language")
            if key in self._groups:
                raise RuntimeError(f"row {self.rows}: group {key} was left before; sort the rows")
            self._groups[key] = empty_group(*key, self.rows)
            self._current = key
        if row.scores and len(row.scores) != 1 + len(row.negatives):
            raise UserError(
                f"row {self.rows} of {row.source}/{row.language}: {len(row.scores)} scores of "
                f"{1 + len(row.negatives)} documents"
            )
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


class ShardWriter:
    """Writes the records of one shard to `path` and counts them."""

    def __init__(self, path: Path):
        self.path = path
        self._writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        self._lengths: list[tuple[int, int, int]] = []
        self._bytes = self._scored = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def write(self, row: PairRow) -> None:
        record = encode_pair(row)
        self._writer.write(record)
        self._lengths.append((len(row.query), len(row.document), len(row.negatives)))
        self._bytes += len(record)
        self._scored += bool(row.scores)

    def close(self) -> None:
        """Ends the file without its entry (after an error)."""
        self._writer.close()

    def finish(self, lengths_path: Path) -> dict:
        """Closes the file, writes its lengths; returns its entry in the manifest, but the name."""
        self._writer.close()
        lengths = np.array(self._lengths, np.int32).reshape(-1, len(LENGTHS))
        with lengths_path.open("wb") as file:
            np.save(file, lengths)
        return {
            "rows": len(self),
            "bytes": self._bytes,
            "sha256": file_hash(self.path),
            "lengths_sha256": file_hash(lengths_path),
            **({"scored": self._scored} if self._scored else {}),
        }


def write_tfds_metadata(folder: Path, manifest: dict) -> dict:
    """Writes dataset_info.json and features.json of TFDS for the shards of `manifest`; returns the
    manifest with their hashes.

    Scores are left out: TFDS wants them in every row, and only some have them.
    """
    text = tfds.features.Text
    features = {**{name: text() for name in TEXTS}, "negatives": tfds.features.Sequence(text())}
    template = tfds.core.ShardedFileTemplate(
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        dataset_name=NAME,
        data_dir=folder,
        split=SPLIT,
        filetype_suffix="array_record",
    )
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[shard["rows"] for shard in manifest["shards"]],
        num_bytes=sum(shard["bytes"] for shard in manifest["shards"]),
        filename_template=template,
    )
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name=NAME,
            version=tfds.core.Version(f"{manifest['format']}.0.0"),
            data_dir=str(folder),
            module_name=__name__,
        ),
        description="Text pairs (query, document) with hard negatives.",
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(folder)
    return sealed(manifest, {name: file_hash(folder / name) for name in METADATA})
