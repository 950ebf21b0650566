"""What stands where a file of a model folder may be, and is none."""

import pathlib
import re
import shutil

import pytest

from moe_embed_jax import Embedder
from moe_embed_jax.errors import UserError

st_folders = pytest.importorskip("helpers.st_folders")

# Files that say nothing of the vectors.
WITHOUT_MEANING = {"README.md"}


@pytest.mark.parametrize("kind", ["folder", "link to nothing"])
def test_what_is_no_file_is_named(kind, tmp_path):
    """A folder, or a link to nothing, where an optional file may be: not as if there were none."""
    bert_folder = st_folders.save_model(tmp_path / "bert", vocab_size=256)
    names = [path.relative_to(bert_folder) for path in bert_folder.rglob("*") if path.is_file()]
    assert pathlib.Path("1_Pooling/config.json") in names
    for number, name in enumerate(name for name in names if name.name not in WITHOUT_MEANING):
        folder = tmp_path / f"{number}"
        shutil.copytree(bert_folder, folder)
        (folder / name).unlink()
        if kind == "folder":
            (folder / name).mkdir()
        else:
            (folder / name).symlink_to("nothing")
        with pytest.raises((UserError, OSError), match=re.escape(str(folder / name))):
            Embedder.load(folder)
