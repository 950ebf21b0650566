"""The contrastive loss against a loop in float64, and its streamed form against its dense one."""

import dataclasses
import functools
import itertools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.forked import run_forked
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from moe_embed_jax.losses.contrast import ContrastConfig, initial_log_scale
from moe_embed_jax.losses.infonce import infonce
from moe_embed_jax.losses.reference import dense_infonce
from moe_embed_jax.losses.ring import TILE
from moe_embed_jax.mesh import MeshConfig, batch_sharding, make_mesh, replicated, single_device_mesh


def oracle(config, query, document, query_id, document_id, valid, temperature, in_batch):
    """Loss, accuracy and masked, pair by pair and text by text, in float64."""
    B, M = valid.shape
    query_id = [tuple(x) for x in query_id.tolist()]
    document_id = [[tuple(x) for x in row] for row in document_id.tolist()]
    pairs = {(query_id[k], document_id[k][0]) for k in range(B)}
    total, hits, masked, spread = 0.0, 0, 0, 0.0
    compared = list(itertools.product(config.widths(query.shape[1]), config.forms()))
    for (width, weight), (form, share) in compared:
        q, d = unit(query, width), unit(document, width)
        if form == config.forms()[0][0]:
            for ids, x in ((query_id, q), ([row[0] for row in document_id], d[:, 0])):
                first = [i for i in range(B) if ids[i] not in ids[:i]]
                squares = [(x[i] @ x[j]) ** 2 for i in first for j in first if i != j]
                spread += weight * np.mean(squares) if squares else 0.0
        q, d, _ = stored(form, q, d, valid)
        for i in range(B):
            own, own_id = q[i] @ d[i, 0], document_id[i][0]
            limit = np.inf if config.margin is None else own + config.margin
            own_limit = limit if config.margin_hard_negatives else np.inf
            limit = limit if in_batch[i] else -np.inf  # of what is not added below
            sums = dict.fromkeys(("q->d", "q->q", "d->d", "d->q"), 0.0)
            best, offered, counted, seen = -np.inf, 0, 0, set()
            mine = [document_id[i][m] for m in range(1, M) if valid[i, m]]
            stays = {c for c in mine if c != query_id[i] and (query_id[i], c) not in pairs}
            for m, content in enumerate(mine, start=1):  # wherever else in the batch it stands
                if content in mine[: m - 1] or content not in stays:
                    continue
                if limit < (score := q[i] @ d[i, m]) <= own_limit:
                    sums["q->d"] += np.exp((score - own) / temperature)
                    best, counted = max(best, score), counted + 1
                if limit < (score := d[i, 0] @ d[i, m]) <= own_limit:
                    sums["d->d"] += np.exp((score - own) / temperature)
            for m, j in ((m, j) for m in range(M) for j in range(B)):
                if not valid[j, m] or (m > 0 and j != i and not config.share_hard_negatives):
                    continue
                offered += 1
                content = document_id[j][m]
                is_copy = content in seen
                seen.add(content)
                if is_copy or content == query_id[i] or (query_id[i], content) in pairs:
                    continue
                if (score := q[i] @ d[j, m]) <= limit:
                    sums["q->d"] += np.exp((score - own) / temperature)
                    best, counted = max(best, score), counted + 1
                if (score := d[i, 0] @ d[j, m]) <= limit:
                    sums["d->d"] += np.exp((score - own) / temperature)
            seen = set()
            for j, content in enumerate(query_id):
                is_copy = content in seen
                seen.add(content)
                if is_copy or content == own_id or (content, own_id) in pairs:
                    continue
                for term, anchor in (("q->q", q[i]), ("d->q", d[i, 0])):
                    if (score := anchor @ q[j]) <= limit:
                        sums[term] += np.exp((score - own) / temperature)
            right = 1.0
            if config.positives == "all" and in_batch[i]:
                answers = {c for k, c in pairs if k == query_id[i]}
                first = [[row[0] for row in document_id].index(c) for c in answers]
                right = sum(np.exp((q[i] @ d[j, 0] - own) / temperature) for j in first)
            sums = {term: value if config.has(term) else 0.0 for term, value in sums.items()}
            if config.partition == "joint":
                loss = np.log1p(sum(sums.values()) / right)
            else:
                loss = np.log1p((sums["q->d"] + sums["q->q"]) / right)
                if config.has("d->q") or config.has("d->d"):
                    loss = (loss + np.log1p(sums["d->q"] + sums["d->d"])) / 2
            total += weight * share * loss / B
            if ((width, weight), (form, share)) == compared[0]:
                hits += own > best
                masked += offered - 1 - counted
    return total, hits / B, masked / B, spread


def unit(x, width):
    x = x[..., :width].astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def stored(form, q, d, valid):
    """Queries and documents as an index of this form scores them, and how far the nearest component
    is from being rounded the other way."""
    if form == "int8":
        scale = np.abs(d[valid]).max(axis=0) / 127
        value = np.where(valid[..., None], d, 0) / scale
        return q, np.rint(value) * scale, np.abs(np.abs(value) % 1 - 0.5).min()
    if form == "binary":
        threshold = d[valid].mean(axis=0)
        sign = np.where(d > threshold, 1, -1) * np.abs(d[valid] - threshold).mean()
        return q - threshold, sign, np.abs(d - threshold)[valid].min()
    return q, d, 1.0


def make_clear_batch(config, seed, *sizes):
    """A batch none of whose components float32 may round another way than float64."""
    for attempt in itertools.count():
        batch = query, document, _, _, valid = make_batch(seed + 1000 * attempt, *sizes)
        if all(
            stored(form, unit(query, width), unit(document, width), valid)[2] > 1e-4
            for width, _ in config.widths(query.shape[1])
            for form, _ in config.forms()
        ):
            return batch


def make_batch(seed, B, N, D, contents):
    """A batch whose texts are copies of each other all over the place; N ragged negatives."""
    rng = np.random.default_rng(seed)
    table = rng.integers(-2, 2, (contents, 2)).astype(np.int32)  # also half-equal ids
    query_id = table[rng.integers(0, contents, B)]
    document_id = table[rng.integers(0, contents, (B, N + 1))]
    filled = rng.integers(0, N + 1, B)
    valid = np.arange(N + 1) <= filled[:, None]
    query = rng.normal(size=(B, D)).astype(np.float32)
    document = rng.normal(size=(B, N + 1, D)).astype(np.float32)
    document[~valid] = np.nan  # must never be read
    return query, document, query_id, document_id, valid


CONFIGS = st.builds(
    ContrastConfig,
    temperature=st.sampled_from([0.02, 0.1]),
    learn_temperature=st.booleans(),
    terms=st.sampled_from(["q->d", "d->q q->d", "q->d q->q d->d", "q->d q->q d->d d->q"]),
    partition=st.sampled_from(["joint", "separate"]),
    share_hard_negatives=st.booleans(),
    margin=st.just(0.1),
    margin_hard_negatives=st.booleans(),
    positives=st.sampled_from(["own", "all"]),
    spread=st.sampled_from([0.0, 3.0]),
    dims=st.sampled_from([None, {8: 1.0, 3: 0.5}]),
    quantisation=st.sampled_from([None, {"int8": 2.0}, {"float32": 1.0, "binary": 0.5}]),
).flatmap(
    lambda config: st.sampled_from(
        [config, dataclasses.replace(config, margin=None, margin_hard_negatives=True)]
    )
)


def value_and_grads(loss, config):
    """jitted (result, gradients to vectors and log_scale)."""

    def of(query, document, log_scale, query_id, document_id, valid, in_batch=None):
        texts = query, document, query_id, document_id, valid
        result = loss(config, *texts, log_scale, in_batch)
        return result.loss + config.spread * result.spread, result

    grads = jax.grad(of, argnums=(0, 1, 2), has_aux=True)
    return jax.jit(grads)


def check(result, grads, expected, expected_grads):
    """Loss to 1e-6, gradients to 5e-6 of the largest."""
    np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(result.spread, expected.spread, rtol=1e-6)
    np.testing.assert_array_equal(result.accuracy, expected.accuracy)
    np.testing.assert_allclose(result.masked, expected.masked, rtol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert np.isfinite(grad).all()
        largest = np.abs(expected_grad).max()
        np.testing.assert_allclose(grad, expected_grad, rtol=0, atol=5e-6 * largest + 1e-6)


# No shrinking: each smaller case would be compiled anew.
@settings(max_examples=9, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    config=CONFIGS,
    N=st.sampled_from([3, 1, 0]),
    tile=st.sampled_from([4, TILE]),
    alone=st.booleans(),
)
def test_both_forms_equal_the_oracle_and_each_other(config, N, tile, alone):
    dense = value_and_grads(dense_infonce, config)
    streamed = value_and_grads(functools.partial(infonce, tile=tile), config)
    log_scale = jnp.float32(-math.log(0.05))
    temperature = 0.05 if config.learn_temperature else config.temperature
    for seed, contents in enumerate((3, 8, 8, 1000)):  # from nearly all alike to all different
        query, document, *rest = make_clear_batch(config, seed, 9, N, 8, contents)
        in_batch = np.arange(9) % 3 > 0 if alone else np.ones(9, bool)
        more = [in_batch] if alone else []
        expected_grads, expected = dense(query, document, log_scale, *rest, *more)
        with jax.set_mesh(single_device_mesh()):
            grads, result = streamed(query, document, log_scale, *rest, *more)
        check(result, grads, expected, expected_grads)
        loss, accuracy, masked, spread = oracle(
            config, query, document, *rest, temperature, in_batch
        )
        for form in (expected, result):
            np.testing.assert_allclose(form.loss, loss, rtol=1e-5, atol=1e-5)
            expected_spread = spread if config.spread else 0.0
            np.testing.assert_allclose(form.spread, expected_spread, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose((form.accuracy, form.masked), (accuracy, masked), rtol=1e-6)


@pytest.mark.parametrize("part", ["equal", "memory"])
def test_on_devices(part):
    result = run_forked(["tests/losses/test_streamed_infonce.py", part], devices=8)
    assert result.returncode == 0, result.stderr


def equal_on_1_2_4_and_8_devices():
    everything = ContrastConfig(
        terms="q->d q->q d->d d->q",
        margin=0.05,
        margin_hard_negatives=False,
        hard_negatives_only="labels",
        positives="all",
        spread=2.0,
        dims={16: 1.0, 8: 0.5},
        quantisation={"float32": 1.0, "int8": 1.0, "binary": 0.5},
    )
    symmetric = ContrastConfig(
        terms="q->d d->q",
        partition="separate",
        share_hard_negatives=False,
        learn_temperature=True,
    )
    for config, shapes in (
        (ContrastConfig(), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2), (1, 1, 1, 4)]),
        (everything, [(2, 2, 2), (2, 1, 2, 2)]),
        (symmetric, [(1, 1, 2), (2, 2, 1)]),
    ):
        query, document, *rest = make_clear_batch(config, 0, 48, 2, 16, 60)
        if config.hard_negatives_only:
            rest.append(np.arange(48) % 5 > 0)
        arguments = query, document, initial_log_scale(config), *rest
        expected_grads, expected = value_and_grads(dense_infonce, config)(*arguments)
        streamed = value_and_grads(functools.partial(infonce, tile=4), config)
        for shape in shapes:
            mesh = make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])
            placed = [
                jax.device_put(x, batch_sharding(mesh) if np.ndim(x) else replicated(mesh))
                for x in arguments
            ]
            with jax.set_mesh(mesh):
                grads, result = streamed(*placed)
            check(result, grads, expected, expected_grads)
            assert grads[0].sharding.is_equivalent_to(batch_sharding(mesh), 2)


def memory_of_131072_pairs_on_8_devices():
    """The logits alone would be 8.6 GB per device; also that the program lowers for TPU."""
    B, D, mesh = 131_072, 768, make_mesh(MeshConfig())

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

    def loss(query, document, query_id, document_id):
        return infonce(ContrastConfig(), query, document, query_id, document_id).loss

    arguments = (
        *(array((B, D), jnp.float32), array((B, 1, D), jnp.float32)),
        *(array((B, 2), jnp.int32), array((B, 1, 2), jnp.int32)),
    )
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(*arguments)
        temporaries = traced.lower().compile().memory_analysis().temp_size_in_bytes
        assert "collective_permute" in traced.lower(lowering_platforms=("tpu",)).as_text()
    print(temporaries)
    assert temporaries < 0.7e9, temporaries


if __name__ == "__main__":
    {"equal": equal_on_1_2_4_and_8_devices, "memory": memory_of_131072_pairs_on_8_devices}[
        sys.argv[1]
    ]()
