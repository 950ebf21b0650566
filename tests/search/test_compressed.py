"""Compressed vectors against NumPy on what they stand for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_embed_jax.embedder import unit_norm
from moe_embed_jax.search import compressed, knn
from moe_embed_jax.search.compressed import BinaryVectors, Int8Vectors, rescored_top_k

FLOATS = st.floats(-1e3, 1e3, width=32)


def vectors(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Unit norm, dimensions of different sizes, as of real embeddings."""
    rng = np.random.default_rng(seed)
    x_ND = rng.standard_normal((count, width)) * rng.lognormal(sigma=1, size=width)
    return unit_norm(x_ND).astype(np.float32)


def signs(x_ND: np.ndarray, stored: BinaryVectors) -> np.ndarray:
    return np.where(x_ND > stored.threshold_D, 1.0, -1.0)


def ranked(score_BN: np.ndarray, k: int) -> np.ndarray:
    """Best first, equal ones by the lower index."""
    return np.argsort(-score_BN, axis=1, kind="stable")[:, :k]


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=FLOATS))
def test_int8_is_off_by_half_a_scale_at_most(x_ND):
    stored = Int8Vectors.compress(x_ND)
    assert stored.values_ND.dtype == np.int8 and np.abs(stored.values_ND.astype(int)).max() <= 127
    assert np.all(np.abs(stored.to_float() - x_ND) <= stored.scale_D * (0.5 + 1e-5))
    used_D = np.abs(x_ND).max(axis=0) > 1e-30
    assert np.all(np.abs(stored.values_ND.astype(int)).max(axis=0)[used_D] == 127)
    opposite = Int8Vectors.compress(-x_ND)
    np.testing.assert_array_equal(opposite.values_ND, -stored.values_ND)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 40)), elements=FLOATS))
def test_bits_are_signs(x_ND):
    stored = BinaryVectors.compress(x_ND)
    np.testing.assert_allclose(stored.threshold_D, x_ND.mean(axis=0, dtype=float), atol=1e-4)
    np.testing.assert_array_equal(stored.signs(slice(None)), signs(x_ND, stored))
    plain = BinaryVectors.compress(x_ND, np.zeros(x_ND.shape[1]))
    np.testing.assert_array_equal(plain.signs(slice(None)), np.where(x_ND > 0, 1.0, -1.0))
    assert stored.shape == plain.shape == x_ND.shape


@pytest.mark.parametrize("width", [8, 24, 100, 256])
def test_the_objects_know_their_bytes(width):
    x_ND = vectors(50, width)
    for stored, expected in (
        (Int8Vectors.compress(x_ND), width),
        (BinaryVectors.compress(x_ND), -(-width // 8)),
    ):
        assert stored.bytes_per_vector == expected
        more = type(stored).compress(np.concatenate([x_ND, x_ND[:7]]))
        assert more.nbytes - stored.nbytes == 7 * expected


def test_int8_search_is_exact_over_what_is_stored():
    documents, queries = vectors(700, 40), vectors(30, 40, 1)
    stored = Int8Vectors.compress(documents)
    score_Bk, index_Bk = stored.top_k(queries, 20)
    oracle_BN = queries.astype(np.float64) @ stored.to_float().T.astype(np.float64)
    np.testing.assert_array_equal(index_Bk, ranked(oracle_BN.astype(np.float32), 20))
    np.testing.assert_allclose(score_Bk, np.sort(-oracle_BN)[:, :20] * -1, atol=1e-5)
    scores = stored.scores(queries, index_Bk)
    np.testing.assert_allclose(scores, score_Bk, atol=1e-5)


def test_int8_scores_are_within_their_bound():
    documents, queries = vectors(300, 40), vectors(30, 40, 1)
    stored = Int8Vectors.compress(documents)
    error_BN = np.abs(queries @ documents.T - queries @ stored.to_float().T)
    bound_B1 = (np.abs(queries) @ stored.scale_D)[:, None] / 2
    assert np.all(error_BN <= bound_B1 + 1e-6) and error_BN.max() > 1e-4


def test_int8_with_the_scale_of_a_sample_saturates():
    sample, x_ND = vectors(100, 16), 5 * vectors(20, 16, 1)
    scale_D = Int8Vectors.compress(sample).scale_D
    stored = Int8Vectors.compress(x_ND, scale_D)
    np.testing.assert_array_equal(stored.scale_D, scale_D)
    clipped = np.clip(x_ND, -127 * scale_D, 127 * scale_D)
    assert np.abs(clipped - x_ND).max() > 0.1
    assert np.all(np.abs(stored.to_float() - clipped) <= scale_D * (0.5 + 1e-5))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 5), st.sampled_from([5, 8, 33, 64]), st.integers(1, 80),
    st.integers(0, 99),
)  # fmt: skip
def test_hamming_search(count, queries, width, k, seed):
    document_ND, query_BD = vectors(count, width, seed), vectors(queries, width, seed + 1)
    stored = BinaryVectors.compress(document_ND)
    score_Bk, index_Bk = stored.top_k(query_BD, k)
    oracle_BN = signs(query_BD, stored) @ signs(document_ND, stored).T
    expected = ranked(oracle_BN, k)
    np.testing.assert_array_equal(index_Bk, expected)
    np.testing.assert_array_equal(score_Bk, np.take_along_axis(oracle_BN, expected, 1))


def test_hamming_search_over_several_blocks(monkeypatch):
    monkeypatch.setattr(compressed, "BLOCK", 64)
    monkeypatch.setattr(compressed, "QUERY_BLOCK", 16)
    monkeypatch.setattr(compressed, "PIECE", 50)
    documents, queries = vectors(333, 24), vectors(37, 24, 1)
    stored = BinaryVectors.compress(documents)
    np.testing.assert_allclose(stored.threshold_D, documents.mean(axis=0), atol=1e-6)
    _, index_Bk = stored.top_k(queries, 90)  # k is above the block
    oracle_BN = signs(queries, stored) @ signs(documents, stored).T
    np.testing.assert_array_equal(index_Bk, ranked(oracle_BN, 90))


@pytest.mark.parametrize("by", ["bits", "int8"])
def test_rescoring(by, monkeypatch):
    monkeypatch.setattr(compressed, "RESCORED", 64 * 40 * 3)  # three queries at a time
    documents, queries = vectors(500, 64), vectors(20, 64, 1)
    bits = BinaryVectors.compress(documents)
    rescorer = Int8Vectors.compress(documents) if by == "int8" else None
    score_Bk, index_Bk = rescored_top_k(queries, bits, 10, rescorer)
    held_ND = rescorer.to_float() if rescorer else bits.signs(slice(None))
    _, candidate_Bm = bits.top_k(queries, 40)
    for query, candidates, scores, found in zip(
        queries, candidate_Bm, score_Bk, index_Bk, strict=True
    ):
        candidates = np.sort(candidates)
        oracle = held_ND[candidates] @ (query if rescorer else query - bits.threshold_D)
        np.testing.assert_array_equal(found, candidates[np.argsort(-oracle, kind="stable")[:10]])
        np.testing.assert_allclose(scores, np.sort(-oracle)[:10] * -1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by", ["bits", "int8"])
def test_rescoring_gives_ties_to_the_lower_index(by):
    """Small whole numbers: scores are exact, and many are equal."""
    rng = np.random.default_rng(0)
    documents, queries = (rng.integers(-2, 3, (n, 8)).astype(np.float32) for n in (200, 20))
    bits = BinaryVectors.compress(documents, np.zeros(8))
    rescorer = Int8Vectors.compress(documents, np.ones(8)) if by == "int8" else None
    held_ND = documents if rescorer else bits.signs(slice(None))
    oracle_BN = queries @ held_ND.T
    score_Bk, index_Bk = rescored_top_k(queries, bits, 50, rescorer)  # candidates are all
    expected = ranked(oracle_BN, 50)
    np.testing.assert_array_equal(index_Bk, expected)
    np.testing.assert_array_equal(score_Bk, np.take_along_axis(oracle_BN, expected, 1))


def test_rescoring_brings_the_true_neighbours_back():
    """What the two stages are for, on clustered vectors: recall of the exact 10 rises."""
    rng = np.random.default_rng(0)
    centres = vectors(100, 256)
    documents = unit_norm(np.repeat(centres, 20, 0) + 0.04 * rng.standard_normal((2000, 256)))
    queries = unit_norm(centres + 0.04 * rng.standard_normal((100, 256)))
    _, exact = knn.top_k(queries, documents, 10)

    def recall(index_Bk):
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(index_Bk, exact, strict=True)])

    bits, int8 = BinaryVectors.compress(documents), Int8Vectors.compress(documents)
    plain = recall(bits.top_k(queries, 10)[1])
    by_bits = recall(rescored_top_k(queries, bits, 10)[1])
    by_int8 = recall(rescored_top_k(queries, bits, 10, int8)[1])
    assert plain < by_bits < by_int8 <= 1 and recall(int8.top_k(queries, 10)[1]) > 0.95


def test_an_offset_of_all_vectors_costs_nothing():
    """Thresholds are means: bits and candidates are those of the vectors without the offset."""
    documents, queries = vectors(300, 64), vectors(20, 64, 1)
    offset_D = 3 * vectors(1, 64, 2)[0]
    without, shifted = (BinaryVectors.compress(documents + by) for by in (0, offset_D))
    assert np.mean(without.bits_NW == shifted.bits_NW) > 0.99  # but for rounding
    expected = rescored_top_k(queries, without, 5)[1]
    assert np.mean(rescored_top_k(queries + offset_D, shifted, 5)[1] == expected) > 0.95
    plain = BinaryVectors.compress(documents + offset_D, np.zeros(64))
    assert np.mean(rescored_top_k(queries + offset_D, plain, 5)[1] == expected) < 0.5


def test_all_candidates_give_the_exact_ranking_of_the_rescorer():
    documents, queries = vectors(60, 32), vectors(5, 32, 1)
    bits, int8 = BinaryVectors.compress(documents), Int8Vectors.compress(documents)
    score_Bk, index_Bk = rescored_top_k(queries, bits, 60, int8, oversample=1)
    expected = int8.top_k(queries, 60)
    np.testing.assert_array_equal(index_Bk, expected[1])
    np.testing.assert_allclose(score_Bk, expected[0], atol=1e-5)


def test_no_queries_and_no_documents():
    bits = BinaryVectors.compress(vectors(5, 16))
    assert bits.top_k(np.zeros((0, 16)), 3)[1].shape == (0, 3)
    none = BinaryVectors.compress(np.zeros((0, 16), np.float32))
    assert rescored_top_k(vectors(2, 16), none, 3)[1].shape == (2, 0)
    assert Int8Vectors.compress(np.zeros((0, 16), np.float32)).top_k(vectors(2, 16), 3)[1].size == 0


X = vectors(6, 16)
NAN = np.where(np.arange(6)[:, None] == 4, np.nan, X).astype(np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Int8Vectors.compress(NAN), "document 4 holds a value that is not finite"),
        (lambda: BinaryVectors.compress(NAN), "document 4 holds a value that is not finite"),
        (lambda: Int8Vectors.compress(X, np.zeros(16)), "16 positive numbers"),
        (lambda: Int8Vectors(X, np.ones(16)), "must be int8"),
        (lambda: Int8Vectors(X.astype(np.int8), np.ones(15)), "does not fit"),
        (lambda: BinaryVectors(np.zeros((2, 3), np.uint8), np.zeros(16)), r"uint8 \[N, 2\]"),
        (lambda: BinaryVectors.compress(X, np.zeros(15)), "16 numbers"),
        (lambda: BinaryVectors.compress(X).top_k(X[:, :8], 3), r"\[count, 16\]"),
        (lambda: BinaryVectors.compress(X).top_k(NAN, 3), "a query holds"),
        (lambda: BinaryVectors.compress(X).top_k(X, 0), "k=0"),
        (lambda: rescored_top_k(X, BinaryVectors.compress(X), 3, oversample=0), "oversample=0"),
        (
            lambda: rescored_top_k(X, BinaryVectors.compress(X), 3, Int8Vectors.compress(X[:5])),
            "not the same vectors",
        ),
    ],
)
def test_misuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()
