"""What the operating system refuses (a full disk, no permission), in one line for the user."""

import errno
import os
import pathlib
import re
from collections.abc import Iterator

from moe_embed_jax import storage
from moe_embed_jax.errors import LostConnection

_CLIENT = ("aiohttp", "gcsfs", "google", "requests")  # libraries of the client of buckets
# Error number -> what is wrong and what to do.
_REFUSALS = {
    errno.ENOSPC: "there is no room left on this disk: make room, then repeat the command",
    errno.EDQUOT: "the disk quota is used up: make room, then repeat the command",
    errno.EFBIG: "the file would be larger than the limit (ulimit -f, or of the file system): "
    "raise it, then repeat the command",
    errno.EROFS: "this file system is read-only: choose another path, or mount it for writing",
    errno.EIO: "reading or writing failed (EIO): check the disk or the network file system, then "
    "repeat the command",
    errno.ESTALE: "the network file system lost this file: mount it anew, then repeat the command",
}
_OTHER_REFUSALS = {
    errno.EACCES: "permission denied: change the permissions, or choose another path",
    errno.EPERM: "not permitted: change the owner or permissions, or choose another path",
    errno.ENOTDIR: "a part of this path is a file, and a folder is needed: choose another path",
    errno.EEXIST: "this exists already, maybe as a file where a folder is needed: choose another "
    "path",
    errno.EISDIR: "this is a folder, and a file is needed: choose another path",
    errno.EPIPE: "the program that reads this output has ended",
}


def refusal_of_system(error: BaseException) -> str | None:
    """One line if the operating system refused something: the path, what is wrong, what to do.

    Libraries wrap what the system says, in exceptions or in text. None: the error is another one.
    """
    chain = list(_chain(error))
    line = _first_refusal(error, chain)
    kept = next((each.kept for each in chain if hasattr(each, "kept")), None)
    return f"{line}; what was to be uploaded is kept as {kept}" if line and kept else line


def _first_refusal(error: BaseException, chain: list[BaseException]) -> str | None:
    for each in reversed(chain):  # the first error; it caused the others, or files were closing
        if refused := _error_of_bucket(each, chain):
            return f"{refused.filename}: {refused.strerror}"
        number = getattr(each, "errno", None) or _number_in(str(each))
        # An error that was caught before may have nothing to do with the last one.
        known = _REFUSALS if each is not error else _REFUSALS | _OTHER_REFUSALS
        if number in known:
            return f"{_path_of(each, chain)}: {known[number]}"
    if isinstance(error, OSError) and error.strerror:
        return f"{_path_of(error, chain)}: {error.strerror}"
    return None


def is_lost_connection(error: BaseException) -> bool:
    """Whether a bucket could not be reached."""
    chain = list(_chain(error))
    return any(isinstance(_error_of_bucket(each, chain), LostConnection) for each in chain)


def _error_of_bucket(error: BaseException, chain: list[BaseException]) -> OSError | None:
    """What a bucket refused, with the path; None: the error is another one."""
    if isinstance(error, OSError) and str(error.filename).startswith(storage.SCHEME):
        return error
    # Orbax asks the client without `storage` between, and TensorStore raises a ValueError.
    by_client = type(error).__module__.partition(".")[0] in _CLIENT
    if by_client or (isinstance(error, ValueError) and storage.SCHEME in str(error)):
        from moe_embed_jax import bucket

        return bucket.system_error(error, _path_of(error, chain))
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        for member in getattr(error, "exceptions", ()):
            yield from _chain(member)
        error = error.__cause__ or error.__context__


def _number_in(text: str) -> int | None:
    for number in _REFUSALS:
        if os.strerror(number) in text:
            return number
    # NumPy counts the values it wrote, and does not say why it stopped.
    return errno.ENOSPC if re.search(r"\d+ requested and \d+ written", text) else None


def _path_of(error: BaseException, chain: list[BaseException]) -> str:
    """The path that an error names, or the file in whose writing it was raised."""
    # Of a file that cannot take its place, the place.
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if isinstance(name, bytes):
        return os.fsdecode(name)
    if isinstance(name, str) and name:
        return name
    if found := re.search(r"gs://[^\s\"':,\]]+|(?<![\w.:/])/[^\s\"':,\]]+", str(error)):
        return found.group()
    for each in chain:
        if (found := _path_in_frames(each)) is not None:
            return found
    return "a file"


def _path_in_frames(error: BaseException) -> str | None:
    """The open file, or else the path, in the innermost function that holds one."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        values = list(frame.f_locals.values())
        values += [each for value in values for each in getattr(value, "__dict__", {}).values()]
        for value in values:
            if hasattr(value, "write") and isinstance(getattr(value, "name", None), str):
                return value.name
        for value in values:
            if isinstance(value, pathlib.PurePath):
                return str(value)
    return None
