"""Models, vectors and evaluations in a bucket are those on a disk, from the same commands."""

import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT
from helpers import cloud_storage, published_models, synthetic_data
from helpers.evaluation_data import jsonl, table, write, write_beir, write_miracl
from helpers.labelled_model import CONFIG, labelled

from moe_embed_jax import Embedder, conversion, launching, storage
from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.errors import UserError
from moe_embed_jax.search.vectors import VectorStore

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
    for folder in (bucket / "up", tmp_path / "down"):
        for weights in ("float32", "int8"):
            expected = Embedder.load(disk / "sparse", weights=weights).encode(TEXTS)
            found = Embedder.load(folder, weights=weights).encode(TEXTS)
            np.testing.assert_array_equal(found, expected)
    # Orbax writes this file last, on disks too. A copy without it is incomplete.
    (bucket / "up/checkpoints/0/commit_success.txt").unlink()
    with pytest.raises(UserError, match=f"{bucket}/up/checkpoints holds no finished checkpoint"):
        Embedder.load(bucket / "up")


def test_embeddings(places, launch):
    for place in places:
        write(place / "texts.jsonl", jsonl(TEXTS))
        flags = f"--model={place}/published", f"--input={place}/texts.jsonl", "--prompt=document"
        for name in ("e.npy", "e.zarr", "e.zarr"):  # the second time it finds its work done
            assert launch("embed", *flags, f"--output={place}/{name}") == 0
    disk, remote = places
    assert (remote / "e.npy").read_bytes() == (disk / "e.npy").read_bytes()
    remote_files, files = files_of(remote / "e.zarr"), files_of(disk / "e.zarr")
    # A bucket has a CRC-32C of each object.
    checksums = remote_files.pop("chunks/0.json"), files.pop("chunks/0.json")
    assert b"crc32c:" in checksums[0] and b"crc32c:" not in checksums[1]
    assert remote_files == files
    assert VectorStore(remote / "e.zarr")[2:4].shape == (2, DENSE["n_embd"])


PAGE = """
def get_config(variant=""):
    name = "miracl-v1.0-{subset}"
    return {"tasks": {
        "STS": dict(kind="sts", path="sts/{subset}*.tsv.gz"),
        "Set": dict(kind="retrieval", path="beir/en", languages="en"),
        "MIRACL": dict(
            kind="miracl",
            topics=f"{name}/topics/topics.{name}-dev.tsv",
            qrels=f"{name}/qrels/qrels.{name}-dev.tsv",
            corpus="miracl-corpus-v1.0-{subset}/docs-*.jsonl.gz",
        ),
    }}
"""


def write_sets(data) -> None:
    texts = [text.text for text in labelled(12)]
    numbers = range(0, 24, 3)
    documents = {f"d{n}": text for n, text in enumerate(texts)}
    queries = {f"q{n}": texts[n][:40] for n in numbers}
    write_beir(data / "beir/en", documents, queries, [(f"q{n}", f"d{n}", 1) for n in numbers])
    rows = [(5 - n / 4, texts[n], texts[(3 * n) % 24]) for n in range(20)]
    for name in ("de", ".de"):  # a hidden file is none of the data
        header = ("score", "sentence1", "sentence2")
        write(data / f"sts/{name}.tsv.gz", table(*rows, header=header))
    shards = [[(f"{n}#{s}", "", texts[n + s]) for n in range(12)] for s in range(2)]
    topics = {str(n): texts[n][:30] for n in range(12)}
    write_miracl(data, "ar", shards, topics, [(n, f"{n}#{n % 2}", 1) for n in range(12)])


def test_evaluations(places, launch, tmp_path):
    (tmp_path / "page.py").write_text(PAGE)
    write_sets(places[0] / "data")
    copy(places[0] / "data", places[1] / "data")
    found = []
    for place in places:
        flags = f"--model={place}/published", "--dim=32,8"
        sets = f"--dataset={place}/data/beir/en", f"--output={place}/results.json"
        assert launch("evaluate", *flags, *sets) == 0
        suite = f"--suite={tmp_path}/page.py", f"--data={place}/data", f"--output={place}/scores"
        assert launch("evaluate", *flags, *suite) == 0
        results = {}
        for path in (place / "scores/results").rglob("*.json"):
            content = json.loads(path.read_text())
            content.pop("evaluation_time", None)
            results[path.relative_to(place).as_posix()] = content
        results["sets"] = json.loads((place / "results.json").read_text())
        results["table"] = (place / "scores/table.md").read_text()
        assert (place / "scores/languages.png").read_bytes().startswith(b"\x89PNG")
        found.append(results)
    assert len(found[0]) == 2 * 4 + 2 and found[0] == found[1]


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
        (
            {"output": "gs://no-such-bucket/e.npy"},
            "gs://no-such-bucket/e.npy: cannot be written: there is no such bucket: create it, or "
            "correct its name",
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
        "prompt": "none",
    }
    given |= flags
    assert launch("embed", *(f"--{name}={value}" for name, value in given.items())) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1 and message in captured
