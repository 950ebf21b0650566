"""launch/prepare.py on this machine where raw files and output are in a bucket."""

import pytest
from helpers import raw_sources
from helpers.raw_sources import prepare

pytest.importorskip("apache_beam", reason="needs Apache Beam (pip install -e .[beam])")

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.pairs.manifest import MANIFEST
from moe_embed_jax.preparation.beam import pipeline


def write_sources(folder, path):
    """A sources file at `path` of raw files in `folder`."""
    names = {"format": "pairs", "path": f"{folder}/web/*.jsonl.gz", "language_field": "lang"}
    triplets = {"format": "triplets", "path": f"{folder}/triplets", "language": "ja"}
    beir = {"format": "beir", "path": f"{folder}/beir", "language": "en", "max_bad_share": 0.5}
    sources = {"web": names, "triplets": triplets, "beir": beir}
    return raw_sources.write_sources(path, *({"name": n, **s} for n, s in sources.items()))


@pytest.fixture
def raw(bucket, tmp_path):
    """(sources in the bucket, the same on the disk)."""
    local = tmp_path / "raw"
    for part, language in enumerate(("en", "de", "en")):
        rows = raw_sources.pairs(40, f"part {part % 2}", lang=language)
        raw_sources.jsonl(local / f"web/{part}.jsonl.gz", rows)
    raw_sources.parquet(local / "triplets/a.parquet", raw_sources.pairs(30, "t", negatives=["n"]))
    raw_sources.beir(local / "beir")
    for path in local.rglob("*"):
        if path.is_file():
            storage.copy(path, bucket / "raw" / path.relative_to(local).as_posix())
    sources = write_sources(local, tmp_path / "sources.json")
    remote = write_sources(bucket / "raw", tmp_path / "remote.json")
    storage.copy(remote, bucket / "sources.json")
    return bucket / "sources.json", sources


def contents(folder) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    names = [n for n, path in found.items() if path.is_file() and n != MANIFEST]
    return {name: found[name].read_bytes() for name in names if "quarantine" not in name}


def test_pairs_from_a_bucket_to_a_bucket(raw, bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    output = bucket / "pairs"

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "upload", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(raw[0], output)
    assert not output.exists()
    assert "read: 5 input files\n" in capsys.readouterr().out
    manifest = prepare(raw[0], output)
    assert f"prepared before: {storage.local_place(output)}\n" in capsys.readouterr().out
    assert not storage.local_place(output).exists()
    local = prepare(raw[1], tmp_path / "pairs")
    assert manifest["content_hash"] == local["content_hash"]
    assert contents(output) == contents(tmp_path / "pairs")
    folder = PairFolder(output)
    folder.verify()
    assert folder.manifest == manifest and (output / "quarantine" / "beir.jsonl").is_file()
    prepare(raw[0], output)
    assert capsys.readouterr().out.endswith(f"prepared before: {output}\n")
    with pytest.raises(UserError, match=r"gs://\S+pairs holds pairs that were prepared from other"):
        prepare(raw[1], output)
    with pytest.raises(UserError, match=r"gs://\S+raw exists and is not empty"):
        prepare(raw[0], bucket / "raw")


def test_raw_files_that_are_not_there(bucket, tmp_path):
    for folder, message in (
        (bucket / "none", r"no data file matches gs://\S+none/web/\*.jsonl.gz"),
        ("gs://no-such-bucket/x", "cannot be looked up: there is no such bucket"),
    ):
        sources = write_sources(folder, tmp_path / "sources.json")
        with pytest.raises(UserError, match=message):
            prepare(sources, bucket / "pairs")
    with pytest.raises(UserError, match=r"--sources=gs://\S+ cannot be read: no such object"):
        prepare(bucket / "no.json", bucket / "pairs")
