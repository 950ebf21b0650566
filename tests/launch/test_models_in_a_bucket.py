"""Models, vectors and evaluations in a bucket are those on a disk, from the same commands."""

import importlib.util
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT
from helpers import cloud_storage, published_models, synthetic_data
from helpers.evaluation_data import jsonl, write
from helpers.labelled_model import CONFIG, labelled

from moe_embed_jax import Embedder, conversion, launching, storage
from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.errors import UserError

DENSE = CONFIG | {"num_experts": 0, "n_layer": 2}
TEXTS = [text.text for text in labelled(6)]


def copy(source, target):
    """As `gcloud storage cp -r` does."""
    for path in source.rglob("*"):
        if path.is_file():
            storage.write(target / path.relative_to(source).as_posix(), path.read_bytes())


@pytest.fixture(scope="module")
def places(data_dir, cloud_server, tmp_path_factory):
    """A folder on the disk and one in the bucket, with a published model, its import, and what
    upcycling makes of it."""
    disk = tmp_path_factory.mktemp("models")
    tensors = published_models.random_tensors(published_models.nomic_shapes(DENSE))
    published_models.write_folder(disk / "published", DENSE, tensors)
    vocabulary = vocabulary_path(synthetic_data.PREPARATION, data_dir)
    shutil.copy(vocabulary, disk / "published" / "sentencepiece.model")
    places = disk, storage.path(f"gs://{cloud_storage.BUCKET}/{disk.name}")
    copy(disk / "published", places[1] / "published")
    for place in places:
        assert conversion.import_model(place / "published", place / "ours")
        assert not conversion.import_model(place / "published", place / "ours")  # done before
        assert conversion.upcycle_model(
            place / "ours", place / "sparse", "preserving", num_experts=2
        )
    return places


@pytest.fixture
def launch(monkeypatch):
    """launch("embed", "--flag=value", ...) -> exit status."""

    def run(name, *arguments):
        path = ROOT / "launch" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"launch_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        return launching.run(module.main)

    return run


def files_of(folder) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "made_by.json"
    }


def test_models(places, bucket):
    disk, remote = places
    for place in places:
        assert conversion.export_model(place / "sparse", place / "out")
    exported = files_of(disk / "out")
    assert "model.safetensors" in exported and exported == files_of(remote / "out")
    for name in ("published", "ours", "sparse", "out"):
        expected = Embedder.load(disk / name).encode(TEXTS)
        np.testing.assert_array_equal(Embedder.load(str(remote / name)).encode(TEXTS), expected)
    int8 = [Embedder.load(place / "sparse", weights="int8").encode(TEXTS) for place in places]
    np.testing.assert_array_equal(*int8)


def test_a_folder_that_was_copied_by_hand(places, bucket, tmp_path):
    disk, remote = places
    copy(disk / "sparse", bucket / "up")
    copy(remote / "sparse", tmp_path / "down")
    expected = Embedder.load(disk / "sparse").encode(TEXTS)
    for folder in (bucket / "up", tmp_path / "down"):
        np.testing.assert_array_equal(Embedder.load(folder).encode(TEXTS), expected)
    (bucket / "up/checkpoints/0/commit_success.txt").unlink()  # as of an earlier version
    message = f"{bucket}/up/checkpoints holds no finished checkpoint yet; a copy from a disk needs "
    message += "an empty file commit_success.txt in the folder of its step"
    with pytest.raises(UserError, match=re.escape(message)):
        Embedder.load(bucket / "up")


def test_routing(places, launch):
    rows = [{"text": t.text, "language": t.language} for t in labelled(5)]
    for place in places:
        write(place / "labelled.jsonl", jsonl(rows))
        flags = f"--model={place}/sparse", f"--texts={place}/labelled.jsonl", "--shuffles=5"
        assert launch("inspect_routing", *flags, f"--output={place}/routing") == 0
    disk, remote = (files_of(place / "routing") for place in places)
    assert "by_language.png" in disk and disk == remote


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"model": "gs://no-such-bucket/model"},
            "model folder gs://no-such-bucket/model does not exist",
        ),
        ({"input": "gs://bucket/none.jsonl"}, "gs://bucket/none.jsonl: cannot be read: no such"),
        ({"model": "gs:/bucket/model"}, "gs is no storage that can be used: give gs://"),
    ],
)
def test_mistakes_are_one_line(places, launch, capsys, tmp_path, flags, message):
    (tmp_path / "texts.txt").write_text("a\n")
    given = {
        "model": f"{places[0]}/published",
        "input": f"{tmp_path}/texts.txt",
        "output": f"{tmp_path}/e.npy",
        "prompt": "document",
    }
    given |= flags
    assert launch("embed", *(f"--{name}={value}" for name, value in given.items())) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1 and message in captured
