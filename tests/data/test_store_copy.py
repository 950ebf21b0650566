"""Token stores that lie in a bucket: read there, or copied to a disk first."""

import multiprocessing
import pathlib

import numpy as np
import pytest
from helpers import synthetic_data

from moe_embed_jax import storage
from moe_embed_jax.data import store_copy
from moe_embed_jax.data.data_spec import planned_store_path
from moe_embed_jax.data.store_copy import copied_store
from moe_embed_jax.data.token_store import SPEC, TokenStore
from moe_embed_jax.errors import UserError


@pytest.fixture
def local(data_dir) -> pathlib.Path:
    return planned_store_path(synthetic_data.PREPARATION, data_dir)


@pytest.fixture
def remote(local, bucket) -> pathlib.Path:
    for path in local.iterdir():
        storage.copy(path, bucket / "tokens" / path.name)
    return bucket / "tokens"


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_of(store: TokenStore) -> list:
    order = np.random.default_rng(0).permutation(len(store))
    return [[ids.tolist() for ids in row] for row in store.read(order)]


def test_a_store_in_a_bucket_has_the_same_rows(local, remote):
    assert rows_of(TokenStore.open(remote)) == rows_of(TokenStore.open(local))
    (remote / "shard-00000-of-00001.array_record").unlink()
    with pytest.raises(UserError, match=r"gs://\S+array_record is missing"):
        TokenStore.open(remote)


def test_a_store_is_copied_once(local, remote, tmp_path, capfd):
    copy = copied_store(remote, f"{tmp_path}/cache")
    assert contents(copy) == contents(local)
    assert "copy data: 100%" in capfd.readouterr().err
    for path in remote.iterdir():
        if path.name != SPEC:
            path.unlink()  # nothing but the name of the copy is read
    assert copied_store(remote, f"{tmp_path}/cache") == copy
    assert capfd.readouterr().out == f"data: copied before, {copy}\n"
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_an_unfinished_copy_is_made_again(local, remote, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_copy, "damage_of", stop)
        with pytest.raises(KeyboardInterrupt):
            copied_store(remote, str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert contents(copied_store(remote, str(tmp_path))) == contents(local)


def test_a_copy_that_cannot_be_made_is_one_line(remote, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"data.cache_dir=gs://b/c is in a bucket: name a folder"):
        copied_store(remote, "gs://b/c")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "free_bytes", lambda _: store_copy.KEPT_FREE)
        with pytest.raises(UserError, match=rf"data.cache_dir={tmp_path} has 1.1 GB free, and gs:"):
            copied_store(remote, str(tmp_path))
    copy = storage.copy

    def damaging(source, target):
        copy(source, target)
        if target.name == "lengths.npy":
            target.write_bytes(target.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(storage, "copy", damaging)
    with pytest.raises(UserError, match=r"lengths.npy was changed .* after it was copied from gs:"):
        copied_store(remote, str(tmp_path))
    assert not list(tmp_path.iterdir())


def copy_and_count(folder, cache, started, copies) -> None:
    copy = store_copy._copy

    def counted(*arguments):
        copies.put(1)
        started.wait(60)  # until the other process is there, too
        copy(*arguments)

    store_copy._copy = counted
    copied_store(pathlib.Path(folder), cache)


def test_processes_of_a_machine_do_not_copy_twice(local, tmp_path):
    """Of a store on a disk, so that processes need no server."""
    context = multiprocessing.get_context("spawn")
    started, copies = context.Event(), context.Queue()
    arguments = (str(local), str(tmp_path), started, copies)
    processes = [context.Process(target=copy_and_count, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    copies.get(timeout=60)
    started.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0] and copies.empty()
    (copy,) = tmp_path.iterdir()
    assert contents(copy) == contents(local)
