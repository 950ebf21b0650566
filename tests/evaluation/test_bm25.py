"""BM25 against its formula, its tokens in many scripts, and known figures of public sets."""

from collections import Counter

import numpy as np
import pytest
from conftest import ROOT

from moe_embed_jax.evaluation import bm25
from moe_embed_jax.evaluation.beir import RetrievalSet, load_beir
from moe_embed_jax.evaluation.bm25 import evaluate_bm25, word_tokens

SHARED = ROOT.parent / "shared" / "data"


def make_set(queries, documents, qrels):
    """Ids are positions: qrels[i] = position of the document that query i wants."""
    return RetrievalSet(
        name="set",
        query_ids=[f"q{i}" for i in range(len(queries))],
        queries=queries,
        document_ids=[f"d{i}" for i in range(len(documents))],
        documents=documents,
        qrels={f"q{i}": {f"d{j}": 1} for i, j in enumerate(qrels)},
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Don't LOOK_back, v2!", ["don", "t", "look", "back", "v2"]),
        ("Die Stra\u00dfe \u00dcBER alles", ["die", "strasse", "\u00fcber", "alles"]),
        ("e\u0301te\u0301 \uff28\uff29", ["\u00e9t\u00e9", "hi"]),  # composed, full width
        ("\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e", 2),  # Hindi
        ("co\u00adoperate \u00e9", ["cooperate", "\u00e9"]),  # soft hyphen
        ("\u6771\u4eac\u30bf", ["\u6771", "\u4eac", "\u30bf", "\u6771\u4eac", "\u4eac\u30bf"]),
        ("\u3042\u30fb\u3044\u3002", ["\u3042", "\u3044"]),  # punctuation separates
        ("GPT\u6a21\u578b3", ["gpt", "\u6a21", "\u578b", "\u6a21\u578b", "3"]),
        ("\ud55c\uad6d\uc5b4", 5),
        ("\u0e27\u0e31\u0e19\u0e14\u0e35", ["\u0e27\u0e31", "\u0e19", "\u0e14\u0e35"] + 2 * [None]),
        ("GetObject listHTTPServers v2", ["get", "object", "list", "http", "servers", "v2"]),
        ("", []),
        ("\u2026 !", []),
    ],
)
def test_word_tokens(text, tokens):
    found = word_tokens(text)
    if isinstance(tokens, int):
        assert len(found) == tokens
    else:
        assert len(found) == len(tokens)
        assert all(b is None or a == b for a, b in zip(found, tokens, strict=True))


def test_scores_follow_the_formula():
    """Lucene's BM25: idf = ln(1 + (N - df + 0.5) / (df + 0.5)), saturated term frequency."""
    documents = ["a b b c", "a a d", "b", "", "e f g h i a"]
    split = [d.split() for d in documents]
    k1, b, N = 1.2, 0.6, len(documents)
    average = np.mean([len(d) for d in split])
    weight_NV, vocabulary = bm25._index(split, k1, b)
    weights = weight_NV.toarray()
    for token, column in vocabulary.items():
        df = sum(token in d for d in split)
        idf = np.log(1 + (N - df + 0.5) / (df + 0.5))
        for row, document in enumerate(split):
            tf = Counter(document)[token]
            expected = idf * tf / (tf + k1 * (1 - b + b * len(document) / average))
            assert weights[row, column] == pytest.approx(expected, rel=1e-5)


def test_finds_what_shares_words():
    documents = ["red car", "blue car", "green tree", "blue sky and sea"]
    metrics = evaluate_bm25(make_set(["BLUE sea", "tree!", "nothing here"], documents, [3, 2, 0]))
    assert metrics == {
        "ndcg_at_10": pytest.approx(2 / 3),  # documents without a shared token are not found
        "recall_at_100": pytest.approx(2 / 3),
        "mrr_at_10": pytest.approx(2 / 3),
        "queries": 3,
        "documents": 4,
    }


def test_equal_scores_go_by_index():
    documents = ["other words"] + ["same text"] * 300
    metrics = evaluate_bm25(make_set(["same", "same", "same"], documents, [1, 3, 101]))
    assert metrics["mrr_at_10"] == pytest.approx((1 + 1 / 3) / 3)
    assert metrics["recall_at_100"] == pytest.approx(2 / 3)  # d101 is 101st


def test_empty_documents():
    assert evaluate_bm25(make_set(["word", ""], ["", "!"], [0, 1]))["recall_at_100"] == 0.0


def test_unspaced_scripts_are_searchable():
    documents = ["\u4eca\u5929\u5929\u6c14\u5f88\u597d", "\u6211\u559c\u6b22\u559d\u5496\u5561"]
    metrics = evaluate_bm25(make_set(["\u5929\u6c14", "\u559d\u5496\u5561"], documents, [0, 1]))
    assert metrics["mrr_at_10"] == 1.0


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not next to this checkout")
@pytest.mark.parametrize(("name", "ndcg"), [("cranfield", 0.335), ("cacm", 0.403)])
def test_public_sets(name, ndcg):
    assert evaluate_bm25(load_beir(SHARED / name))["ndcg_at_10"] == pytest.approx(ndcg, abs=0.005)
