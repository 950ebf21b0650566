"""A folder that appears whole, or not at all, and that one process at a time writes."""

import abc
import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Self

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.ownership import own

UPLOADING = ".partial"  # in a bucket: the folder that holds it was not uploaded to its end
_UPLOADS_AT_ONCE = 8


@contextlib.contextmanager
def new_folder(target, last: str, replace: bool = False) -> Iterator[pathlib.Path]:
    """An empty local folder to fill, which becomes `target` when the body ends well.

    On a disk it lies beside `target`, whose parents are made, and is renamed. In a bucket its files
    are uploaded, and `last` after all others; where that fails, they are kept and the error says
    where. What a killed process left is removed.

    Args:
      target: may be an empty folder.
      last: name of the file that readers of the folder look for.
      replace: the new folder takes the place of what is at `target`.

    Raises:
      UserError: `target` exists, or another process writes it.
      OSError: it cannot be written.
    """
    target = storage.path(target)
    with own(target) as owner:
        remove_unfinished(target)
        if not replace and target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} exists and is not empty: choose another folder")
        with _partial(target) as partial:
            yield partial
            owner.check()
            if replace:
                storage.remove(target / last)  # what is damaged by a kill from here on, looks it
                storage.remove(target)
            if storage.is_remote(target):
                with storage.kept_where_upload_fails(partial, target):
                    upload(partial, target, last)
            else:
                partial.replace(target)


@contextlib.contextmanager
def _partial(target: pathlib.Path) -> Iterator[pathlib.Path]:
    if storage.is_remote(target):
        name = hashlib.sha256(str(target).encode()).hexdigest()[:32]
        partial = storage.cache_folder() / "partial" / name
        storage.remove(partial)
    else:
        for path in target.parent.iterdir():
            # Earlier versions put their process number in front of "partial".
            if re.fullmatch(rf"\.{re.escape(target.name)}(\.\d+)?\.partial", path.name):
                storage.remove(path)
        partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        with contextlib.suppress(OSError):  # the error of the body counts
            storage.remove(partial)


def remove_unfinished(target: pathlib.Path) -> None:
    """Removes a folder in a bucket whose upload did not come to its end."""
    if storage.is_remote(target) and (target / UPLOADING).exists():
        storage.remove(target)


def upload(source: pathlib.Path, target: pathlib.Path, last: str) -> None:
    """Copies a local folder into a bucket, the file `last` after all others. `target` must be new;
    the caller owns it."""
    (target / UPLOADING).write_bytes(b"")
    names = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]

    def copy(name: pathlib.PurePath) -> None:
        storage.copy(source / name, target / name.as_posix())

    with concurrent.futures.ThreadPoolExecutor(_UPLOADS_AT_ONCE) as pool:
        list(pool.map(copy, [name for name in names if str(name) != last]))
    copy(pathlib.PurePath(last))
    (target / UPLOADING).unlink()


class FolderWriter(abc.ABC):
    """Writes a `new_folder` in the body of a `with` statement, part by part.

    Attributes:
      partial: what becomes the folder; other files that are written here appear with it.
    """

    partial: pathlib.Path

    def __init__(self, folder: str | os.PathLike, last: str, replace: bool = False):
        """Arguments as of `new_folder`."""
        self._folder = storage.path(folder)
        self._new_folder = new_folder(self._folder, last, replace)
        self._writer = None  # of the part that is being written; it can be closed

    def __enter__(self) -> Self:
        self.partial = self._new_folder.__enter__()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with contextlib.ExitStack() as last:
            last.push(self._new_folder)
            if kind is not None:
                if self._writer is not None:
                    self._writer.close()
                raise error  # the folder must not appear
            self._finish()

    @abc.abstractmethod
    def _finish(self) -> None:
        """Writes what comes last."""
