"""Paths in Cloud Storage, with the methods of `pathlib.Path` that the project uses.

`storage` is the only reader of this module. It needs the extra [gcs].
"""

import contextlib
import errno
import logging
import os
import pathlib
import posixpath
import types
from collections.abc import Iterator

# Before etils and gcsfs are imported. epath would read buckets through TensorFlow, where that is
# installed, and training must never import it. gcsfs would ask another service, by gRPC and with a
# warning where it has no credentials, for the type of every bucket.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

import aiohttp
import fsspec
import gcsfs.retry
import google.auth.exceptions
import requests
from etils import epath

SCHEME = "gs://"
# Other processes write the same folders: what a listing said a moment ago may be wrong.
fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
# It logs every error that it raises, with a trace.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
_PosixGPath = type(epath.Path(f"{SCHEME}bucket"))


def file_system():
    """gcsfs; one per process."""
    return fsspec.filesystem("gcs", finalize_on_close=True)  # the one that epath uses, too


@contextlib.contextmanager
def errors_of(path, only_bucket: bool = False) -> Iterator[None]:
    """Turns what the client raises into the `OSError` that a disk would raise, with the path.

    Args:
      only_bucket: it is all that can be missing.
    """
    try:
        yield
    except FileNotFoundError:
        what = "there is no such bucket: create it, or correct its name"
        raise FileNotFoundError(
            errno.ENOENT, what if only_bucket else "no such object or folder", str(path)
        ) from None
    except (gcsfs.retry.HttpError, google.auth.exceptions.GoogleAuthError) as error:
        if int(getattr(error, "code", 401) or 0) in (401, 403):
            raise _no_access(path, error) from error
        raise _says(path, error) from error
    except (aiohttp.ClientError, requests.exceptions.RequestException, TimeoutError) as error:
        raise _unreachable(path, error) from error
    except OSError as error:
        if str(error).startswith("Forbidden"):  # what gcsfs makes of status 403
            raise _no_access(path, error) from error
        raise
    except ValueError as error:
        if str(error).startswith("Bad Request"):  # what gcsfs makes of most with status 400
            raise _says(path, error) from error
        raise


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _says(path, error: Exception) -> OSError:
    what = f"Cloud Storage says: {_line(error)}"
    return OSError(errno.EREMOTEIO, what, str(path))


def _no_access(path, error: Exception) -> PermissionError:
    return PermissionError(
        errno.EACCES,
        f"Cloud Storage gives no access ({_line(error)}): log in (gcloud auth "
        "application-default login), or let the owner of the bucket grant it",
        str(path),
    )


def _unreachable(path, error: Exception) -> ConnectionError:
    return ConnectionError(
        errno.ENETUNREACH,
        f"Cloud Storage cannot be reached ({_line(error)}): check the network, then repeat "
        "the command",
        str(path),
    )


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
