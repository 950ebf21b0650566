"""Raw sources with the scores of a teacher. No Beam pipeline."""

from math import nan

import numpy as np
import pytest
from helpers import raw_sources
from helpers.raw_sources import read, texts

pytest.importorskip("apache_beam", reason="needs Apache Beam (pip install -e .[beam])")

from moe_embed_jax.errors import UserError


def test_flagembedding(tmp_path):
    scores = {"pos_scores": [0.5, 0.25], "neg_scores": [0.1, None], "prompt": "Read: ", "id": 7}
    rows = [
        {"query": "q", "pos": ["p1", "p2"], "neg": ["n1", "n2"], **scores},
        {"query": "q", "pos": "p", "neg": None},
        {"query": "q", "pos": ["p"]},
        {"query": "q", "pos": [], "neg": ["n"]},
        {"query": "q", "positive": ["p"], "neg": ["n"]},
        {"query": "q", "pos": ["p", 3]},
        {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1], "neg_scores": [1, 2]},
        {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": ["1"], "neg_scores": [2]},
    ]
    path = raw_sources.jsonl(tmp_path / "a.jsonl", rows)
    good, bad = read(tmp_path, format="flagembedding", path=path, language="en")
    for row, expected in zip(good, ([0.5, 0.1, nan], [0.25, 0.1, nan], [], []), strict=True):
        np.testing.assert_array_equal(row.texts.scores, expected)
    assert texts(good) == [
        ("q", "p1", ["n1", "n2"], "en"),
        ("q", "p2", ["n1", "n2"], "en"),
        ("q", "p", [], "en"),
        ("q", "p", [], "en"),
    ]
    assert [(row.line, row.field, row.problem) for row in bad] == [
        (4, "pos", "is empty"),
        (5, "pos", "is missing (fields: neg, positive, query)"),
        (6, "pos[1]", "must be a string, got 3"),
        (7, "neg_scores", "has 2 scores of the 1 of neg"),
        (8, "pos_scores[0]", "must be a number, got '1'"),
    ]


SCORED = {"query": "q", "documents": ["a", "n1", "n2", "n3"], "scores": [0.8, 0.5, 0.79, 0.7]}


def test_scored(tmp_path):
    """The best below 0.95 times the answer's score, best first, with their scores."""
    rows = [
        SCORED,
        SCORED | {"scores": [-0.8, None, -0.83, -0.9]},  # below -0.84
        SCORED | {"scores": [0.8, 0.1, 0.2]},
        SCORED | {"documents": []},
        {"query": "q", "documents": ["a"]},
    ]
    path = raw_sources.jsonl(tmp_path / "a.jsonl", rows)
    good, bad = read(tmp_path, format="scored", path=path, language="en")
    assert [row.texts[1:] for row in good] == [
        ("a", ("n3", "n1"), (0.8, 0.7, 0.5)),
        ("a", ("n3",), (-0.8, -0.9)),
    ]
    assert [(row.line, row.field, row.problem) for row in bad] == [
        (3, "scores", "has 3 scores of the 4 of documents"),
        (4, "documents", "is empty"),
        (5, "scores", "is missing (fields: documents, query)"),
    ]
    more = dict(format="scored", path=path, language="en", count=1, relative=None)
    good, _ = read(tmp_path, **more)
    assert good[0].texts[1:] == ("a", ("n2",), (0.8, 0.79))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_scored_tables(tmp_path, kind):
    """As lightonai/embeddings-fine-tuning: three tables, the answer first, ids between them."""
    write = getattr(raw_sources, kind)
    queries = [{"query_id": 7, "query": "question"}, {"query_id": 8, "query": "another"}]
    write(tmp_path / f"s/queries.{kind}", queries)
    texts_ = [{"document_id": i, "document": f"text {i}"} for i in range(5)]
    write(tmp_path / f"s/documents/part-0.{kind}", texts_[:3])
    write(tmp_path / f"s/documents/part-1.{kind}", texts_[3:])
    rows = [
        {"query_id": 7, "document_ids": [3, 0, 4], "scores": [0.9, 0.5, 0.6]},
        {"query_id": 9, "document_ids": [3], "scores": [0.9]},
        {"query_id": 8, "document_ids": [1, 99], "scores": [0.9, 0.1]},
        {"query_id": 8, "document_ids": [1, 2], "scores": [0.9]},
        {"query_id": 8, "document_ids": [2, 98], "scores": [0.9, 0.89]},  # 98 is not chosen
    ]
    path = write(tmp_path / f"s/scores.{kind}", rows)
    good, bad = read(tmp_path, format="scored_tables", path=tmp_path / "s", language="en")
    assert texts(good) == [
        ("question", "text 3", ["text 4", "text 0"], "en"),
        ("another", "text 2", [], "en"),
    ]
    assert good[0].texts.scores == (0.9, 0.6, 0.5)
    assert [(row.file, row.line, row.field) for row in bad] == [
        (str(path), 4, "scores"),
        (str(path), 2, "query_id"),
        (str(path), 3, "document_ids"),
    ]
    assert "'99' is not in the documents of " in bad[2].problem
    path.unlink()
    _, bad = read(tmp_path, format="scored_tables", path=tmp_path / "s", language="en")
    assert [row.problem for row in bad] == ["the folder has no scores table"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "pairs", "count": 3}, "count is a key of the formats scored and scored_tables"),
        ({"count": 0}, "count=0 must be an integer of 1 or more"),
        ({"relative": -1}, "relative=-1 must be a number above 0, or null"),
    ],
)
def test_mistakes_in_the_sources_file(tmp_path, change, message):
    path = raw_sources.jsonl(tmp_path / "a.jsonl", [SCORED])
    with pytest.raises(UserError, match=message):
        read(tmp_path, **{"format": "scored", "path": path, "language": "en", **change})
