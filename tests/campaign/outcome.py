"""What became of an attempt, and how two results are compared."""

import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import traceback

import numpy as np

from moe_embed_jax.errors import UserError
from moe_embed_jax.refusals import refusal_of_system

SAME = "same bits"  # equal to the undisturbed result: compared, not assumed
ACCEPTED = "accepted"  # read as another input; nothing could be compared
REFUSED = "refused"  # one line that names what is wrong; status 2
TRACE = "trace"  # a stack trace, or a message of several lines
LOST = "lost"  # missing or different without a word, or the same command cannot continue
CRASH = "crash"  # a signal that the campaign did not send
HANG = "hang"  # no end within the limit
GOOD = (SAME, ACCEPTED, REFUSED)
BAD = (TRACE, LOST, CRASH, HANG)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """kind: one of the above. detail: what was done and what was said, for a person."""

    kind: str
    detail: str


class Timeout(BaseException):
    """No `Exception`: code that catches all of those must not catch this."""


def judge(action, pristine: str, is_checked: bool, named=()) -> Outcome:
    """Runs `action()`, which gives a result to compare with the digest `pristine`.

    is_checked: another result is a loss, because the project wrote these files itself.
    named: digests of results that are right if a line says why (of an earlier checkpoint).
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            result = action()
    except Timeout:
        return Outcome(HANG, _last_lines(traceback.format_exc()))
    except BaseException as error:  # as a launcher says it
        said = str(error) if isinstance(error, UserError) else refusal_of_system(error)
        if said is None:
            return Outcome(TRACE, _last_lines(traceback.format_exc()))
        return Outcome(REFUSED if len(said.splitlines()) == 1 else TRACE, said[:2000])
    found, words = digest(result), said.getvalue().strip()
    if found == pristine:
        return Outcome(SAME, words[:500])
    if found in named and words:
        return Outcome(REFUSED, words[:500])
    return Outcome(LOST, "another result without a word") if is_checked else Outcome(ACCEPTED, "")


def _last_lines(text: str, count: int = 12) -> str:
    return "\n".join(line[:300] for line in text.splitlines()[-count:])


def digest(value) -> str:
    """SHA-256 of arrays, texts, numbers, and of containers and dataclasses of them."""
    sha256 = hashlib.sha256()
    _update(sha256, value)
    return sha256.hexdigest()


def _update(sha256, value) -> None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        sha256.update(f"{array.dtype} {array.shape}".encode())
        sha256.update(np.ascontiguousarray(array).tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            _update(sha256, key)
            _update(sha256, value[key])
    elif isinstance(value, (list, tuple)):
        sha256.update(f"[{len(value)}".encode())
        for item in value:
            _update(sha256, item)
    else:
        sha256.update(f"{type(value).__name__} {value!r}\0".encode("utf-8", "surrogatepass"))


def files(folder: pathlib.Path, *, without=()) -> dict[str, str]:
    """{relative path: SHA-256} of the files under `folder`, or of the file `folder`.

    without: parts of paths that are left out.
    """
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    found = {}
    for path in paths:
        name = str(path.relative_to(folder)) if path != folder else path.name
        if path.is_file() and not any(part in name for part in without):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def difference(expected: dict, found: dict) -> str:
    """Names of what differs between two results, "" if nothing does."""
    names = [n for n in sorted(expected.keys() | found.keys()) if expected.get(n) != found.get(n)]
    words = {name: "missing" if name not in found else "differs" for name in names}
    words |= {name: "too much" for name in names if name not in expected}
    return ", ".join(f"{name} {word}" for name, word in words.items())[:500]


def write_input(folder: pathlib.Path, about: dict) -> None:
    with contextlib.suppress(OSError):
        (folder / "attempt.json").write_text(json.dumps(about, indent=1))
