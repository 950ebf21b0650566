import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed_jax.objectives.balance import RoutingStatistics, balance_loss, routing_statistics
from moe_embed_jax.objectives.infonce import infonce, negatives_mask


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def distinct_ids(count, offset=0):
    return np.stack([np.arange(count) + offset, np.full(count, 7)], axis=1).astype(np.int32)


def oracle(query, document, candidate, temperature):
    """Row by row in float64; `candidate[i, j]`: document j is in query i's denominator."""
    losses, hits = [], []
    for i in range(len(query)):
        scores = document.astype(np.float64) @ query[i].astype(np.float64) / temperature
        allowed = scores[candidate[i]]
        losses.append(np.log(np.sum(np.exp(allowed - scores[i]))))
        hits.append(scores[i] >= allowed.max())
    return np.mean(losses), np.mean(hits)


def test_infonce_equals_the_oracle():
    rng = np.random.default_rng(0)
    query, document = unit(rng, 12, 8), unit(rng, 12, 8)
    result = infonce(query, document, distinct_ids(12), distinct_ids(12, 100), 0.02)
    loss, accuracy = oracle(query, document, np.ones((12, 12), bool), 0.02)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(result.accuracy, accuracy)
    assert result.masked == 0


def test_duplicates_are_never_negatives():
    rng = np.random.default_rng(1)
    query, document = unit(rng, 6, 8), unit(rng, 6, 8)
    query_id, document_id = distinct_ids(6), distinct_ids(6, 100)
    document_id[4] = document_id[1]  # same document twice
    query_id[2] = query_id[3]  # same query twice: both documents are right for it
    document_id[5] = query_id[0]  # a document that is the query's own text
    candidate = np.ones((6, 6), bool)
    for i, j in [(4, 1), (1, 4), (2, 3), (3, 2), (0, 5)]:
        candidate[i, j] = False
    candidate[[0, 2, 3, 5], 4] = False  # documents 1 and 4 are one negative, not two
    expected_negatives = candidate & ~np.eye(6, dtype=bool)
    np.testing.assert_array_equal(negatives_mask(query_id, document_id), expected_negatives)
    result = infonce(query, document, query_id, document_id, 0.05)
    loss, accuracy = oracle(query, document, candidate, 0.05)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(result.accuracy, accuracy)
    np.testing.assert_allclose(result.masked, 9 / 6)


def test_only_half_of_a_hash_equal_is_not_a_duplicate():
    query_id, document_id = distinct_ids(2), distinct_ids(2, 100)
    document_id[1] = (document_id[0][0], 8)
    assert negatives_mask(query_id, document_id)[0, 1]


def test_masked_document_gets_no_gradient_from_the_other_query():
    rng = np.random.default_rng(2)
    query, document = unit(rng, 2, 4), unit(rng, 2, 4)
    same = np.zeros((2, 2), np.int32)
    grad = jax.grad(lambda d: infonce(query, d, distinct_ids(2), same, 0.02).loss)(document)
    assert not np.asarray(grad).any()  # each query is alone with its positive
    assert np.isfinite(np.asarray(grad)).all()


def statistics(probability, expert, valid):
    return routing_statistics(jnp.asarray(probability), jnp.asarray(expert), jnp.asarray(valid))


def stack(s: RoutingStatistics) -> RoutingStatistics:
    return jax.tree.map(lambda x: x[None], s)


def test_balance_is_one_when_uniform_and_e_when_collapsed():
    tokens, experts = 32, 8
    uniform = np.full((tokens, experts), 1 / experts, np.float32)
    spread = np.stack([np.arange(tokens) % 8, (np.arange(tokens) + 1) % 8], axis=1)
    valid = np.ones(tokens, bool)
    assert balance_loss(stack(statistics(uniform, spread, valid))) == pytest.approx(1)
    collapsed = np.zeros((tokens, experts), np.float32)
    collapsed[:, 3] = 1
    one = np.full((tokens, 1), 3)
    assert balance_loss(stack(statistics(collapsed, one, valid))) == pytest.approx(experts)


def test_balance_statistics_add_up_and_ignore_padding():
    """Global statistics: chunks or devices are summed before the product, padding is not there."""
    rng = np.random.default_rng(3)
    probability = rng.dirichlet(np.ones(4), 40).astype(np.float32)
    expert = np.stack([rng.permutation(4)[:2] for _ in range(40)])
    valid = rng.uniform(size=40) > 0.3
    whole = statistics(probability, expert, valid)
    chunks = [
        statistics(probability[s], expert[s], valid[s]) for s in (slice(0, 13), slice(13, 40))
    ]
    summed = jax.tree.map(lambda a, b: a + b, *chunks)
    only_valid = statistics(probability[valid], expert[valid], np.ones(valid.sum(), bool))
    for other in (summed, only_valid):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, other)
    fraction = np.bincount(expert[valid].ravel(), minlength=4) / expert[valid].size
    expected = 4 * np.sum(fraction * probability[valid].mean(0))
    np.testing.assert_allclose(balance_loss(stack(whole)), expected, rtol=1e-5)
