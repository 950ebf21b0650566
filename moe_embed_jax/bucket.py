"""Paths in Cloud Storage, with the methods of `pathlib.Path` that the project uses.

`storage` is the only reader of this module. It needs the extra [gcs].
"""

import contextlib
import errno
import logging
import os
import pathlib
import posixpath
import time
import types
from collections.abc import Iterator

# Before etils and gcsfs are imported. epath would read buckets through TensorFlow, where that is
# installed, and training must never import it. gcsfs would ask another service, by gRPC and with a
# warning where it has no credentials, for the type of every bucket.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
# A network may drop what is sent, and then nothing is heard; gcsfs would wait for five minutes, six
# times. So for gcsfs and TensorStore a connection is made in 10 s, and one from which nothing comes
# for 30 s is lost.
os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", "10")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "30")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")

import aiohttp
import fsspec
import gcsfs.retry
import google.auth.exceptions
import requests
from etils import epath

from moe_embed_jax.errors import LostConnection
from moe_embed_jax.storage import SCHEME

# Other processes write the same folders: what a listing said a moment ago may be wrong.
fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
fsspec.config.conf["gs"].setdefault(  # as TensorStore's, above
    "requests_timeout", aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)
)
# It logs every error that it raises, with a trace.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
# It warns of each place where it finds no credentials; that there are none is said by the error.
logging.getLogger("google.auth").setLevel(logging.ERROR)
_PosixGPath = type(epath.Path(f"{SCHEME}bucket"))


def file_system():
    """gcsfs; one per process."""
    return fsspec.filesystem("gcs", finalize_on_close=True)  # the one that epath uses, too


_AFTER_LOSS = 60.0  # seconds in which what follows a lost connection is not tried for a minute each
_lost: tuple[float, str] | None = None  # when, and why


@contextlib.contextmanager
def errors_of(path, only_bucket: bool = False) -> Iterator[None]:
    """Turns what the client raises into the `OSError` that a disk would raise, with the path.

    Args:
      only_bucket: it is all that can be missing.
    """
    global _lost
    if _lost is not None and time.monotonic() - _lost[0] < _AFTER_LOSS:
        raise LostConnection(errno.ENETUNREACH, _lost[1], str(path))
    try:
        yield
    except FileNotFoundError:
        what = "there is no such bucket: create it, or correct its name"
        raise FileNotFoundError(
            errno.ENOENT, what if only_bucket else "no such object or folder", str(path)
        ) from None
    except Exception as error:
        translated = system_error(error, path)
        if translated is None:
            raise
        if isinstance(translated, LostConnection):
            _lost = time.monotonic(), translated.strerror
        raise translated from error


def system_error(error: BaseException, path) -> OSError | None:
    """The error of a disk for one of the client, in one line that says what to do; None: it is of
    something else."""
    said = " ".join(str(error).split())[:300]
    refused = isinstance(error, gcsfs.retry.HttpError | google.auth.exceptions.GoogleAuthError)
    by_tensorstore = said if isinstance(error, ValueError) and SCHEME in said else ""
    is_forbidden = (
        (refused and int(getattr(error, "code", 401) or 0) in (401, 403))
        # gcsfs makes an OSError of status 403, and a ValueError of most with status 400.
        or (isinstance(error, OSError) and said.startswith("Forbidden"))
        or by_tensorstore.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED"))
    )
    if isinstance(error, _LOST) or "retry attempts failed" in by_tensorstore:
        kind, number, what = LostConnection, errno.ENETUNREACH, f"cannot be reached ({said})"
        what += ": check the network, then repeat the command"
    elif is_forbidden:
        kind, number, what = PermissionError, errno.EACCES, f"gives no access ({said})"
        what += ": log in (gcloud auth application-default login), or let the owner of the bucket "
        what += "grant it"
    elif refused or (isinstance(error, ValueError) and said.startswith("Bad Request")):
        kind, number, what = OSError, errno.EREMOTEIO, f"says: {said}"
    else:
        return None
    return kind(number, f"Cloud Storage {what}", str(path))


_LOST = (aiohttp.ClientError, requests.exceptions.RequestException, TimeoutError)


class BucketPath(_PosixGPath):
    """An object, or the folder that object names make by their slashes: it exists as long as there
    is an object in it."""

    def info(self) -> dict:
        """What Cloud Storage says of the object: "size", "crc32c", "md5Hash", "mtime", "type".

        Raises `FileNotFoundError`: there is neither an object nor a folder.
        """
        with errors_of(self):
            return file_system().info(str(self))

    def exists(self) -> bool:
        try:
            self.info()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        return self._has_type("directory")

    def is_file(self) -> bool:
        return self._has_type("file")

    def is_symlink(self) -> bool:
        return False

    def is_fifo(self) -> bool:
        return False

    def _has_type(self, kind: str) -> bool:
        try:
            return self.info()["type"] == kind
        except FileNotFoundError:
            return False

    def stat(self):
        """Size in bytes and time of change in seconds, under the names of `os.stat_result`."""
        info = self.info()
        modified = info.get("mtime")
        seconds = modified.timestamp() if modified else 0.0
        return types.SimpleNamespace(
            st_size=info["size"], st_mtime=seconds, st_mtime_ns=int(seconds * 1e9)
        )

    def iterdir(self) -> Iterator["BucketPath"]:
        with errors_of(self):
            names = file_system().ls(str(self), detail=False)
        yield from (path for name in sorted(names) if (path := _from(name)) != self)

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        with errors_of(self, only_bucket=True):
            names = file_system().glob(posixpath.join(str(self), pattern))
        yield from map(_from, sorted(names))

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        """Objects, not folders."""
        with errors_of(self, only_bucket=True):
            names = file_system().find(str(self))
        for path in map(_from, sorted(names)):
            if pathlib.PurePosixPath(path.name).match(pattern):
                yield path

    def infos(self) -> dict[str, dict]:
        """{path below this one: `info`} of all objects, of one listing."""
        with errors_of(self, only_bucket=True):
            found = file_system().find(str(self), detail=True)
        return {_from(n).relative_to(self).as_posix(): found[n] for n in sorted(found)}

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """A folder appears with its first object. Raises `FileExistsError` as on a disk."""
        del mode, parents
        if not exist_ok and self.exists():
            raise FileExistsError(17, "exists already", str(self))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with errors_of(self):
                file_system().rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def read_bytes(self) -> bytes:
        with errors_of(self):
            return file_system().cat_file(str(self))

    def write_bytes(self, data: bytes) -> int:
        with errors_of(self, only_bucket=True):
            file_system().pipe_file(str(self), bytes(data))
        return len(data)

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def write_text(self, data: str, encoding: str = "utf-8", errors: str = "strict") -> int:
        return self.write_bytes(data.encode(encoding, errors))

    def open(self, mode: str = "r", buffering: int = -1, encoding=None, errors=None, newline=None):
        """A file object. No mode that appends: an object is written whole, see `storage`."""
        if set(mode) & set("a+x"):
            raise ValueError(f"{self}: an object cannot be opened with mode {mode!r}")
        del buffering
        text = {"encoding": encoding or "utf-8", "errors": errors, "newline": newline}
        with errors_of(self, only_bucket="w" in mode):
            return file_system().open(str(self), mode, **({} if "b" in mode else text))

    def absolute(self) -> "BucketPath":
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":
        del strict
        return self._new(SCHEME + posixpath.normpath(str(self).removeprefix(SCHEME)))

    def expanduser(self) -> "BucketPath":
        return self

    def rename(self, target):
        raise TypeError("a bucket renames nothing at once: use storage.move")

    replace = rename


def _from(name: str) -> BucketPath:
    return BucketPath(SCHEME + name.removeprefix(SCHEME).rstrip("/"))
