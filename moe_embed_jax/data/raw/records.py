"""Reads raw files record by record; what cannot be read is a `Bad`, never an exception.

Files are opened through Beam's file systems, so a path may be local, gs://, s3:// or hdfs://.
"""

import contextlib
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from moe_embed_jax.data.raw.layouts import BadField, Texts
from moe_embed_jax.data.raw.sources import LANGUAGE, PLAIN, Part, Source

MAX_RAW = 10_000  # characters of a bad row kept in the quarantine
ROWS_PER_BATCH = 1024
MAX_DOCUMENT = 1 << 20  # bytes of a document of a text file; a longer one goes on as another


class Good(NamedTuple):
    """A pair as it was read; `line` counts from 1 (in Parquet and Arrow files: rows)."""

    line: int
    texts: Texts
    language: str


class Bad(NamedTuple):
    """A row that is no pair: where, why, and what stood there. `field` "" is the whole line."""

    file: str
    line: int
    field: str
    problem: str
    row: str


def row_language(source: Source, part: Part, record: dict) -> str:
    """Raises `BadField` if the row's own language is missing or no code."""
    if part.language:
        return part.language
    value = record.get(source.language_field)
    if not isinstance(value, str) or not LANGUAGE.fullmatch(value):
        raise BadField(source.language_field, f"must be a language code, got {value!r:.40}")
    return value


def records(path: str) -> Iterator[tuple[int, dict, str] | Bad]:
    """(line, record, its text) of a JSON lines, Parquet, Arrow or text file."""
    if path.endswith(PLAIN):
        yield from _documents(path)
    elif path.endswith(".parquet"):
        yield from _columnar(path, _parquet_batches)
    elif path.endswith(".arrow"):
        yield from _columnar(path, _arrow_batches)
    else:
        for line in lines(path):
            yield line if isinstance(line, Bad) else _parse(path, *line)


def lines(path: str) -> Iterator[tuple[int, bytes] | Bad]:
    """(number, line) of a text file, plain, .gz or .xz; a damaged file ends with a `Bad`."""
    number = 0
    with open_file(path) as file:
        stream = file
        if path.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=file)
        elif path.endswith(".xz"):
            stream = lzma.LZMAFile(file)  # noqa: SIM115 (the file itself is closed)
        try:
            for number, raw in enumerate(stream, start=1):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                yield number, raw.removesuffix(b"\n").removesuffix(b"\r")
        except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
            suffix = path[path.rindex(".") :]
            problem = (
                f"the {suffix} file is damaged or cut short here: what follows is lost ({error})"
            )
            yield Bad(path, number + 1, "", problem, "")


def _parse(path: str, number: int, raw: bytes) -> tuple[int, dict, str] | Bad:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = raw.decode("utf-8", errors="replace")[:MAX_RAW]
        return Bad(path, number, "", f"bad UTF-8 at byte {error.start + 1} of the line", shown)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = "empty line" if not text.strip() else f"bad JSON ({error})"
        return Bad(path, number, "", problem, text[:MAX_RAW])
    if not isinstance(value, dict):
        problem = f"must be a JSON object, is {type(value).__name__}"
        return Bad(path, number, "", problem, text[:MAX_RAW])
    return number, value, text


def _documents(path: str) -> Iterator[tuple[int, dict, str] | Bad]:
    """What stands between blank lines; `line` is the first of a document."""
    for line in _paragraphs(path):
        if isinstance(line, Bad):
            yield line
            continue
        number, raw = line
        try:
            text = raw.decode("utf-8")
            yield number, {"text": text}, text
        except UnicodeDecodeError as error:
            shown = raw.decode("utf-8", errors="replace")[:MAX_RAW]
            problem = f"bad UTF-8 at byte {error.start + 1} of the document"
            yield Bad(path, number, "", problem, shown)


def _paragraphs(path: str) -> Iterator[tuple[int, bytes] | Bad]:
    first, collected, size = 0, [], 0
    for line in lines(path):
        if isinstance(line, Bad):
            if collected:
                yield first, b"\n".join(collected)
            yield line
            return
        number, raw = line
        if raw.strip():
            first = first if collected else number
            collected.append(raw)
            size += len(raw)
        if collected and (size > MAX_DOCUMENT or not raw.strip()):
            yield first, b"\n".join(collected)
            collected, size = [], 0
    if collected:
        yield first, b"\n".join(collected)


def _columnar(path: str, batches) -> Iterator[tuple[int, dict, str] | Bad]:
    number = 0
    with open_file(path) as file:
        try:
            for batch in batches(file):
                for value in batch.to_pylist():
                    number += 1
                    raw = json.dumps(value, ensure_ascii=False, default=repr)
                    yield number, value, raw
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            problem = f"the file is damaged here: what follows is lost ({error})"
            yield Bad(path, number + 1, "", problem, "")


def _parquet_batches(file: BinaryIO) -> Iterator[pa.RecordBatch]:
    yield from pq.ParquetFile(file).iter_batches(ROWS_PER_BATCH)


def _arrow_batches(file: BinaryIO) -> Iterator[pa.RecordBatch]:
    yield from pa.ipc.open_stream(file)  # the form in which datasets.save_to_disk writes


@contextlib.contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """A file of any of Beam's file systems, as its bytes are."""
    file = FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)
    try:
        yield file
    finally:
        file.close()
