"""A folder that appears whole, or not at all, and that one process at a time writes."""

import contextlib
import pathlib
import re
import shutil
from collections.abc import Iterator

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
