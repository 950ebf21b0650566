"""Text files as people have them: JSON lines, tables or one text per line, UTF-8.

Plain, .gz or .xz. No line may be longer than `bounded_lines.longest_line()`.

Every complaint is one line that starts with `file:line:`, so that an editor can jump to it. Lines
end at a line feed and nowhere else (U+2028 and friends are text), a carriage return before it
belongs to the line end, and a byte order mark at the start of a file is dropped.
"""

import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from moe_embed_jax import storage
from moe_embed_jax.data.bounded_lines import (
    BadArray,
    buffered,
    split_array,
    split_lines,
    starts_array,
    too_long,
)
from moe_embed_jax.errors import UserError
from moe_embed_jax.ownership import own

OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yields `(line number from 1, line)`; files named `*.gz` or `*.xz` are decompressed on the
    way.

    Raises `UserError` for a file that cannot be read, a damaged .gz or .xz, invalid UTF-8 and a
    line that is too long.
    """
    path = storage.path(path)
    number = 0
    try:
        with _opened(path) as file:
            for number, raw in enumerate(split_lines(file), start=1):
                yield number, _decoded(raw, path, number)
    except READ_ERRORS as error:
        raise _unreadable(path, number + 1, error) from None


READ_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    opener = OPENERS.get(path.suffix, contextlib.nullcontext)
    with path.open("rb") as raw, opener(raw) as stream, buffered(stream) as file:
        yield file


def _decoded(raw: bytes | None, path: Path, number: int) -> str:
    if raw is None:
        raise UserError(f"{path}:{number}: the line is {too_long()}")
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{number}: invalid UTF-8 at byte {error.start + 1} of the line; "
            "convert the file to UTF-8"
        ) from None
    return line.removesuffix("\n").removesuffix("\r")


def _unreadable(path: Path, line: int, error: Exception) -> UserError:
    if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
        return UserError(f"{path}: cannot be read: {error.strerror or error}")
    return UserError(f"{path}:{line}: damaged {path.suffix} file ({error})")


def is_json_file(name: str) -> bool:
    """Whether a file of this name may hold one JSON array in place of JSON lines."""
    return name.endswith((".json", ".json.gz", ".json.xz"))


def read_json(path: str | Path, is_counted: bool = False) -> Iterator[tuple[str, Any]]:
    """Yields (`file:line`, value) of JSON lines, or of the elements of a .json file that is one
    array. Blank lines are skipped.

    Args:
      is_counted: the n-th value belongs to the n-th line: a blank line before another is an error.

    Raises `UserError` as `read_lines` does, and for what is no JSON.
    """
    path = storage.path(path)
    if is_json_file(path.name) and _holds_array(path):
        yield from _read_array(path)
        return
    blank = ""
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if not line.strip():
            blank = blank or where
            continue
        if blank and is_counted:
            raise UserError(f"{blank}: empty line, expected a JSON value")
        yield where, parse_json(line, where)


def _holds_array(path: Path) -> bool:
    try:
        with _opened(path) as file:
            return starts_array(file)
    except READ_ERRORS as error:
        raise _unreadable(path, 1, error) from None


def _read_array(path: Path) -> Iterator[tuple[str, Any]]:
    line = 1
    try:
        with _opened(path) as file:
            for line, text in split_array(file):
                yield f"{path}:{line}", json.loads(text)
    except BadArray as error:
        raise UserError(f"{path}:{error.line}: {error}") from None
    except READ_ERRORS as error:
        raise _unreadable(path, line, error) from None


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that appears as `path` when the block ends well, and leaves nothing if not.

    Folders on the way are made. Raises `UserError` when `path` cannot be written, or another
    process writes it.
    """
    path = storage.path(path)
    try:
        with own(path) as owner, storage.written_whole(path) as file:
            yield file
            owner.check()
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def parse_json(line: str, where: str) -> Any:
    """The JSON value of one line; `where` (`file:line`) starts the `UserError` of a bad one."""
    if not line.strip():
        raise UserError(f"{where}: empty line, expected a JSON value")
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: bad JSON at column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # absurd nesting, a number of 5000 digits
        raise UserError(f"{where}: bad JSON: {error}") from None


def listed(names: Sequence[str]) -> str:
    """The first few of the names that a complaint lists, each shortened."""
    return ", ".join(f"{name:.40}" for name in names[:8]) or "none"


def string_field(record: Any, field: str, where: str, default: str | None = None) -> str:
    """`record[field]` of a JSON object, which must be a string; a missing or null field gives
    `default` if set. Raises `UserError`."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, got {record!r:.40}")
    value = record.get(field)
    if value is None and default is not None:
        return default
    if field not in record:
        raise UserError(f"{where}: field '{field}' is missing (fields: {listed(sorted(record))})")
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{field}' must be a string, got {value!r:.40}")
    return value


def title_and_text(record: dict, where: str) -> str:
    """Title and text of a BEIR-like record joined by a space; the title may be missing or empty."""
    title = string_field(record, "title", where, default="")
    return f"{title} {string_field(record, 'text', where)}".strip()


def read_table(
    path: str | Path, columns: Sequence[str], header: bool = True
) -> Iterator[tuple[str, list[str]]]:
    """Yields (`file:line`, the values of `columns`) of a table whose fields are parted by tabs.

    Nothing is quoted or escaped. With `header` the first line names the columns, in any order and
    with others between; without, the file has exactly these columns. Blank lines are skipped.

    Raises `UserError`: a column is missing, a line has another number of fields, no line at all.
    """
    names = None if header else list(columns)
    is_empty = True
    for number, line in read_lines(path):
        if not line.strip():
            continue
        fields = line.split("\t")
        if names is None:
            names = fields
            if missing := [column for column in columns if column not in names]:
                raise UserError(
                    f"{path}:{number}: column '{missing[0]}' is missing (columns: {listed(names)})"
                )
            continue
        if len(fields) != len(names):
            raise UserError(
                f"{path}:{number}: expected {len(names)} fields separated by tabs "
                f"({listed(names)}), got {len(fields)}"
            )
        is_empty = False
        yield f"{path}:{number}", [fields[names.index(column)] for column in columns]
    if is_empty:
        raise UserError(f"{path}: empty file, expected lines of {', '.join(columns)}")


def read_texts(path: str | Path, field: str | None = None) -> Iterator[str]:
    """The texts of a file, one per line, in order.

    `*.txt`: every line is a text, an empty line an empty text. `*.jsonl` (`*.json`, `*.ndjson`):
    every line is a JSON string, or an object of which `field` is the text; without `field` it is
    "text", after "title" and a space if there is one. A `*.json` file may be one array of those.
    All of them may be .gz.

    Blank lines at the end of a JSON file are skipped. Raises `UserError` (`file:line: ...`) for
    anything else, a blank line before another too: the n-th embedding belongs to the n-th line.
    """
    path = storage.path(path)
    kind = PurePath(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in (".txt", ".jsonl", ".json", ".ndjson"):
        raise UserError(f"{path}: unknown kind of file, expected .jsonl or .txt, plain or .gz")
    if kind == ".txt":
        yield from (line for _, line in read_lines(path))
        return
    for where, value in read_json(path, is_counted=True):
        if isinstance(value, str):
            yield value
        elif not isinstance(value, dict):
            raise UserError(f"{where}: expected a JSON string or object, got {value!r:.40}")
        elif field is None:
            yield title_and_text(value, where)
        else:
            yield string_field(value, field, where)
