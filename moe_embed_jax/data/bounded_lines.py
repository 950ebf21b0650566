"""Lines and JSON arrays of files that nobody has looked at: memory stays flat whatever they hold.

A few hundred kilobytes of .gz can be one line of many gigabytes. A line, or an element of an array,
that is longer than `longest_line()` is never held in memory; the caller says so in one line.
"""

import codecs
import io
import json
import os
from collections.abc import Iterator
from typing import BinaryIO

from moe_embed_jax.errors import UserError

VARIABLE = "MOE_EMBED_MAX_LINE_MB"  # of the environment
DEFAULT_MB = 32
_BLOCK = 1 << 16  # bytes
_LONGEST_WORD = 16  # more than the longest word of JSON: -Infinity, \\ud83d
_SPACE = " \t\n\r"
_DECODER = json.JSONDecoder()


class BadArray(ValueError):
    """A JSON array cannot be read on from `line`; the message says why."""

    def __init__(self, line: int, why: str):
        super().__init__(why)
        self.line = line


def longest_line() -> int:
    """Bytes of the longest line that is read; raises `UserError` for a bad environment variable."""
    text = os.environ.get(VARIABLE, str(DEFAULT_MB))
    if not (text.isascii() and text.isdecimal() and 0 < int(text[:9]) <= 1 << 20):
        raise UserError(f"environment variable {VARIABLE}={text!r:.40} must be from 1 to 1048576")
    return int(text) << 20


def too_long() -> str:
    """What is said about a line or an element that is longer."""
    most = longest_line() >> 20
    return f"longer than {most} MiB: split it, or set {VARIABLE} to more than {most}"


def split_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file with their line feeds; None stands for one that is too long."""
    most = longest_line()
    while line := file.readline(most + 1):
        if len(line) <= most:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_BLOCK)
        yield None


def buffered(stream: BinaryIO) -> io.BufferedReader:
    """A stream whose first bytes can be looked at."""
    return io.BufferedReader(stream, _BLOCK)


def starts_array(file: io.BufferedReader) -> bool:
    """Whether the first character that is no white space opens an array; reads nothing."""
    return file.peek(_BLOCK).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def split_array(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """(line, text) of the elements of a file that is one JSON array.

    Raises `BadArray` where it is broken, bad UTF-8, too long, or followed by something else.
    """
    return _Array(file).elements()


class _Array:
    """`_text[_at:]` is read and not used yet; its first character stands in line `_line`."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._most = longest_line()
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at, self._line, self._is_all = "", 0, 1, False

    def elements(self) -> Iterator[tuple[int, str]]:
        self._skip("[")
        if self._next() == "]":
            self._skip("]")
        else:
            while True:
                self._next()
                line = self._line
                yield line, self._element()
                if self._next() == "]":
                    self._skip("]")
                    break
                self._skip(",")
        if self._next():
            raise BadArray(self._line, "something follows the end of the array")

    def _element(self) -> str:
        while True:
            try:
                end = _DECODER.raw_decode(self._text, self._at)[1]
                # A number near the end of what was read may go on (1.5e | 3).
                if end + _LONGEST_WORD < len(self._text) or self._is_all:
                    return self._take(end)
            except (ValueError, RecursionError) as error:
                if self._is_all or not self._may_go_on(error):
                    why = getattr(error, "msg", str(error))
                    why = f"bad JSON in an element of the array: {why}"
                    raise BadArray(self._line, why) from None
            left = len(self._text) - self._at
            if left > self._most:
                raise BadArray(self._line, f"an element of the array is {too_long()}")
            self._read(max(left, _BLOCK))

    def _may_go_on(self, error: Exception) -> bool:
        """Whether an element may only have been cut by the end of what was read."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        is_near_end = error.pos + _LONGEST_WORD > len(self._text)
        return is_near_end or error.msg.startswith("Unterminated string")

    def _skip(self, wanted: str) -> None:
        found = self._next()
        if found != wanted:
            what = f"{found!r}" if found else "the end of the file"
            raise BadArray(self._line, f"bad JSON: expected {wanted!r} of an array, got {what}")
        self._take(self._at + 1)

    def _next(self) -> str:
        """The next character that is no white space, which stays; "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._take(self._at + 1)
            if self._is_all:
                return ""
            self._read(_BLOCK)

    def _take(self, end: int) -> str:
        taken, self._at = self._text[self._at : end], end
        self._line += taken.count("\n")
        return taken

    def _read(self, size: int) -> None:
        data = self._file.read(size)
        self._is_all = not data
        try:
            more = self._decode(data, final=self._is_all)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n", self._at)
            raise BadArray(line, f"bad UTF-8 ({error.reason}) in the array") from None
        self._text, self._at = self._text[self._at :] + more, 0
