"""Reads raw files record by record; what cannot be read is a `Bad`, never an exception.

Files are opened through Beam's file systems, so a path may be local, gs://, s3:// or hdfs://; see
also `sources.in_bucket`.
"""

import contextlib
import gzip
import io
import json
import lzma
import posixpath
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from moe_embed_jax.data.bounded_lines import (
    BadArray,
    buffered,
    split_array,
    split_lines,
    starts_array,
    too_long,
)
from moe_embed_jax.data.text_files import is_json_file
from moe_embed_jax.errors import UserError
from moe_embed_jax.preparation.beam.columnar import Damaged, read_rows
from moe_embed_jax.preparation.beam.formats import BadField, Texts
from moe_embed_jax.preparation.beam.sources import (
    COLUMNAR,
    LANGUAGE,
    PLAIN,
    Part,
    Source,
    in_bucket,
)

MAX_RAW = 10_000  # characters of a bad row kept in the quarantine
ROWS_PER_BATCH = 1024  # that seqio's tasks pass on together
MAX_DOCUMENT = 1 << 20  # bytes of a document of a text file; the rest of a longer one is another


class Good(NamedTuple):
    """A pair as it was read; `line` counts from 1 (in Parquet and Arrow files: rows).

    dropped: how many of its negatives were left out, see `formats.with_usable_negatives`.
    """

    line: int
    texts: Texts
    dropped: int
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
    """(line, record, its text) of a JSON, Parquet, Arrow, Feather or text file.

    Blank lines of JSON lines are skipped. A .json file may be one array of records.
    """
    if path.endswith(PLAIN):
        yield from _documents(path)
    elif path.endswith(COLUMNAR):
        yield from _columnar(path)
    elif is_json_file(path) and _holds_array(path):
        yield from _array(path)
    else:
        for line in lines(path):
            if isinstance(line, Bad):
                yield line
            elif line[1].strip():
                yield _parse(path, *line)


_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)


def lines(path: str) -> Iterator[tuple[int, bytes] | Bad]:
    """(number, line) of a text file, plain, .gz or .xz; a damaged file ends with a `Bad`."""
    number = 0
    try:
        with _opened(path) as file:
            for number, raw in enumerate(split_lines(file), start=1):
                if raw is None:
                    yield Bad(path, number, "", f"the line is {too_long()}", "")
                    continue
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                yield number, raw.removesuffix(b"\n").removesuffix(b"\r")
    except _DAMAGE as error:
        yield _damaged(path, number + 1, error)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[io.BufferedReader]:
    """The content of a file, decompressed.

    Raises `UserError` for a file of this machine that cannot be read; Beam tries others again.
    """
    with _named_errors(path), open_file(path) as stream:
        if path.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=stream)
        elif path.endswith(".xz"):
            stream = lzma.LZMAFile(stream)  # noqa: SIM115 (the file itself is closed)
        with buffered(stream) as file:
            yield file


@contextlib.contextmanager
def _named_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if "://" in path or isinstance(error, gzip.BadGzipFile):
            raise
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _damaged(path: str, line: int, error: Exception) -> Bad:
    what = f"{posixpath.splitext(path)[1]} file"
    problem = f"the {what} is damaged or cut short here: what follows is lost ({error})"
    return Bad(path, line, "", problem, "")


def _holds_array(path: str) -> bool:
    try:
        with _opened(path) as file:
            return starts_array(file)
    except _DAMAGE:
        return False  # `lines` says what is wrong


def _array(path: str) -> Iterator[tuple[int, dict, str] | Bad]:
    line = 1
    try:
        with _opened(path) as file:
            for line, text in split_array(file):
                yield _record(path, line, json.loads(text), text)
    except BadArray as error:
        yield Bad(path, error.line, "", f"{error}; what follows is lost", "")
    except _DAMAGE as error:
        yield _damaged(path, line, error)


def _parse(path: str, number: int, raw: bytes) -> tuple[int, dict, str] | Bad:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = raw.decode("utf-8", errors="replace")[:MAX_RAW]
        return Bad(path, number, "", f"bad UTF-8 at byte {error.start + 1} of the line", shown)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Bad(path, number, "", f"bad JSON ({error})", text[:MAX_RAW])
    return _record(path, number, value, text)


def _record(path: str, number: int, value, text: str) -> tuple[int, dict, str] | Bad:
    if isinstance(value, dict):
        return number, value, text
    problem = f"must be a JSON object, is {type(value).__name__}"
    return Bad(path, number, "", problem, text[:MAX_RAW])


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


def _columnar(path: str) -> Iterator[tuple[int, dict, str] | Bad]:
    number = 0
    with _named_errors(path), _local(path) as local:
        try:
            for text in read_rows(local):
                number += 1
                if text is None:
                    yield Bad(path, number, "", f"the row is {too_long()}", "")
                else:
                    yield number, json.loads(text), text
        except Damaged as error:
            problem = f"the file is damaged here: what follows is lost ({error})"
            yield Bad(path, number + 1, "", problem, "")


@contextlib.contextmanager
def _local(path: str) -> Iterator[str]:
    """The path of a file on this machine: its own, or that of a copy."""
    if "://" not in path:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder, open_file(path) as source:
        copy = Path(folder) / f"rows{posixpath.splitext(path)[1]}"
        with copy.open("wb") as target:
            shutil.copyfileobj(source, target)
        yield str(copy)


def exists(path: str) -> bool:
    """Whether there is such a file in any of Beam's file systems."""
    found = in_bucket(path)
    return found.is_file() if found else FileSystems.exists(path)


@contextlib.contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """A file of any of Beam's file systems, as its bytes are."""
    if found := in_bucket(path):
        with found.open("rb") as file:
            yield file
        return
    file = FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)
    try:
        yield file
    finally:
        file.close()
