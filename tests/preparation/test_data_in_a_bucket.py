"""Preparation where data_dir, wheels and pairs are in a bucket: the files of a local one."""

import pathlib
import shutil

import pytest
from helpers import synthetic_data, synthetic_wheels

from moe_embed_jax import storage
from moe_embed_jax.data.data_spec import held_out_path
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.heldout import load_heldout
from moe_embed_jax.preparation import held_out_sets as retrieval_sets
from moe_embed_jax.preparation import tokenize
from moe_embed_jax.preparation.builders import statistics, wheels

VOCABULARY = {"kind": "train", "size": 300}
PAIRS = {
    "vocabulary": VOCABULARY,
    "query_length": 10,
    "document_length": 20,
    "rates": {"translations": 1},
}


def files(folder) -> dict[str, bytes]:
    """{path below `folder`: content}, without what is local or differs between two runs."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if name != statistics.FILE_NAME and not name.startswith(("tfds/", "wheels/"))
    }


def test_the_default_data(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(retrieval_sets, "MIN_QUERIES", 10)  # there are few in the synthetic wheels
    for name, wheel in synthetic_wheels.write_wheels(tmp_path / "wheels").items():
        monkeypatch.setitem(wheels.WHEELS, name, wheel)
        storage.copy(tmp_path / "wheels" / wheel.file_name, bucket / "wheels" / wheel.file_name)
    data_dir, local = bucket / "data", tmp_path / "data"
    store = tokenize.prepare(PAIRS, str(data_dir), f"{bucket}/wheels")
    assert storage.is_remote(store)
    place = storage.local_place(data_dir)
    assert [path.name for path in place.iterdir()] == ["tfds"]
    shutil.copytree(place, local)  # that TFDS builds the same again has a test of its own
    assert tokenize.prepare(PAIRS, local, tmp_path / "wheels") == local / "tokens" / store.name
    in_bucket = files(data_dir)
    assert in_bucket == files(local)
    assert {name.split("/")[0] for name in in_bucket} == {"tokens", "vocabulary", "retrieval"}
    sections = [statistics.read_json(d / statistics.FILE_NAME) for d in (data_dir, local)]
    for section in sections:
        del section["tokens"]["seconds"]
    assert sections[0] == sections[1]
    capsys.readouterr()
    tokenize.prepare(PAIRS, str(data_dir))
    assert capsys.readouterr().out == f"data: prepared before, {store}\n"
    assert load_heldout(data_dir).keys() == load_heldout(local).keys()
    # A set that is not whole is written again, from what this machine keeps.
    (data_dir / "retrieval" / "api" / "en" / "qrels.tsv.gz").unlink()
    retrieval_sets.prepare(data_dir, progress=False)
    assert files(data_dir) == in_bucket
    with pytest.raises(UserError, match=r"wheels_dir=gs://\S+nowhere: no such folder"):
        wheels.fetch(["botocore"], tmp_path, f"{bucket}/nowhere")


def test_documents_of_a_folder_in_a_bucket(bucket, tmp_path):
    synthetic_data.write_pairs(bucket / "pairs")
    synthetic_data.write_pairs(tmp_path / "pairs")
    found = []
    for root in (bucket, tmp_path):
        config = {"documents": "", "texts": str(root / "pairs"), "vocabulary": VOCABULARY}
        tokenize.prepare(config, root / "data")
        assert len(TokenStore.open(tokenize.prepare(config, root / "data"))) > 100
        assert held_out_path(config, root / "data").is_dir()
        found.append(files(root / "data"))
    assert found[0] == found[1]
    with pytest.raises(UserError, match="exists and is not empty"):
        synthetic_data.write_pairs(bucket / "pairs")


def test_paths_of_this_machine(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv(storage.CACHE, str(tmp_path))
    assert storage.local_place(tmp_path / "a") == tmp_path / "a"
    place = storage.local_place(bucket / "a")
    assert place.is_relative_to(tmp_path) and not place.exists()
    assert storage.local_place(bucket) / "a" == place
    assert isinstance(place, pathlib.Path)
