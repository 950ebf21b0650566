"""The divergence over the documents of the batch, against loops in float64 and across devices."""

import functools
import itertools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.forked import run_forked

from moe_embed_jax.losses.distillation import batch_score_loss
from moe_embed_jax.losses.distillation_config import DistillationConfig
from moe_embed_jax.mesh import MeshConfig, batch_sharding, make_mesh, replicated, single_device_mesh

B, D, W = 12, 8, 5
CONFIG = DistillationConfig(batch_scores=1.0, teacher_temperature=0.3)
SCALE = 4.0


def make_batch(seed: int, contents: int, pairs: int = B):
    """Vectors of both, and texts that are copies of each other where there are few contents."""
    rng = np.random.default_rng(seed)
    table = rng.integers(-2, 2, (contents, 2)).astype(np.int32)  # also half-equal ids
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    ids = table[rng.integers(0, contents, (2, pairs))]
    return (normal(pairs, D), normal(pairs, D)), (normal(pairs, W), normal(pairs, W)), (*ids,)


def oracle(widths, scale, vectors, teacher_vectors, ids, in_batch):
    """Query by query and document by document."""
    pairs = len(ids[0])
    query_id, document_id = ([tuple(x) for x in side.tolist()] for side in ids)
    answers = set(zip(query_id, document_id, strict=True))

    def unit(x):
        x = x.astype(np.float64)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    t_q, t_d = map(unit, teacher_vectors)
    total = 0.0
    for width, weight in widths:
        q, d = (unit(x[:, :width]) for x in vectors)
        for i in range(pairs):
            chosen = [i]
            for j in range(pairs):
                content = document_id[j]
                if content in document_id[:j] or not in_batch[i]:
                    continue  # a copy
                if content != query_id[i] and (query_id[i], content) not in answers:
                    chosen.append(j)
            t = np.array([t_q[i] @ t_d[j] for j in chosen]) / CONFIG.teacher_temperature
            s = np.array([q[i] @ d[j] for j in chosen]) * scale
            p = np.exp(t) / np.exp(t).sum()
            total += weight * np.sum(p * (np.log(p) - s + np.log(np.exp(s).sum()))) / pairs
    return total


@functools.cache
def program(widths, tile, outside):
    def loss(query, document, scale, teacher_vectors, ids, in_batch):
        vectors = query, document
        in_batch = in_batch if outside else None
        return batch_score_loss(
            CONFIG, widths, scale, vectors, teacher_vectors, ids, in_batch, tile=tile
        )

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


@pytest.mark.parametrize(
    ("widths", "tile", "outside"),
    [(((D, 1.0),), 5, False), (((D, 1.0), (3, 0.5)), 2048, True)],
    ids=["tiles", "widths"],
)
def test_against_the_oracle_with_gradients(widths, tile, outside):
    for seed, contents in enumerate((2, 6, 12, 1000)):  # from nearly all alike to all different
        vectors, teacher_vectors, ids = make_batch(seed, contents)
        in_batch = np.arange(B) % 3 > 0 if outside else np.ones(B, bool)
        arguments = *vectors, jnp.float32(SCALE), teacher_vectors, ids, in_batch
        with jax.set_mesh(single_device_mesh()):
            value, gradients = program(widths, tile, outside)(*arguments)
        expected = oracle(widths, SCALE, vectors, teacher_vectors, ids, in_batch)
        assert expected > 0.05 or contents == 2
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6)
        rng = np.random.default_rng(3)
        precise = [*(x.astype(np.float64) for x in vectors), np.float64(SCALE)]
        for place, gradient in enumerate(gradients):
            assert np.isfinite(gradient).all()
            direction = rng.normal(size=precise[place].shape)
            ends = []
            for sign in (1e-5, -1e-5):
                moved = list(precise)
                moved[place] = moved[place] + sign * direction
                *of_student, scale = moved
                ends.append(oracle(widths, scale, of_student, teacher_vectors, ids, in_batch))
            slope = (ends[0] - ends[1]) / 2e-5
            np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-3, atol=1e-5)


def test_the_teachers_own_ranking_loses_nothing():
    vectors, _, ids = make_batch(5, 1000)
    with jax.set_mesh(single_device_mesh()):
        loss = functools.partial(batch_score_loss, CONFIG, [(D, 1.0)])
        same = loss(jnp.float32(1 / CONFIG.teacher_temperature), vectors, vectors, ids)
        other = loss(jnp.float32(1.0), vectors, vectors, ids)
    assert abs(float(same)) < 1e-6 < 1e-2 < float(other)


def test_a_query_without_other_documents_has_no_loss_and_no_gradient():
    vectors, teacher_vectors, ids = make_batch(6, 1000)
    same = np.zeros((B, 2), np.int32)  # one document for all
    arguments = *vectors, jnp.float32(SCALE), teacher_vectors, (ids[0], same), np.ones(B, bool)
    with jax.set_mesh(single_device_mesh()):
        value, gradients = program(((D, 1.0),), 5, False)(*arguments)
    assert abs(float(value)) < 1e-6
    assert all(np.abs(gradient).max() < 1e-6 for gradient in gradients)


def test_on_devices():
    result = run_forked(["tests/losses/test_batch_scores.py"], devices=8)
    assert result.returncode == 0, result.stderr


def equal_on_meshes_and_in_any_tiles():
    vectors, teacher_vectors, ids = make_batch(0, 30, pairs=32)
    arguments = *vectors, jnp.float32(SCALE), teacher_vectors, ids, np.ones(32, bool)
    widths = ((D, 1.0), (3, 0.5))
    with jax.set_mesh(single_device_mesh()):
        expected = program(widths, 2048, False)(*arguments)
    for shape, tile in itertools.product([(2, 1, 1), (2, 2, 2), (1, 1, 1, 4)], (3,)):
        mesh = make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])
        place = lambda x, mesh=mesh: jax.device_put(  # noqa: E731
            x, batch_sharding(mesh) if np.ndim(x) else replicated(mesh)
        )
        with jax.set_mesh(mesh):
            found = program(widths, tile, False)(*jax.tree.map(place, arguments))
        assert found[1][0].sharding.is_equivalent_to(batch_sharding(mesh), 2)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6, err_msg=f"{shape}")


if __name__ == "__main__":
    assert len(sys.argv) == 1
    equal_on_meshes_and_in_any_tiles()
