"""Meaning of the losses, on cases small enough to see; their numbers: test_streamed_infonce.py."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed_jax.errors import UserError
from moe_embed_jax.losses.contrast import (
    ContrastConfig,
    clip_log_scale,
    describe_negatives,
    initial_log_scale,
)
from moe_embed_jax.losses.infonce import infonce
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.routing.router import RoutingStatistics, balance_loss, routing_statistics


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def distinct_ids(count, offset=0):
    return np.stack([np.arange(count) + offset, np.full(count, 7)], axis=1).astype(np.int32)


INFONCE = jax.jit(infonce, static_argnums=0)
GRADIENT = jax.jit(
    jax.value_and_grad(lambda config, *rest: infonce(config, *rest).loss, argnums=(1, 2)),
    static_argnums=0,
)


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(single_device_mesh()):
        yield


def loss_of(query, document, query_id, document_id, valid=None, log_scale=None, **config):
    """The result for documents [B, M, D], or [B, D] where there are no hard negatives."""
    if np.ndim(document) == 2:
        document, document_id = document[:, None], document_id[:, None]
    config = ContrastConfig(**config)
    return INFONCE(config, query, document, query_id, document_id, valid, log_scale)


def by_hand(query, document, candidate, temperature):
    """Row by row in float64; `candidate[i, j]`: document j is in query i's denominator."""
    losses, hits = [], []
    for i in range(len(query)):
        scores = document.astype(np.float64) @ query[i].astype(np.float64) / temperature
        allowed = scores[candidate[i]]
        losses.append(np.log(np.sum(np.exp(allowed - scores[i]))))
        hits.append(scores[i] >= allowed.max())
    return np.mean(losses), np.mean(hits)


def test_the_defaults_are_the_papers_loss():
    rng = np.random.default_rng(0)
    query, document = unit(rng, 6, 8), unit(rng, 6, 8)
    result = loss_of(3 * query, document, distinct_ids(6), distinct_ids(6, 100))
    loss, accuracy = by_hand(query, document, np.ones((6, 6), bool), 0.02)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(result.accuracy, accuracy)
    assert result.masked == 0
    assert result.loss_of == {"8": result.loss}


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
    result = loss_of(query, document, query_id, document_id)
    loss, accuracy = by_hand(query, document, candidate, 0.02)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(result.accuracy, accuracy)
    np.testing.assert_allclose(result.masked, 9 / 6)


def test_a_copy_of_a_right_answer_is_no_negative():
    """Pairs 0 and 1 share a query, and pair 2 has the document of pair 1."""
    rng = np.random.default_rng(2)
    query, document = unit(rng, 6, 8), unit(rng, 6, 8)
    query_id, document_id = distinct_ids(6), distinct_ids(6, 100)
    query_id[1], document_id[2] = query_id[0], document_id[1]
    candidate = np.ones((6, 6), bool)
    candidate[[0, 1, 1, 0, 2], [1, 0, 2, 2, 1]] = False
    candidate[3:, 2] = False  # the second copy of document 1
    result = loss_of(query, document, query_id, document_id)
    np.testing.assert_allclose(result.loss, by_hand(query, document, candidate, 0.02)[0], rtol=1e-5)


def test_only_half_of_a_hash_equal_is_not_a_duplicate():
    rng = np.random.default_rng(3)
    query_id, document_id = distinct_ids(6), distinct_ids(6, 100)
    document_id[1] = (document_id[0][0], 8)
    assert loss_of(unit(rng, 6, 8), unit(rng, 6, 8), query_id, document_id).masked == 0


def test_a_query_without_negatives_has_no_loss_and_no_gradient():
    rng = np.random.default_rng(2)
    same = np.zeros((6, 1, 2), np.int32)
    loss, grads = GRADIENT(
        ContrastConfig(), unit(rng, 6, 8), unit(rng, 6, 1, 8), distinct_ids(6), same
    )
    assert loss == 0
    assert all((np.asarray(grad) == 0).all() for grad in grads)


def hard_negative_batch():
    """Two pairs, the first with two hard negatives and the second with one."""
    rng = np.random.default_rng(4)
    ids = distinct_ids(6, 100).reshape(2, 3, 2)
    valid = np.array([[True, True, True], [True, True, False]])
    return unit(rng, 2, 8), unit(rng, 2, 3, 8), distinct_ids(2), ids, valid


@pytest.mark.parametrize("share", [True, False])
def test_hard_negatives_of_other_queries_count_if_shared(share):
    query, document, query_id, document_id, valid = hard_negative_batch()
    result = loss_of(
        query, document, query_id, document_id, valid, temperature=0.1, share_hard_negatives=share
    )
    candidate = np.tile(valid.reshape(-1), (2, 1))
    if not share:
        candidate[0, 4], candidate[1, 1:3] = False, False
    scores = query.astype(np.float64) @ document.reshape(6, 8).T.astype(np.float64) / 0.1
    own = scores[[0, 1], [0, 3]]
    loss = np.log(np.sum(np.exp(scores - own[:, None]) * candidate, axis=1)).mean()
    np.testing.assert_allclose(result.loss, loss, rtol=1e-5)
    assert result.masked == 0


@pytest.mark.parametrize("share", [True, False])
def test_a_hard_negative_that_is_an_answer_or_a_copy_is_none(share):
    query, document, query_id, document_id, valid = hard_negative_batch()
    query_id[1] = query_id[0]
    document_id[0, 1] = document_id[1, 0]  # the answer to the other copy of the query
    document_id[0, 2] = query_id[0]  # the query itself
    document_id[1, 1] = document_id[0, 0]
    result = loss_of(query, document, query_id, document_id, valid, share_hard_negatives=share)
    assert (result.loss, result.accuracy) == (0, 1)
    assert result.masked == (4 if share else 2.5)


def test_symmetric_separate_terms_are_the_loss_of_clip():
    rng = np.random.default_rng(5)
    query, document = unit(rng, 6, 8), unit(rng, 6, 8)
    ids = distinct_ids(6), distinct_ids(6, 100)
    result = loss_of(query, document, *ids, terms="q->d d->q", partition="separate")
    everything = np.ones((6, 6), bool)
    both = by_hand(query, document, everything, 0.02), by_hand(document, query, everything, 0.02)
    np.testing.assert_allclose(result.loss, (both[0][0] + both[1][0]) / 2, rtol=1e-5)


def test_a_matryoshka_width_is_the_loss_of_cut_vectors():
    rng = np.random.default_rng(6)
    query, document = unit(rng, 6, 8), unit(rng, 6, 8)
    ids = distinct_ids(6), distinct_ids(6, 100)
    result = loss_of(query, document, *ids, dims={8: 1.0, 4: 0.5})
    wide, narrow = loss_of(query, document, *ids), loss_of(query[:, :4], document[:, :4], *ids)
    np.testing.assert_allclose(result.loss_of["4"], narrow.loss, rtol=1e-6)
    np.testing.assert_allclose(result.loss, wide.loss + 0.5 * narrow.loss, rtol=1e-6)
    assert result.accuracy == wide.accuracy
    with pytest.raises(UserError, match=r"loss\.dims: 16 is wider than the embeddings \(8\)"):
        loss_of(query, document, *ids, dims={16: 1.0})


def test_texts_above_the_margin_are_left_out():
    query = np.array([[1, 0], [0, 1]], np.float32)
    document = np.array([[0.6, 0.8], [0.8, 0.6]], np.float32)  # each pair scores 0.6, the other 0.8
    ids = distinct_ids(2), distinct_ids(2, 100)
    for margin, masked in ((0.19, 1), (0.21, 0)):
        result = loss_of(query, document, *ids, margin=margin)
        assert result.masked == masked
        assert (result.loss == 0) == (masked == 1)


def test_extreme_scores_do_not_overflow():
    """Collapsed vectors at temperature 0.005: exp(200) is not a float32."""
    config = ContrastConfig(temperature=0.005)
    same = np.ones((6, 8), np.float32)
    ids = distinct_ids(6), distinct_ids(6, 100)[:, None]
    for query, document in ((same, same), (same, -same), (0 * same, same)):
        loss, grads = GRADIENT(config, query, document[:, None], *ids)
        np.testing.assert_allclose(loss, np.log(6), rtol=1e-5)
        assert all(np.isfinite(grad).all() for grad in grads)


def test_own_hard_negatives_are_spared_from_the_margin():
    """Pair 0's hard negative scores 1, its own document 0; to the others it is above no limit."""
    eye = np.eye(4, dtype=np.float32)
    query, document = eye[[0, 0]], np.stack([eye[[1, 0]], eye[[0, 3]]])
    ids = distinct_ids(2), distinct_ids(4, 100).reshape(2, 2, 2)
    keys = dict(temperature=1.0, margin=0.1)
    masked = loss_of(query, document, *ids, **keys)
    # Pair 1 keeps its own hard negative and that of pair 0, as no score is above 1.1.
    pair_1 = np.log(1 + np.exp(-1.0) + 1 + np.exp(-1.0))
    np.testing.assert_allclose(masked.loss, (np.log(2.0) + pair_1) / 2, rtol=1e-6)
    spared = loss_of(query, document, *ids, **keys, margin_hard_negatives=False)
    # What pair 1 has above the margin of pair 0 is not curated for pair 0: it stays masked.
    np.testing.assert_allclose(spared.loss, (np.log(2 + np.e) + pair_1) / 2, rtol=1e-6)
    np.testing.assert_allclose(masked.masked - spared.masked, 1 / 2, rtol=1e-6)


def test_all_right_answers_of_a_query_are_one_term():
    """Queries 0 and 1 are one text; pair 2 has the document of pair 1, which counts once."""
    rng = np.random.default_rng(10)
    query, document = unit(rng, 4, 8), unit(rng, 4, 8)
    query[1], document[2] = query[0], document[1]
    query_id, document_id = distinct_ids(4), distinct_ids(4, 100)
    query_id[1], document_id[2] = query_id[0], document_id[1]
    result = loss_of(query, document, query_id, document_id, temperature=0.1, positives="all")
    right = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    wrong = np.array([[0, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0]])
    scores = np.exp(query @ document.T / 0.1)
    answers, negatives = (scores * right).sum(axis=1), (scores * wrong).sum(axis=1)
    np.testing.assert_allclose(result.loss, np.mean(np.log1p(negatives / answers)), rtol=1e-5)


def test_queries_outside_the_batch_see_their_own_hard_negatives_alone():
    rng = np.random.default_rng(9)
    query, document = unit(rng, 4, 8), unit(rng, 4, 3, 8)
    ids = distinct_ids(4), distinct_ids(12, 100).reshape(4, 3, 2)
    everything = loss_of(query, document, *ids, temperature=0.1)
    outside = INFONCE(
        ContrastConfig(temperature=0.1), query, document, *ids, None, None, np.zeros(4, bool)
    )
    scores = np.einsum("bd,bmd->bm", query, document) / 0.1
    expected = np.mean(np.log(np.exp(scores).sum(axis=1)) - scores[:, 0])
    np.testing.assert_allclose(outside.loss, expected, rtol=1e-5)
    assert outside.loss < everything.loss
    np.testing.assert_allclose(outside.masked, 11 - 2)


def test_spread_is_the_mean_square_of_distinct_texts():
    """Two equal queries count once; orthogonal documents have none; opposite ones have 1."""
    eye = np.eye(4, dtype=np.float32)
    query = np.stack([eye[0], eye[0], (eye[0] + eye[1]) * 3])
    query_id = distinct_ids(3)
    query_id[1] = query_id[0]
    result = loss_of(query, eye[:3], query_id, distinct_ids(3, 100), spread=1.0)
    np.testing.assert_allclose(result.spread, 0.5, rtol=1e-6)  # of the queries, cosine^2
    document = np.stack([eye[0], -eye[0], eye[1]])
    result = loss_of(query, document, query_id, distinct_ids(3, 100), spread=1.0)
    np.testing.assert_allclose(result.spread, 0.5 + 1 / 3, rtol=1e-6)
    assert loss_of(query, document, query_id, distinct_ids(3, 100)).spread == 0


def test_a_tie_is_no_hit():
    """Vectors of one 1 each, so that every score is exact: 0, or the same number."""
    query = np.eye(4, dtype=np.float32)
    document = query[[0, 2, 2, 3]]  # queries 1 and 2: nothing, and two equal documents
    result = loss_of(query, document, distinct_ids(4), distinct_ids(4, 100))
    assert result.accuracy == 2 / 4


def test_learned_temperature():
    rng = np.random.default_rng(7)
    query, document = unit(rng, 6, 8), unit(rng, 6, 1, 8)
    ids = distinct_ids(6), distinct_ids(6, 100)[:, None]
    config = ContrastConfig(
        temperature=0.1, learn_temperature=True, temperature_min=0.05, temperature_max=0.5
    )
    evaluate = jax.jit(
        jax.value_and_grad(lambda x: infonce(config, query, document, *ids, log_scale=x).loss)
    )
    start = initial_log_scale(config)
    loss, grad = evaluate(start)
    expected = by_hand(query, document[:, 0], np.ones((6, 6), bool), 0.1)[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    step = 1e-2
    slope = (evaluate(start + step)[0] - evaluate(start - step)[0]) / (2 * step)
    np.testing.assert_allclose(grad, slope, rtol=1e-3)
    low, high = np.float32(-math.log(0.5)), np.float32(-math.log(0.05))
    assert evaluate(high + 1) == (evaluate(high)[0], 0)
    for log_scale, has_gradient in ((low - 1, 0), (low, 1), (high, 1), (high + 1, 0)):
        assert jax.grad(clip_log_scale, argnums=1)(config, log_scale) == has_gradient
    with pytest.raises(UserError, match="needs a parameter log_scale"):
        loss_of(query, document, *ids, learn_temperature=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": 0.0}, r"loss\.temperature=0\.0 must be above 0"),
        ({"temperature_min": 2.0}, r"loss\.temperature_min=2\.0 .* loss\.temperature_max=1\.0"),
        ({"learn_temperature": True, "temperature": 2.0}, r"loss\.temperature=2\.0 must lie"),
        ({"terms": "q->d q->x"}, r"loss\.terms='q->d q->x': 'q->x' is not one of"),
        ({"terms": "d->q"}, r"loss\.terms='d->q' must have 'q->d'"),
        ({"terms": "q->d q->d"}, r"loss\.terms='q->d q->d' .* each term once"),
        ({"partition": "both"}, r"loss\.partition='both': choose 'joint' or 'separate'"),
        ({"margin": -0.1}, r"loss\.margin=-0\.1 must be a number of at least 0"),
        ({"margin": "no"}, r"loss\.margin='no' must be a number"),
        ({"margin_hard_negatives": False}, r"margin_hard_negatives=False needs loss\.margin"),
        ({"positives": "some"}, r"loss\.positives='some': choose 'own' or 'all'"),
        ({"spread": -1}, r"loss\.spread=-1 must be 0 \(off\) or more"),
        ({"dims": {"a": 1.0}}, r"loss\.dims: 'a': 1\.0 must be a width"),
        ({"dims": {"64": -1.0}}, r"loss\.dims: '64': -1\.0 must be a width"),
        ({"dims": {}}, r"loss\.dims=\{\}: no width has a weight"),
        ({"quantisation": {"int4": 1.0}}, r"loss\.quantisation: 'int4' is not one of"),
        ({"quantisation": {"int8": 0}}, r"loss\.quantisation: 'int8': 0 must be a weight above 0"),
        ({"quantisation": {}}, r"loss\.quantisation=\{\} has no form"),
    ],
)
def test_wrong_keys_are_named(keys, message):
    with pytest.raises(UserError, match=message):
        ContrastConfig(**keys)


def test_the_config_survives_json():
    config = ContrastConfig(dims={768: 1, 256: 0.5}, margin=0, quantisation={"binary": 1})
    card = dataclasses.asdict(config)
    assert json.loads(json.dumps(card)) == card
    assert ContrastConfig(**card) == config
    assert config.widths(768) == [(768, 1.0), (256, 0.5)]
    hash(config)


def test_negatives_in_words():
    plain = describe_negatives(ContrastConfig(), 16_384, 0)
    assert plain.startswith("Each query is compared with the 16,383 other documents of the global")
    shared = describe_negatives(ContrastConfig(), 256, 10)
    assert "up to 2,560 hard negatives, 10 of its own and the rest of other queries." in shared
    config = ContrastConfig(
        terms="q->d q->q d->q", partition="separate", share_hard_negatives=False, margin=0.1
    )
    own = describe_negatives(config, 256, 10)
    assert "up to 10 hard negatives of its own. Duplicates count once." in own
    assert "Documents that score more than 0.1 above its own document are masked." in own
    spared = dataclasses.replace(config, margin_hard_negatives=False, hard_negatives_only="a b")
    spared = describe_negatives(spared, 256, 10)
    assert "Queries of a, b are compared with their own hard negatives alone." in spared
    assert "are masked, but its own hard negatives stay." in spared
    assert "The terms q->q, d->q (q query, d its document) follow the same rules" in own


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
