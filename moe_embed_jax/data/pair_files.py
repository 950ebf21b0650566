"""The files of a prepared folder of text pairs; `pairs` reads and writes whole folders.

    pairs-train.array_record-00000-of-00008  one tf.train.Example per pair
    lengths-00000-of-00008.npy               int32 [rows, 3], see `LENGTHS`
    dataset_info.json, features.json         so that tfds.builder_from_directory reads the folder
    manifest.json                            counts, ranges, checksums; written last

A shard is a function of its rows alone, byte for byte. TensorFlow is not imported.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from moe_embed_jax.data import triton_first  # noqa: F401  # isort: skip
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from moe_embed_jax.data.hashes import file_hash
from moe_embed_jax.data.pair_manifest import FORMAT, content_hash, sealed

NAME = "pairs"
SPLIT = "train"
PREFIX = f"{NAME}-{SPLIT}"
METADATA = ("dataset_info.json", "features.json")  # of TFDS
TEXTS = ("query", "document", "source", "language")
# Columns of the lengths index: characters of query and document, number of negatives.
LENGTHS = ("query_characters", "document_characters", "negatives")
# 16 records per compressed chunk halve the size of one, and cost little in random access.
_WRITER_OPTIONS = "group_size:16"


class PairRow(NamedTuple):
    """One pair with its hard negatives; `language` is that of the document."""

    query: str
    document: str
    negatives: tuple[str, ...]
    source: str
    language: str


def encode_pair(row: PairRow) -> bytes:
    """`row` as a tf.train.Example, the same bytes for the same row.

    Raises `UnicodeEncodeError` for a text that UTF-8 cannot hold (half of a surrogate pair).
    """
    feature = {name: _bytes_feature([text]) for name, text in zip(TEXTS, _texts(row), strict=True)}
    feature["negatives"] = _bytes_feature(row.negatives)
    features = tf_feature_pb2.Features(feature=feature)
    return tf_example_pb2.Example(features=features).SerializeToString(deterministic=True)


def decode_pair(record: bytes) -> PairRow:
    """The inverse of `encode_pair`; raises `ValueError` for damaged bytes."""
    try:
        feature = tf_example_pb2.Example.FromString(record).features.feature
        query, document, source, language = (
            feature[name].bytes_list.value[0].decode("utf-8") for name in TEXTS
        )
        values = feature["negatives"].bytes_list.value
        return PairRow(query, document, tuple(v.decode("utf-8") for v in values), source, language)
    except (DecodeError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error


def _texts(row: PairRow) -> tuple[str, str, str, str]:
    return row.query, row.document, row.source, row.language


def _bytes_feature(texts: Sequence[str]) -> tf_feature_pb2.Feature:
    value = [text.encode("utf-8") for text in texts]
    return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=value))


class ShardWriter:
    """Writes the records of one shard to `path` and counts them."""

    def __init__(self, path: Path):
        self.path = path
        self._writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        self._lengths: list[tuple[int, int, int]] = []
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def write(self, row: PairRow) -> None:
        record = encode_pair(row)
        self._writer.write(record)
        self._lengths.append((len(row.query), len(row.document), len(row.negatives)))
        self._bytes += len(record)

    def close(self) -> None:
        """Ends the file without its entry (after an error)."""
        self._writer.close()

    def finish(self, lengths_path: Path) -> dict:
        """Closes the file, writes its lengths; returns its entry in the manifest, but the name."""
        self._writer.close()
        lengths = np.array(self._lengths, np.int32).reshape(-1, len(LENGTHS))
        with open(lengths_path, "wb") as file:
            np.save(file, lengths)
        return {
            "rows": len(self),
            "bytes": self._bytes,
            "sha256": file_hash(self.path),
            "lengths_sha256": file_hash(lengths_path),
        }


def shard_name(index: int, shards: int) -> str:
    return f"{PREFIX}.array_record-{index:05d}-of-{shards:05d}"


def lengths_name(index: int, shards: int) -> str:
    return f"lengths-{index:05d}-of-{shards:05d}.npy"


def empty_group(source: str, language: str, start: int) -> dict:
    """The manifest's entry of a group that begins at row `start`."""
    sums = dict.fromkeys(LENGTHS, 0)
    return {"source": source, "language": language, "start": start, "stop": start, **sums}


def count_row(group: dict, row: PairRow) -> None:
    """Counts a row in the entry of its group."""
    group["stop"] += 1
    for name, value in zip(
        LENGTHS, (len(row.query), len(row.document), len(row.negatives)), strict=True
    ):
        group[name] += value


def make_manifest(shards: Iterable[dict], groups: Iterable[dict], about: dict) -> dict:
    """The content of manifest.json.

    Args:
      shards: entries of `ShardWriter.finish`, in the order of the rows.
      groups: source, language, start, stop and sums over the rows; they cover all rows in order.
      about: where the pairs come from; no part of the content hash, which stands for the rows.

    Raises `RuntimeError` if the groups and the shards do not hold the same rows.
    """
    shards, groups = list(shards), list(groups)
    rows = sum(shard["rows"] for shard in shards)
    stops = [0, *(group["stop"] for group in groups)]
    if [group["start"] for group in groups] != stops[:-1] or stops[-1] != rows:
        raise RuntimeError(f"the groups end at row {stops[-1]} of {rows}, or are not in order")
    names = [(shard_name(i, len(shards)), lengths_name(i, len(shards))) for i in range(len(shards))]
    entries = [
        {"file": name, "lengths": lengths, **shard}
        for (name, lengths), shard in zip(names, shards, strict=True)
    ]
    return {
        "format": FORMAT,
        "rows": rows,
        "languages": sorted({group["language"] for group in groups}),
        "groups": groups,
        "shards": entries,
        "about": about,
        "content_hash": content_hash(groups, entries),
    }


def write_tfds_metadata(folder: Path, manifest: dict) -> dict:
    """Writes dataset_info.json and features.json of TFDS for the shards of `manifest`; returns the
    manifest with their hashes."""
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
            version=tfds.core.Version(f"{FORMAT}.0.0"),
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
