"""metrics.jsonl and evaluations.jsonl: one JSON record a line, which a run leaves behind.

Both files of an interrupted and resumed run equal an uninterrupted run's, byte for byte. A
checkpoint holds checksums of what they were when it was saved. A line that a kill cut short is
removed, as are the lines of steps that will be computed again; all other damage is an error. Each
line has a checksum of its own, because an evaluation is recorded after its checkpoint.
"""

import contextlib
import itertools
import json
import pathlib
import zlib

from moe_embed_jax import storage
from moe_embed_jax.checksums import take_own, with_own
from moe_embed_jax.errors import UserError

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
CHECKSUMS = "records"  # the key of what a checkpoint holds about these files
LINES_PER_CHECKSUM = 16
REMEDY = (
    "put the right file back, or move this one away: then the run continues, and the new file has "
    "no records of the steps before its checkpoint"
)


def read_records(path: pathlib.Path) -> list[dict]:
    """The records of a file, whose steps increase; none if there is no file.

    An unfinished last line is no record. Raises `UserError` that names the line for anything else
    that is not a record.
    """
    return [_record(path, number, line) for number, line in enumerate(_lines(path), 1)]


def append_record(path: pathlib.Path, record: dict) -> None:
    """Adds a line, and returns when it is on the disk."""
    with contextlib.closing(storage.AppendedFile(path)) as file:
        file.write(as_line(record))
        file.sync()


def as_line(record: dict) -> bytes:
    return json.dumps(with_own(record)).encode() + b"\n"


def checksums(workdir: pathlib.Path) -> dict:
    """Of both files as they are, for a checkpoint: {file: {"lines", "crc32" of each 16 lines}}."""
    return {
        name: {"lines": len(lines), "crc32": _checksums(lines)}
        for name in (METRICS_FILE, EVALUATIONS_FILE)
        for lines in [_lines(workdir / name)]
    }


def continue_records(workdir: pathlib.Path, step: int, saved: dict) -> list[str]:
    """Checks both files of a run that continues after `step`, and removes records of later steps.

    Args:
      saved: the `checksums` of the run's checkpoint; {} if it has none.

    Returns lines to say to the user. Raises `UserError` for a changed, added or missing line.
    """
    messages = []
    for name in (METRICS_FILE, EVALUATIONS_FILE):
        path = workdir / name
        lines = _lines(path)
        steps = [_record(path, i, line)["step"] for i, line in enumerate(lines, 1)]
        for number, (one, other) in enumerate(itertools.pairwise(steps), 2):
            gap = other - one
            if gap < 1 or (name == METRICS_FILE and gap > 1):
                raise UserError(
                    f"{path}, line {number}: step {other} comes after step {one}, so lines were "
                    f"changed or removed: {REMEDY}"
                )
        kept = [line for line, of in zip(lines, steps, strict=True) if of <= step]
        expected = saved.get(name, {"lines": 0, "crc32": []})
        if kept:
            _check(path, kept, expected)
        elif expected["lines"]:
            messages.append(
                f"{path} has no records of the steps up to {step}: it was moved or emptied"
            )
        content = b"".join(kept)
        if storage.read_appended(path) not in (None, content):
            storage.replace_appended(path, content)
    return messages


def _check(path: pathlib.Path, lines: list[bytes], expected: dict) -> None:
    count = expected["lines"]
    actual = _checksums(lines[:count])
    for i, (crc, saved) in enumerate(zip(actual, expected["crc32"], strict=False)):
        first = i * LINES_PER_CHECKSUM + 1
        last = min(first + LINES_PER_CHECKSUM - 1, count)
        if crc != saved and last <= len(lines):
            raise UserError(
                f"{path}, one of the lines {first} to {last}: it was changed after the checkpoint "
                f"was saved: {REMEDY}"
            )
    if len(lines) < count:
        raise UserError(
            f"{path} ends after line {len(lines)}, and the checkpoint was saved after line {count}:"
            f" {REMEDY}"
        )


def _lines(path: pathlib.Path) -> list[bytes]:
    """Its finished lines, with their ends."""
    lines = (storage.read_appended(path) or b"").splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def _checksums(lines: list[bytes]) -> list[int]:
    blocks = range(0, len(lines), LINES_PER_CHECKSUM)
    return [zlib.crc32(b"".join(lines[i : i + LINES_PER_CHECKSUM])) for i in blocks]


def _record(path: pathlib.Path, number: int, line: bytes) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise UserError(f"{path}, line {number}: it is not a record of a step: {REMEDY}")
    if take_own(record) is False:  # None: a line of an earlier version
        raise UserError(f"{path}, line {number}: it was changed (its CRC-32 differs): {REMEDY}")
    return record
