"""Where files are: every path of the product is on a disk or in a bucket (`gs://BUCKET/FOLDER`).

`path` makes one of a flag or config key: a `pathlib.Path`, or a `bucket.BucketPath` with the same
methods for reading, listing, and writing a file whole. What a disk does and a bucket cannot has one
function here:

    rename a file or folder            move
    replace a file at once             write, written_whole
    append to a file                   AppendedFile, read_appended, replace_appended
    create a file only if it is new    create
    set the time of change to now      touch
    delete a tree                      remove
    open by name, in a C++ library     local_copy, kvstore, read_by_library
    build by name, in such a library   local_place

Folders that appear whole are made by `new_folder`; owners of folders by `ownership`. Imports no
library of a bucket before a path of one appears.
"""

import concurrent.futures
import contextlib
import hashlib
import itertools
import os
import pathlib
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from moe_embed_jax.errors import UserError

SCHEME = "gs://"
CACHE = "MOE_EMBED_CACHE"  # environment variable: the folder of local copies
_PART_BYTES = 1 << 20  # of an appended file in a bucket, where a part is written whole
_BLOCK = 16 << 20
_ASKED_EVERY = 10.0  # seconds
_RETRIES = 5  # of TensorStore, in half a minute, as gcsfs has; its own default takes a quarter hour


def is_remote(name: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(name).startswith(SCHEME)


def path(name: str | os.PathLike) -> pathlib.Path:
    """The path of a flag or config key. Imports no library of a bucket for a local one.

    Raises `UserError`: a scheme other than gs://, no bucket, or the extra [gcs] is missing.
    """
    text = os.fspath(name)
    if not text.startswith(SCHEME):
        if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://?", text):
            # pathlib makes "gs:/" of "gs://", and would then write into a local folder "gs:".
            hint = "gs://BUCKET/FOLDER" if scheme[1] == "gs" else "a local path or gs://"
            raise UserError(f"{text}: {scheme[1]} is no storage that can be used: give {hint}")
        return pathlib.Path(name)
    if not text.removeprefix(SCHEME).partition("/")[0]:
        raise UserError(f"{text}: the bucket is missing: give gs://BUCKET/FOLDER")
    return _bucket(text).BucketPath(text.rstrip("/"))


def _bucket(name: str):
    try:
        from moe_embed_jax import bucket
    except ImportError as error:
        raise UserError(
            f"{name}: Cloud Storage needs {error.name}: pip install -e .[gcs]"
        ) from None
    return bucket


@contextlib.contextmanager
def _file_system(name: pathlib.Path, only_bucket: bool = True) -> Iterator:
    """gcsfs, whose errors name a path."""
    bucket = _bucket(str(name))
    with bucket.errors_of(name, only_bucket):
        yield bucket.file_system()


def errors_of(name: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Turns what TensorStore says of a bucket into an `OSError`, see `bucket.errors_of`."""
    return _bucket(str(name)).errors_of(name) if is_remote(name) else contextlib.nullcontext()


def kvstore(folder: pathlib.Path) -> dict:
    """The specification of a folder for TensorStore."""
    if is_remote(folder):
        bucket, _, inside = os.fspath(folder).removeprefix(SCHEME).partition("/")
        place = {"driver": "gcs", "bucket": bucket, "path": f"{inside.rstrip('/')}/"}
        return place | {"gcs_request_retries": {"max_retries": _RETRIES}}
    # TensorStore refuses a path with "..".
    return {"driver": "file", "path": f"{folder.resolve()}/"}


def read_by_library(name: pathlib.Path, call: Callable[[], Any]) -> Any:
    """What `call` gives, in which a library with a client of its own reads `name`.

    ArrayRecord's client tries for a quarter of an hour to reach a bucket, and then says that the
    file is damaged. So ours asks, too, when it takes long or fails. Then raises `LostConnection`,
    and leaves the call to a thread that does not keep the process alive.
    """
    if not is_remote(name):
        return call()
    called = concurrent.futures.Future()

    def run() -> None:
        try:
            called.set_result(call())
        except BaseException as error:
            called.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not concurrent.futures.wait([called], _ASKED_EVERY).done:
        name.exists()
    if called.exception() is not None:
        name.exists()
    return called.result()


def has_entry(name: pathlib.Path) -> bool:
    """Whether there is anything of this name.

    For files that may be missing: `is_file` would pass over a folder, or a link to nothing (half a
    download of the hub's client), as if there were none. Reading them says what is wrong.
    """
    return name.exists() or name.is_symlink()


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file, also between a disk and a bucket; `target` is replaced."""
    if not is_remote(source) and not is_remote(target):
        shutil.copyfile(source, target)
    elif is_remote(source) and is_remote(target):
        with _file_system(source, only_bucket=False) as files:
            files.cp_file(str(source), str(target))
    elif is_remote(target):
        with _file_system(target) as files:
            files.put_file(str(source), str(target))
        if target.stat().st_size != source.stat().st_size:
            raise OSError(5, "the upload is incomplete", str(target))
    else:
        info = source.info()
        with source.open("rb") as file, target.open("wb") as written:
            shutil.copyfileobj(file, written, _BLOCK)
        if target.stat().st_size != info["size"]:
            raise OSError(5, "the download is incomplete", str(source))


def move(source: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a file or folder: at once on a disk; object by object, inside the service, in a
    bucket, where a folder that is being moved is incomplete under both names."""
    if is_remote(source):
        with _file_system(source, only_bucket=False) as files:
            files.copy(str(source), str(target), recursive=True)
            files.rm(str(source), recursive=True)
    else:
        source.replace(target)


def remove(target: pathlib.Path) -> None:
    """Deletes a file, or a folder with all that is in it, if there is one."""
    if is_remote(target):
        with contextlib.suppress(FileNotFoundError), _file_system(target) as files:
            files.rm(str(target), recursive=True)
    elif target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def write(target: pathlib.Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old or the new one. Folders on the way are made."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(target):
        target.write_bytes(data)
        return
    with written_whole(target) as file:
        file.write(data)


@contextlib.contextmanager
def written_whole(target: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write that appears as `target` when the body ends well, and leaves nothing if not.

    One process at a time may write `target`, see `ownership.own`.
    """
    if is_remote(target):
        with tempfile.TemporaryDirectory() as folder:
            local = pathlib.Path(folder) / target.name
            with local.open("wb") as file:
                yield file
            with kept_where_upload_fails(local, target):
                copy(local, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def kept_where_upload_fails(local: pathlib.Path, target: pathlib.Path) -> Iterator[None]:
    """If the body, which uploads `local`, cannot: moves it to where nobody deletes it, and gives
    the error a member `kept`, the place, which `refusals` names."""
    try:
        yield
    except OSError as error:
        kept = cache_folder() / "not_uploaded" / os.fspath(target).removeprefix(SCHEME)
        remove(kept)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(local, kept)
        error.kept = kept
        raise


def create(target: pathlib.Path, content: bytes) -> bool:
    """Writes a new file; False: it exists, or another process was faster."""
    try:
        if is_remote(target):
            with _file_system(target) as files:
                files.pipe_file(str(target), content, mode="create")
            return True
        with target.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    except OSError:
        if not is_remote(target):
            target.unlink(missing_ok=True)  # a full disk leaves an empty one
        raise
    return True


def touch(target: pathlib.Path) -> None:
    """Sets the time of change of a file to now. Raises `FileNotFoundError` if it is gone."""
    if is_remote(target):
        with _file_system(target, only_bucket=False) as files:
            files.cp_file(str(target), str(target))  # fails if it is gone, unlike an upload
    else:
        os.utime(target)


def now(folder: pathlib.Path) -> float:
    """Seconds, by the clock that gives the files of a folder their times of change."""
    if not is_remote(folder):
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    probe = folder / f".clock-{os.urandom(8).hex()}"
    probe.write_bytes(b"")
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def free_bytes(folder: pathlib.Path) -> int:
    """Room on the disk of a local folder."""
    return shutil.disk_usage(folder).free


def local_copy(name: pathlib.Path) -> pathlib.Path:
    """`name` itself on a disk; of an object a copy, for libraries that open files by name.

    The copies are kept in $MOE_EMBED_CACHE (~/.cache/moe_embed_jax), by name, size and checksum of
    the object: one that was replaced is copied again.
    """
    if not is_remote(name):
        return name
    info = name.info()
    key = f"{name} {info['size']} {info.get('crc32c')} {info.get('md5Hash')}"
    folder = cache_folder() / "objects" / hashlib.sha256(key.encode()).hexdigest()[:32]
    target = folder / name.name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{os.getpid()}.partial"
        try:
            copy(name, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


@contextlib.contextmanager
def local_folder(name: pathlib.Path) -> Iterator[pathlib.Path]:
    """`name` itself on a disk; of a folder in a bucket, a copy that goes when the body ends."""
    if not is_remote(name):
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in name.rglob("*"):
            target = pathlib.Path(folder) / path.relative_to(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            copy(path, target)
        yield pathlib.Path(folder)


def local_place(name: pathlib.Path) -> pathlib.Path:
    """`name` itself on a disk; of a file or folder in a bucket, its place in the cache of this
    machine, for what needs a disk while it is built. Nothing is copied."""
    if not is_remote(name):
        return name
    return cache_folder() / "places" / os.fspath(name).removeprefix(SCHEME)


def cache_folder() -> pathlib.Path:
    """Where copies of objects are kept on this machine."""
    return pathlib.Path(os.environ.get(CACHE) or "~/.cache/moe_embed_jax").expanduser()


class AppendedFile:
    """Adds bytes to a file. In a bucket, whose objects are written whole, the file is a number of
    parts, `NAME-00000.SUFFIX` and so on, in the order of their names."""

    def __init__(self, target: pathlib.Path):
        self._target = target
        self._remote = is_remote(target)
        self.closed = False
        if not self._remote:
            self._file = target.open("ab")
            return
        parts = _parts(target)
        self._number = max(len(parts) - 1, 0)
        self._part = bytearray(parts[-1].read_bytes() if parts else b"")
        self._changed = False

    def write(self, data: bytes) -> None:
        if not self._remote:
            self._file.write(data)
            return
        if len(self._part) >= _PART_BYTES:
            self.flush()
            self._number, self._part = self._number + 1, bytearray()
        self._part += data
        self._changed = True

    def flush(self) -> None:
        """Readers see from now on what was written."""
        if not self._remote:
            self._file.flush()
        elif self._changed:
            _part_path(self._target, self._number).write_bytes(bytes(self._part))
            self._changed = False

    def sync(self) -> None:
        """Returns when what was written outlives this machine's power."""
        self.flush()
        if not self._remote:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.flush()
            if not self._remote:
                self._file.close()


def read_appended(target: pathlib.Path) -> bytes | None:
    """What an `AppendedFile` holds; None: there is none."""
    if not is_remote(target):
        return target.read_bytes() if target.exists() else None
    parts = _parts(target)
    return b"".join(part.read_bytes() for part in parts) if parts else None


def replace_appended(target: pathlib.Path, content: bytes) -> None:
    """Makes `content` of an `AppendedFile` that nobody has open; content is a part of the old."""
    if not is_remote(target):
        write(target, content)
        return
    parts = _parts(target)
    edges = [0, *itertools.accumulate(part.stat().st_size for part in parts)]
    pieces = [content[start:stop] for start, stop in itertools.pairwise(edges)]
    # From the last part on: a kill leaves a file that was cut at one of its parts' ends.
    for part, piece in reversed(list(zip(parts, pieces, strict=True))):
        if piece or part == parts[0]:
            part.write_bytes(piece)
        else:
            part.unlink()


def _parts(target: pathlib.Path) -> list[pathlib.Path]:
    pattern = re.compile(re.escape(target.stem) + r"-\d{5}" + re.escape(target.suffix))
    names = target.parent.glob(f"{target.stem}-*{target.suffix}")
    return sorted(part for part in names if pattern.fullmatch(part.name))


def _part_path(target: pathlib.Path, number: int) -> pathlib.Path:
    return target.with_name(f"{target.stem}-{number:05d}{target.suffix}")
