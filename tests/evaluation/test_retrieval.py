"""Retrieval metrics: against values worked out by hand, and one set against many at once."""

import numpy as np
import pytest

from moe_embed_jax.evaluation.beir import RetrievalSet
from moe_embed_jax.evaluation.retrieval import (
    evaluate_many,
    evaluate_retrieval,
    mean_over_languages,
    score_run,
)


def make_set(qrels, document_ids, name="set"):
    return RetrievalSet(
        name=name,
        query_ids=list(qrels),
        queries=[f"query {q}" for q in qrels],
        document_ids=document_ids,
        documents=[f"document {d}" for d in document_ids],
        qrels=qrels,
    )


def numbered(count):
    return [f"d{i}" for i in range(count)]


def test_graded_metrics_by_hand():
    retrieval_set = make_set({"q": {"d0": 3, "d1": 1, "d2": 0, "gone": 2}}, numbered(150))
    ranking = [2, 1, *range(3, 150), 0]  # d1 second, d0 last
    metrics = score_run(retrieval_set, np.array([ranking]))
    ideal = 3 / np.log2(2) + 2 / np.log2(3) + 1 / np.log2(4)  # "gone" counts in the ideal ranking
    assert metrics == {
        "ndcg_at_10": pytest.approx(1 / np.log2(3) / ideal),
        "recall_at_100": pytest.approx(1 / 3),
        "mrr_at_10": pytest.approx(1 / 2),
        "queries": 1,
        "documents": 150,
    }


def test_cut_offs():
    retrieval_set = make_set(
        {"at10": {"d9": 1}, "at11": {"d10": 1}, "at100": {"d99": 1}, "at101": {"d100": 1}},
        numbered(150),
    )
    metrics = score_run(retrieval_set, np.tile(np.arange(150), (4, 1)))
    assert metrics["mrr_at_10"] == pytest.approx(0.1 / 4)
    assert metrics["ndcg_at_10"] == pytest.approx(1 / np.log2(11) / 4)
    assert metrics["recall_at_100"] == pytest.approx(3 / 4)


def test_order_is_taken_as_given_whatever_the_ids():
    # trec_eval would put "zz" first among equals.
    retrieval_set = make_set({"q": {"aa": 1}}, ["aa", "zz"])
    assert score_run(retrieval_set, np.array([[0, 1]]))["mrr_at_10"] == 1.0


def test_nothing_found_counts_as_zero():
    retrieval_set = make_set({"q1": {"d0": 1}, "q2": {"d0": 1}}, numbered(3))
    metrics = score_run(retrieval_set, np.array([[0, -1, -1], [-1, -1, -1]]))
    assert [metrics[m] for m in ("ndcg_at_10", "recall_at_100", "mrr_at_10")] == [0.5, 0.5, 0.5]


def test_the_query_itself_is_taken_out():
    retrieval_set = make_set({"d0": {"d1": 1}}, numbered(102))
    ranking = np.array([[0, *range(2, 101), 1]])
    metrics = score_run(retrieval_set, ranking)
    assert metrics["recall_at_100"] == 1.0  # 101st before, 100th now
    assert score_run(retrieval_set, np.array([[0, 1, 2]]))["mrr_at_10"] == 1.0


def test_a_relevant_document_with_the_id_of_the_query_stays():
    retrieval_set = make_set({"d0": {"d0": 1}}, numbered(3))
    assert score_run(retrieval_set, np.array([[0, 1, 2]]))["ndcg_at_10"] == 1.0


def test_refuses_a_ranking_of_another_size():
    with pytest.raises(ValueError, match="ranking has 2 rows, set 'set' has 1 queries"):
        score_run(make_set({"q": {"d0": 1}}, numbered(3)), np.zeros((2, 3), int))


def vectors(texts):
    """A fixed random direction per text; a query is near the document of its number."""
    rows = [
        np.random.default_rng(int(t.split("d")[-1].split("q")[-1])).normal(size=32) for t in texts
    ]
    return np.array(rows, np.float32) / 10


def small_sets():
    return {
        f"translations/{language}": make_set(
            {f"q{i}": {f"d{i}": 1} for i in range(first, first + 20)}, numbered(count), language
        )
        for language, first, count in [("de", 0, 30), ("fr", 5, 40), ("ja", 10, 25)]
    }


def test_perfect_and_useless_encoders():
    retrieval_set = small_sets()["translations/de"]
    metrics = evaluate_retrieval(vectors, vectors, retrieval_set)
    assert metrics == {
        "ndcg_at_10": 1.0,
        "recall_at_100": 1.0,
        "mrr_at_10": 1.0,
        "queries": 20,
        "documents": 30,
    }
    constant = evaluate_retrieval(lambda t: np.ones((len(t), 4)), vectors_of_ones, retrieval_set)
    # All scores equal: ties go by document index, so query i finds its document at rank i + 1.
    assert constant["mrr_at_10"] == pytest.approx(sum(1 / r for r in range(1, 11)) / 20)


def vectors_of_ones(texts):
    return np.ones((len(texts), 4))


def test_the_query_itself_takes_no_place_among_the_hundred():
    """The search must give 101 documents: the query is the first, the relevant one the last."""
    retrieval_set = make_set({"d0": {"d100": 1}}, numbered(110))
    falling = np.arange(110, 0, -1, dtype=np.float32)[:, None] * np.eye(1, 8, dtype=np.float32)
    metrics = evaluate_retrieval(
        lambda texts: np.ones((1, 8)), lambda texts: falling, retrieval_set
    )
    assert metrics["recall_at_100"] == 1.0


def test_many_sets_encode_each_text_once_and_score_like_one_by_one():
    calls = {"query": [], "document": []}

    def encoder(side):
        def encode(texts):
            calls[side].append(texts)
            return vectors(texts)

        return encode

    sets = small_sets()
    results = evaluate_many(encoder("query"), encoder("document"), sets)
    assert list(results) == list(sets)
    for side, expected in {"query": 30, "document": 40}.items():
        (texts,) = calls[side]
        assert len(texts) == len(set(texts)) == expected
    for name, retrieval_set in sets.items():
        assert results[name] == evaluate_retrieval(vectors, vectors, retrieval_set)
    assert results["translations/ja"]["ndcg_at_10"] == pytest.approx(15 / 20)  # d25.. not there


def test_refuses_an_encoder_that_loses_texts():
    with pytest.raises(ValueError, match=r"the encoder gave shape \(19, 32\) for 20 texts"):
        sets = small_sets()["translations/de"]
        evaluate_retrieval(lambda texts: vectors(texts)[1:], vectors, sets)


def test_mean_over_languages():
    def metrics(value, queries):
        return {
            "ndcg_at_10": value,
            "recall_at_100": value,
            "mrr_at_10": value,
            "queries": queries,
            "documents": 2 * queries,
        }

    means = mean_over_languages(
        {"t/de": metrics(0.2, 100), "t/fr": metrics(0.4, 1), "api/en": metrics(1.0, 5)}
    )
    assert means == {
        "t": {**metrics(pytest.approx(0.3), 101), "languages": 2},
        "api": {**metrics(1.0, 5), "languages": 1},
    }
