"""The walk of CPUs: scores to the bit, whatever the products are rounded to."""

import itertools

import numpy as np
import pytest

from moe_embed_jax.search import cpu, exact, knn

SCALES = np.float32([1e-30, 1e-12, 1, 1e12, 1e30])


def oracle(query_BD, document_ND, k):
    """Sums in extended precision, rounded once; equal scores stay in the order of indices."""
    product_BND = query_BD[:, None].astype(np.longdouble) * document_ND
    with np.errstate(over="ignore"):
        score_BN = product_BND.sum(axis=2).astype(np.float32)
    score_BN = np.maximum(score_BN, np.finfo(np.float32).min)
    index_Bk = np.argsort(-score_BN, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(score_BN, index_Bk, axis=1), index_Bk


@pytest.fixture(params=["float32", "bfloat16"])
def products(request, monkeypatch):
    monkeypatch.setattr(cpu, "WORTH_MEASURING", 0)
    monkeypatch.setattr(knn, "bfloat16_is_faster", lambda: request.param == "bfloat16")


def adversarial(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries, and documents around some of which thousands differ by less than products show."""
    rng = np.random.default_rng(seed)
    D = int(rng.choice([3, 24, 100]))
    query_BD = rng.normal(size=(6, D)).astype(np.float32)
    center_ND = query_BD[rng.integers(0, 6, 700)] + rng.normal(size=(700, D)) * 0.3
    near_ND = center_ND[:1] * (1 + rng.normal(size=(700, D)) * 2.0 ** -rng.integers(5, 26))
    document_ND = np.concatenate(
        [
            center_ND,
            near_ND,
            np.repeat(center_ND[:7], 30, axis=0),  # duplicates
            np.zeros((20, D)),
            center_ND[:50] * rng.choice(SCALES, (50, 1)),
        ]
    ).astype(np.float32)
    query_BD[-1] = 0
    query_BD *= np.float32([1, 1, *rng.choice(SCALES, 4)])[:, None]
    return query_BD, document_ND[rng.permutation(len(document_ND))]


@pytest.mark.parametrize("seed", range(6))
def test_scores_and_order_are_exact_to_the_bit(seed, products):
    query_BD, document_ND = adversarial(seed)
    N = len(document_ND)
    for k, block in [(1, 256), (10, 1024), (100, 256), (N - 1, 256), (2 * N, 1024)]:
        score_Bk, index_Bk = knn.top_k(query_BD, document_ND, k, block=block)
        expected_score, expected_index = oracle(query_BD, document_ND, k)
        np.testing.assert_array_equal(index_Bk, expected_index)
        np.testing.assert_array_equal(score_Bk, expected_score)


def test_documents_that_rounding_lowers_are_found(products):
    document_ND = np.random.default_rng(0).normal(size=(8192, 64)) * 0.1
    document_ND[5], document_ND[5000] = 1 + 0.40 / 128, 1 + 0.45 / 128  # both 1 in bfloat16
    _, index_Bk = knn.top_k(np.ones((1, 64)), document_ND, 1, block=4096)
    assert index_Bk == 5000


def test_a_clear_search_compares_few_pairs(monkeypatch, products):
    pairs, pair_scores = [], exact.pair_scores
    monkeypatch.setattr(exact, "pair_scores", lambda *x: pairs.append(len(x[2])) or pair_scores(*x))
    monkeypatch.setattr(exact, "with_all", None)
    x_ND = np.random.default_rng(0).normal(size=(2**14 + 64, 64))
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    knn.top_k(x_ND[:64], x_ND[64:], 10, block=4096)
    assert 64 * 10 <= sum(pairs) < 64 * 60


def test_equal_documents_need_no_pairs(monkeypatch, products):
    monkeypatch.setattr(exact, "pair_scores", lambda q, d, query_P, _: np.zeros(-len(query_P)))
    document_ND = np.full((1000, 5), 0.7, np.float32)
    _, index_Bk = knn.top_k(document_ND[:2], document_ND, 30, block=256)
    np.testing.assert_array_equal(index_Bk, [np.arange(30)] * 2)


def test_keys_order_scores_then_indices_and_give_them_back():
    values = np.float32([np.inf, 3.4e38, 2, 1e-45, 0, -1e-45, -2, -3.4e38])
    pairs = list(itertools.product(values, [0, 1, 2**31 - 1]))
    score, index = (np.array(column) for column in zip(*pairs, strict=True))
    key = exact.keys(score, index)
    assert (np.diff(key) > 0).all() and key[-1] < exact.EMPTY
    for found, expected in zip(exact.unpacked(key), (score, index), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert exact.keys(np.float32([-0.0]), 5) == exact.keys(np.float32([0.0]), 5)
    assert [x.item() for x in exact.unpacked(np.array([exact.EMPTY]))] == [-np.inf, -1]
