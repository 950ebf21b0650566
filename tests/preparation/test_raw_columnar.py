"""Parquet, Arrow and Feather files as raw sources: what is read, and what damage does."""

import random
import sys

import pytest
from helpers import raw_sources
from helpers.raw_sources import read, texts

pytest.importorskip("apache_beam", reason="needs Apache Beam (pip install -e .[beam])")

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet

from moe_embed_jax.errors import UserError
from moe_embed_jax.preparation.beam import columnar


def test_columnar_files(tmp_path):
    rows = [{"query": "q", "document": "d", "negatives": ["n"]}, {"query": None, "document": "d"}]
    raw_sources.parquet(tmp_path / "hub/data/train-00000-of-00001.parquet", rows)
    raw_sources.arrow(tmp_path / "disk/train/data-00000-of-00001.arrow", rows)
    for folder in ("hub", "disk"):
        good, bad = read(tmp_path, format="pairs", path=tmp_path / folder, language="en")
        assert texts(good) == [("q", "d", [], "en")]
        assert (bad[0].line, bad[0].field) == (2, "query")
    good, _ = read(tmp_path, format="triplets", path=tmp_path / "hub", language="en")
    assert texts(good) == [("q", "d", ["n"], "en")]
    raw_sources.parquet(tmp_path / "hub/data/test-00000-of-00001.parquet", rows)
    with pytest.raises(UserError, match=r"held-out files \(.*test-00000.*\); name the"):
        read(tmp_path, format="pairs", path=tmp_path / "hub", language="en")
    one = tmp_path / "hub/data/train-*.parquet"
    assert len(read(tmp_path, format="pairs", path=one, language="en")[0]) == 1


def test_feather_and_binary_texts(tmp_path):
    rows = [{"query": b"q", "document": "d", "image": b"\xff"}, {"query": b"\xff", "document": "d"}]
    table = pa.Table.from_pylist(rows)
    pa.feather.write_feather(table, tmp_path / "a.feather")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    raw_sources.parquet(tmp_path / "a.parquet", rows)
    for name in ("a.feather", "a.arrow", "a.parquet"):
        good, bad = read(tmp_path, format="pairs", path=tmp_path / name, language="en")
        assert texts(good) == [("q", "d", [], "en")]
        assert bad[0].line == 2 and "must be a string, got {'BINARY, no UTF-8'" in bad[0].problem


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_damaged_file_cannot_end_the_process(tmp_path, kind):
    """Whatever its reader does, signals too, is a bad row that names the file."""
    rows = [{"query": "q", "document": "d", "negatives": ["n", "m"]}] * 5
    path = getattr(raw_sources, kind)(tmp_path / f"a.{kind}", rows)
    whole, generator, problems = path.read_bytes(), random.Random(5), []
    for _ in range(4):
        data = bytearray(whole)
        for place in generator.sample(range(4, len(data) - 8), 3):
            data[place] ^= 1 << generator.randrange(4)
        path.write_bytes(data)
        problems += [
            row.problem for row in read(tmp_path, format="pairs", path=path, language="en")[1]
        ]
    assert any("the file is damaged here" in problem for problem in problems)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere mapped memory is not counted")
def test_the_memory_that_a_file_can_take_is_bounded(tmp_path, monkeypatch):
    """A text that is stored once and stands in 200 rows: a small file, 1.6 GB of rows."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 200), pa.array(["ab" * 4_000_000]))
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"document": text}), path)
    assert path.stat().st_size < 2_000_000
    monkeypatch.setattr(columnar, "MOST_MEMORY", 1 << 30)
    with pytest.raises(
        columnar.Damaged, match="256 of its rows take more than 1,073,741,824 bytes"
    ):
        list(columnar.read_rows(str(path)))


def test_a_reader_that_is_killed_is_damage(tmp_path, monkeypatch):
    script = tmp_path / "dies.py"
    script.write_text("import os, signal\nprint('{}')\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr(columnar, "__file__", str(script))
    with pytest.raises(columnar.Damaged, match="its reader ended with signal 9"):
        list(columnar.read_rows("a.parquet"))


def test_damaged_parquet(tmp_path):
    path = raw_sources.parquet(tmp_path / "a.parquet", raw_sources.pairs(50))
    path.write_bytes(path.read_bytes()[:-20])
    good, bad = read(tmp_path, format="pairs", path=path, language="en")
    assert not good and "the file is damaged here" in bad[0].problem
