import contextlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_embed_jax.errors import UserError
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.pairs.manifest import content_hash
from moe_embed_jax.pairs.row import PairRow, decode_pair, encode_pair
from moe_embed_jax.preparation.pair_writer import PairWriter

ROWS = [
    PairRow("what is a cat", "an animal", ("a car", "a hat"), "faq", "en"),
    PairRow("where is Rome", "in Italy", (), "faq", "en"),
    PairRow("was ist das", "ein Haus \u2028 mit Tür", ("ein Auto",), "faq", "de"),
    PairRow("猫とは", "動物 🐈", (), "wiki", "ja"),
    PairRow("犬とは", "動物 🐕", ("魚", "鳥", "猫"), "wiki", "ja"),
]


def write(folder, rows=ROWS, about=None, rows_per_shard=2):
    with PairWriter(folder, about or {"made": "by hand"}, rows_per_shard) as writer:
        for row in rows:
            writer.write(row)
    return PairFolder(folder)


def test_what_is_written_is_read(tmp_path):
    folder = write(tmp_path / "pairs")
    assert len(folder) == 5
    assert folder.groups == {("faq", "en"): (0, 2), ("faq", "de"): (2, 3), ("wiki", "ja"): (3, 5)}
    assert folder.read([4, 0, 4, 2]) == [ROWS[4], ROWS[0], ROWS[4], ROWS[2]]
    assert folder.read(range(5)) == ROWS
    manifest = folder.manifest
    assert manifest["about"] == {"made": "by hand"}
    assert manifest["languages"] == ["de", "en", "ja"]
    assert [shard["rows"] for shard in manifest["shards"]] == [2, 2, 1]
    expected = [[len(r.query), len(r.document), len(r.negatives)] for r in ROWS]
    np.testing.assert_array_equal(folder.lengths(), expected)
    ja = manifest["groups"][2]
    assert (ja["query_characters"], ja["document_characters"], ja["negatives"]) == (6, 8, 3)
    folder.verify()
    with pytest.raises(IndexError):
        folder.read([5])


@settings(max_examples=50, deadline=None)
@given(
    st.text(min_size=1), st.text(min_size=1), st.lists(st.text(min_size=1), max_size=4), st.text()
)
def test_any_text_survives(query, document, negatives, language):
    row = PairRow(query, document, tuple(negatives), "s", language)
    try:
        record = encode_pair(row)
    except UnicodeEncodeError:
        assert any("\ud800" <= c <= "\udfff" for t in (*row[:2], *negatives, language) for c in t)
    else:
        assert decode_pair(record) == row


SCORED = [
    row._replace(scores=() if i % 2 else tuple(0.5 - k / 8 for k in range(1 + len(row.negatives))))
    for i, row in enumerate(ROWS)
]


def test_scores_are_kept_and_told_by_the_format(tmp_path):
    unknown = SCORED[0]._replace(scores=(0.25, math.nan, 0.5))
    folder = write(tmp_path / "scored", [unknown, *SCORED[1:]])
    assert folder.manifest["format"] == 2
    assert [shard.get("scored") for shard in folder.manifest["shards"]] == [1, 1, 1]
    first, *others = folder.read(range(5))
    assert others == SCORED[1:]
    np.testing.assert_array_equal(first.scores, unknown.scores)
    # Without scores the folder is what it was before there were any.
    assert write(tmp_path / "plain").manifest["format"] == 1
    assert "scored" not in write(tmp_path / "more").manifest["shards"][0]
    for scores in ((0.5,), (0.5, 0.5)):
        with pytest.raises(UserError, match=r"row 0 of faq/en: \d scores of 3 documents"):
            write(tmp_path / "bad", [ROWS[0]._replace(scores=scores)])
    record = encode_pair(ROWS[0]._replace(scores=(0.5,)))
    with pytest.raises(ValueError, match="1 scores of 3 documents"):
        decode_pair(record)


def test_tfds_reads_the_folder(tmp_path):
    write(tmp_path / "pairs", SCORED)
    code = f"""
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory({str(tmp_path / "pairs")!r})
print(builder.info.splits["train"].num_examples)
for row in builder.as_data_source("train"):
    print([row[k].decode() for k in ("query", "document", "source", "language")],
          [n.decode() for n in row["negatives"]])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "5"
    assert lines[1:] == [f"{[r.query, r.document, r[3], r[4]]} {list(r.negatives)}" for r in SCORED]


def test_same_rows_same_bytes(tmp_path):
    one, two = write(tmp_path / "one"), write(tmp_path / "two", about={"another": 1})
    assert one.content_hash == two.content_hash
    for path in one.folder.iterdir():
        if path.name != "manifest.json":
            assert path.read_bytes() == (two.folder / path.name).read_bytes(), path.name
    other = write(tmp_path / "other", [*ROWS[:4], ROWS[4]._replace(negatives=("魚",))])
    assert other.content_hash != one.content_hash


def test_reading_and_writing_import_no_tensorflow(tmp_path):
    code = f"""
import sys
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.pairs.row import PairRow
from moe_embed_jax.preparation.pair_writer import PairWriter
with PairWriter({str(tmp_path / "pairs")!r}, {{}}) as writer:
    writer.write(PairRow("a", "b", ("c",), "s", "en"))
print(PairFolder({str(tmp_path / "pairs")!r}).read([0]), "tensorflow" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("False")


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), PairWriter(tmp_path / "pairs", {}) as writer:
        writer.write(ROWS[0])
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no pair was written"), PairWriter(tmp_path / "pairs", {}):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([ROWS[0], ROWS[2], ROWS[1]], RuntimeError, "left before"),
        ([ROWS[0]._replace(language="../de")], UserError, "row 0: its language is '../de': a name"),
        ([ROWS[0]._replace(source="..")], UserError, "row 0: its source is '..'"),
        ([ROWS[0]._replace(document="")], UserError, "row 0 of faq/en: a text is empty"),
        ([ROWS[0]._replace(negatives=("a", ""))], UserError, "a text is empty"),
        ([ROWS[0]._replace(document="\ud800")], UserError, "no UTF-8"),
    ],
)
def test_bad_rows_are_refused(tmp_path, rows, error, message):
    with pytest.raises(error, match=message):
        write(tmp_path / "pairs", rows)
    assert not (tmp_path / "pairs").exists()


def test_a_full_folder_is_not_overwritten(tmp_path):
    write(tmp_path / "pairs")
    with pytest.raises(UserError, match="is not empty"):
        PairWriter(tmp_path / "pairs", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["shards"][0].update(file="../x"),
            r"shards\[0\]\.file is '\.\./x'",
        ),
        (lambda m: m["shards"][1].update(lengths="/etc/x"), r"shards\[1\]\.lengths is '/etc/x'"),
        (lambda m: m["groups"][0].update(language="a/b"), r"groups\[0\]\.language is 'a/b'"),
        (lambda m: m["groups"][0].update(source=".."), r"groups\[0\]\.source is '\.\.'"),
        (lambda m: m["groups"][0].update(source=7), r"groups\[0\]\.source must be a name, got 7"),
        (lambda m: m["groups"][0].update(stop=10**9), "is not a manifest of pairs"),
        (lambda m: m["groups"][0].update(start=-1), "is not a manifest of pairs"),
        (lambda m: m.update(rows="5"), "is not a manifest of pairs"),
        (lambda m: m.update(shards=[]), "is not a manifest of pairs"),
        (lambda m: m.update(groups={"a": 1}), "is not a manifest of pairs"),
    ],
)
def test_hostile_manifests(tmp_path, change, message):
    """With the right hash: no name leads out of the folder, and every value has its range."""
    folder = write(tmp_path / "pairs").folder
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    with contextlib.suppress(TypeError):
        manifest["content_hash"] = content_hash(manifest["groups"], manifest["shards"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        PairFolder(folder)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = write(tmp_path / "pairs").folder
    shard = folder / "lengths-00000-of-00003.npy"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to("../elsewhere")
    with pytest.raises(UserError, match=r"lengths: .*npy is a symbolic link out of its folder"):
        PairFolder(folder)
    (tmp_path / "elsewhere").rename(folder / "inside")
    shard.unlink()
    shard.symlink_to("inside")
    PairFolder(folder).verify()


def test_damage_is_named(tmp_path):
    folder = write(tmp_path / "pairs").folder
    with pytest.raises(UserError, match=r"nowhere/manifest\.json is missing"):
        PairFolder(tmp_path / "nowhere")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["groups"][0]["language"] = "fr"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was changed"):
        PairFolder(folder)
    folder = write(tmp_path / "more").folder
    shard = folder / "pairs-train.array_record-00001-of-00003"
    data = bytearray(shard.read_bytes())
    data[len(data) // 4] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(UserError, match=shard.name):
        PairFolder(folder).verify()
    shard.unlink()
    with pytest.raises(UserError, match="shards"):
        PairFolder(folder)


def test_shards_in_each_others_place_are_named(tmp_path):
    """Every record of theirs is whole."""
    folder = write(tmp_path / "pairs").folder
    one, other = (folder / f"pairs-train.array_record-0000{i}-of-00003" for i in (0, 1))
    one.rename(tmp_path / "one")
    other.rename(one)
    (tmp_path / "one").rename(other)
    pairs = PairFolder(folder)
    assert pairs.read([4]) == [ROWS[4]]
    for rows, shard in (([0, 4], one), ([3], other)):
        with pytest.raises(UserError, match=rf"{shard.name}: damaged \(its SHA-256 is not"):
            pairs.read(rows)
