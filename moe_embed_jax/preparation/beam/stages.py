"""What Beam's workers do: read an input file, write a bucket, write a shard.

Each leaves its result in the work folder and a marker behind it, so that a bundle that is run twice
does no harm and a finished one is never run again.
"""

import collections
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np
import pyarrow as pa

from moe_embed_jax.pairs.row import PairRow
from moe_embed_jax.preparation.beam import work_folder as work_module
from moe_embed_jax.preparation.beam.buckets import (
    buckets_of,
    from_bytes,
    piece,
    to_bytes,
    without_duplicates,
)
from moe_embed_jax.preparation.beam.sources import Part, Source
from moe_embed_jax.preparation.beam.work_folder import Work, bucket_name, part_name, shard_work_name
from moe_embed_jax.preparation.pair_writer import ShardWriter

SUMS = ("query_characters", "document_characters", "query_bytes", "document_bytes", "negatives")
TOKEN_SUMS = ("query_tokens", "document_tokens")


class ReadParts(beam.DoFn):
    """Part number -> its pairs and its bad rows in work/read."""

    def __init__(
        self,
        work: Work,
        sources: list[Source],
        parts: list[Part],
        vocabulary: tuple[str, bytes] | None,
    ):
        """`vocabulary`: name and content of its file."""
        self._work = work
        self._sources = sources
        self._parts = parts
        self._vocabulary_file = vocabulary
        self._vocabulary = None

    def setup(self):
        if self._vocabulary_file is not None:
            from moe_embed_jax.tokenizers.tokenizer_json import open_vocabulary

            name, content = self._vocabulary_file
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / pathlib.PurePosixPath(name).name
                path.write_bytes(content)
                self._vocabulary = open_vocabulary(path)

    def process(self, part: int):
        from moe_embed_jax.preparation.beam import task as tasks  # TensorFlow

        source = self._parts[part].source
        own = [number for number, p in enumerate(self._parts) if p.source == source]
        task = tasks.make_task(
            self._sources[source], [self._parts[number] for number in own], self._vocabulary
        )
        name = part_name(part)
        languages: collections.Counter[str] = collections.Counter()
        path = self._work.path("read", f"{name}.parquet")
        position = bad = dropped = 0
        first_bad = None
        with (
            work_module.table_writer(path) as writer,
            work_module.written_whole(self._work.path("read", f"{name}.bad")) as quarantine,
        ):
            for batch in tasks.read_shard(task, own.index(part)):
                table = piece(batch, part, position)
                writer.write_table(table)
                languages.update(table["language"].to_pylist())
                for entry in _bad_rows(task.name, batch):
                    quarantine.write(entry)
                    first_bad = first_bad or json.loads(entry)
                    bad += 1
                position += len(batch["line"])
                dropped += int(batch["dropped"].sum())
        if first_bad is not None:
            first_bad.pop("row")
        marker = {
            "source": source,
            "file": self._parts[part].path,
            "rows": position,
            "bad": bad,
            "dropped_negatives": dropped,
            "first_bad": first_bad,
            "bytes": work_module.size(path),
            "languages": dict(sorted(languages.items())),
        }
        self._work.mark("read", name, marker, (".parquet", ".bad"))
        yield part


def _bad_rows(source: str, batch: dict[str, np.ndarray]) -> Iterator[bytes]:
    for row in np.flatnonzero(batch["problem"] != b"").tolist():
        entry = {"source": source}
        for name in ("file", "line", "field", "problem", "row"):
            value = batch[name][row]
            entry[name] = int(value) if name == "line" else value.decode("utf-8")
        yield json.dumps(entry, ensure_ascii=False).encode("utf-8") + b"\n"


class SpreadParts(beam.DoFn):
    """Part number -> ((source, bucket), rows as bytes), for the wanted buckets of its source."""

    def __init__(
        self, work: Work, parts: list[Part], buckets: dict[int, int], wanted: dict[int, list[int]]
    ):
        """`buckets`: source -> how many it has; `wanted`: source -> those to write."""
        self._work = work
        self._parts = parts
        self._buckets = buckets
        self._wanted = wanted

    def process(self, part: int):
        source = self._parts[part].source
        path = self._work.checked("read", part_name(part), ".parquet")
        with work_module.open_table(path) as parquet:
            for batch in parquet.iter_batches(work_module.ROWS_PER_ROW_GROUP * 16):
                table = pa.Table.from_batches([batch])
                bucket_of_row = buckets_of(table, self._buckets[source])
                order = np.argsort(bucket_of_row, kind="stable")
                table, bucket_of_row = table.take(pa.array(order)), bucket_of_row[order]
                for bucket in np.intersect1d(bucket_of_row, self._wanted[source]).tolist():
                    start, stop = np.searchsorted(bucket_of_row, [bucket, bucket + 1]).tolist()
                    yield (source, bucket), to_bytes(table.slice(start, stop - start))


class WriteBuckets(beam.DoFn):
    """((source, bucket), rows) -> the bucket without duplicates in work/buckets."""

    def __init__(self, work: Work):
        self._work = work

    def process(self, element: tuple[tuple[int, int], Iterable[bytes]]):
        (source, bucket), pieces = element
        table = pa.concat_tables([from_bytes(data) for data in pieces])
        rows = table.num_rows
        table, removed = without_duplicates(table)
        name = bucket_name(source, bucket)
        with work_module.table_writer(self._work.path("buckets", f"{name}.parquet")) as writer:
            writer.write_table(table, row_group_size=work_module.ROWS_PER_ROW_GROUP)
        marker = {
            "source": source,
            "bucket": bucket,
            "rows": rows,
            "removed": removed,
            "languages": _sums(table),
        }
        self._work.mark("buckets", name, marker)
        yield name


def _sums(table: pa.Table) -> dict[str, dict[str, int]]:
    """language -> number of rows, characters, bytes, tokens."""
    languages: dict[str, dict[str, int]] = {}
    columns = [
        table[name].to_pylist()
        for name in ("language", "query", "document", "negatives", *TOKEN_SUMS)
    ]
    for language, query, document, negatives, *tokens in zip(*columns, strict=True):
        entry = languages.setdefault(language, dict.fromkeys(("rows", *SUMS, *TOKEN_SUMS), 0))
        values = (
            1,
            len(query),
            len(document),
            len(query.encode("utf-8")),
            len(document.encode("utf-8")),
            len(negatives),
            *tokens,
        )
        for name, value in zip(entry, values, strict=True):
            entry[name] += value
    return languages


class WriteShards(beam.DoFn):
    """(shard, pieces of buckets) -> the finished shard in work/shards.

    A piece is (source number, bucket, start, stop): rows of the bucket's file.
    """

    def __init__(self, work: Work, sources: list[Source]):
        self._work = work
        self._names = [source.name for source in sources]

    def process(self, element: tuple[int, list[tuple[int, int, int, int]]]):
        shard, ranges = element
        name = shard_work_name(shard)
        with tempfile.TemporaryDirectory() as folder:
            records, lengths = pathlib.Path(folder) / "records", pathlib.Path(folder) / "lengths"
            writer = ShardWriter(records)
            for source, bucket, start, stop in ranges:
                path = self._work.path("buckets", f"{bucket_name(source, bucket)}.parquet")
                for row in work_module.read_rows(path, start, stop).to_pylist():
                    writer.write(
                        PairRow(
                            row["query"],
                            row["document"],
                            tuple(row["negatives"]),
                            self._names[source],
                            row["language"],
                            tuple(row["scores"]),
                        )
                    )
            marker = writer.finish(lengths)
            for path, suffix in ((records, "array_record"), (lengths, "npy")):
                copy(path, self._work.path("shards", f"{name}.{suffix}"))
        self._work.mark("shards", name, marker)
        yield shard


def copy(path: pathlib.Path, target: str) -> None:
    """A local file to any of Beam's file systems."""
    with path.open("rb") as source, work_module.written_whole(target) as file:
        shutil.copyfileobj(source, file)
