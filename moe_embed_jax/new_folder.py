"""A folder that appears whole, or not at all, and that one process at a time writes."""

import abc
import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Self

from moe_embed_jax.errors import UserError
from moe_embed_jax.ownership import own


@contextlib.contextmanager
def new_folder(target, replace: bool = False) -> Iterator[pathlib.Path]:
    """An empty folder to fill, which becomes `target` when the body ends well.

    It lies beside `target`, whose parents are made. What a killed process left there is removed.

    Args:
      target: may be an empty folder.
      replace: the new folder takes the place of what is at `target`.

    Raises:
      UserError: `target` exists, or another process writes it.
      OSError: it cannot be written.
    """
    target = pathlib.Path(target)
    with own(target) as owner:
        if not replace and target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} exists and is not empty: choose another folder")
        for path in target.parent.iterdir():
            # Earlier versions put their process number in front of "partial".
            if re.fullmatch(rf"\.{re.escape(target.name)}(\.\d+)?\.partial", path.name):
                shutil.rmtree(path, ignore_errors=True)
        partial = target.with_name(f".{target.name}.partial")
        partial.mkdir()
        try:
            yield partial
            owner.check()
            if replace and target.exists():
                shutil.rmtree(target)
            partial.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


class FolderWriter(abc.ABC):
    """Writes a `new_folder` in the body of a `with` statement, part by part.

    Attributes:
      partial: what becomes the folder; other files that are written here appear with it.
    """

    partial: pathlib.Path

    def __init__(self, folder: str | os.PathLike, replace: bool = False):
        """Arguments as of `new_folder`."""
        self._folder = pathlib.Path(folder)
        self._new_folder = new_folder(self._folder, replace)
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
