import pytest

from moe_embed_jax.errors import UserError
from moe_embed_jax.new_folder import new_folder
from moe_embed_jax.ownership import own


def test_it_appears_whole(tmp_path):
    target = tmp_path / "deep" / "folder"
    with new_folder(target, last="a") as partial:
        (partial / "a").write_text("a")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"]
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "folder", last="a") as partial:
        (partial / "a").write_text("a")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_is_removed(tmp_path):
    for name in (".folder.partial", ".folder.1234.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    (tmp_path / ".folder2.partial").mkdir()  # of another target
    with new_folder(tmp_path / "folder", last="a") as partial:
        assert not list(partial.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".folder2.partial", "folder"]


def test_a_folder_that_exists_is_refused_or_replaced(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    with new_folder(target, last="a") as partial:
        (partial / "old").write_text("")
    with pytest.raises(UserError, match="folder exists and is not empty: choose another"):
        new_folder(target, last="a").__enter__()
    with new_folder(target, last="new", replace=True) as partial:
        (partial / "new").write_text("")
        assert (target / "old").exists()
    assert [path.name for path in target.iterdir()] == ["new"]


def test_two_at_once_are_refused(tmp_path):
    target = tmp_path / "folder"
    with own(target), pytest.raises(UserError, match=r"folder is in use by process \d+ on "):
        new_folder(target, last="a").__enter__()
    with (
        new_folder(target, last="a"),
        pytest.raises(UserError, match="folder is in use by process"),
    ):
        new_folder(target, last="a").__enter__()
