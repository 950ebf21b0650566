"""Which rows of raw sources a preparation keeps: duplicates, and a limit on bad rows."""

import json

import numpy as np
import pytest
from helpers import raw_sources
from helpers.raw_sources import prepare

pytest.importorskip("apache_beam", reason="needs Apache Beam (pip install -e .[beam])")

from moe_embed_jax.errors import UserError
from moe_embed_jax.pairs.folder import PairFolder


def test_duplicates(tmp_path):
    rows = [
        {"query": "What is it?", "document": "A  thing", "negatives": ["x"]},
        {"query": "what is IT?", "document": "a thing", "negatives": ["y", "x"]},
        {"query": "What is it?", "document": "A  thing", "negatives": ["z"]},
        {"query": "What is it?", "document": "Another thing", "negatives": []},
        {"query": "ｗｈａｔ is it?", "document": "a\tthing", "negatives": ["Y ", "WHAT is it?"]},
    ]
    one = raw_sources.jsonl(tmp_path / "one.jsonl", rows)
    sources = raw_sources.write_sources(
        tmp_path / "sources.json",
        {"name": "one", "format": "triplets", "path": one, "language": "en"},
        {
            "name": "two",
            "format": "pairs",
            "path": {"en": str(one), "de": str(one.parent / "two.jsonl")},
        },
    )
    raw_sources.jsonl(tmp_path / "two.jsonl", rows[:1])
    flag = {"query": "Which?", "pos": ["This", "That"], "neg": ["Other"]}
    flag |= {"pos_scores": [1, 2], "neg_scores": [0.5]}
    again = {"query": "which?", "pos": ["This"], "neg": ["Else"]}
    content = json.loads(sources.read_text())
    path = str(raw_sources.jsonl(tmp_path / "flag.json", [json.dumps([flag, again])]))
    content += [{"name": "flag", "format": "flagembedding", "path": path, "language": "en"}]
    sources.write_text(json.dumps(content))
    manifest = prepare(sources, tmp_path / "pairs")
    counts = manifest["about"]["sources"]
    assert counts["one"] == {
        "in": 5,
        "out": 2,
        "quarantine": 0,
        "exact_duplicates": 1,
        "normalised_duplicates": 2,
        "dropped_negatives": 1,  # it is the query
    }
    # Per source, and across the languages of a source: what comes first in the input stays.
    assert (counts["two"]["in"], counts["two"]["out"]) == (6, 2)
    folder = PairFolder(tmp_path / "pairs")
    assert list(folder.groups) == [("one", "en"), ("two", "en"), ("flag", "en")]
    rows = folder.read(range(*folder.groups["flag", "en"]))
    found = {row.document: (row.negatives, row.scores) for row in rows}
    assert found["That"] == (("Other",), (2.0, 0.5))
    assert found["This"][0] == ("Other", "Else")
    np.testing.assert_array_equal(found["This"][1], (1.0, 0.5, np.nan))
    assert folder.manifest["format"] == 2
    (kept,) = [r for r in folder.read(range(2)) if r.document == "A  thing"]
    assert kept.negatives == ("x", "y", "z")  # the negatives of the duplicates are not lost


def test_too_many_bad_rows_stop_the_run(tmp_path):
    raw_sources.jsonl(tmp_path / "a/good.jsonl", raw_sources.pairs(90))
    raw_sources.jsonl(tmp_path / "a/bad.jsonl", [*raw_sources.pairs(4, "b"), {"query": "q"}, "{"])
    raw_sources.jsonl(tmp_path / "a/fair.jsonl", [*raw_sources.pairs(3, "c"), "["])
    sources = raw_sources.write_sources(
        tmp_path / "s.json",
        {"name": "a", "format": "pairs", "path": tmp_path / "a", "language": "en"},
    )
    with pytest.raises(UserError) as caught:
        prepare(sources, tmp_path / "pairs")
    message = str(caught.value)
    assert "source a: 3 of 100 rows are bad (3.00%, allowed 1.00%)" in message
    assert f"worst file is {tmp_path}/a/bad.jsonl with 2 of 6" in message
    assert "line 5, field document: is missing" in message
    quarantine = tmp_path / "pairs/quarantine/a.jsonl"
    assert str(quarantine) in message and len(quarantine.read_text().splitlines()) == 3
    with pytest.raises(UserError, match="is missing"):
        PairFolder(tmp_path / "pairs")
    # The files need not be read again to allow more.
    manifest = prepare(sources, tmp_path / "pairs", max_bad_share=0.03)
    assert manifest["about"]["sources"]["a"]["quarantine"] == 3
