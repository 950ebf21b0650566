"""What is learned from a teacher, against loops in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed_jax.errors import UserError
from moe_embed_jax.losses.distillation import initial_projection, score_loss, vector_loss
from moe_embed_jax.losses.distillation_config import DistillationConfig

X, D, W = 5, 8, 6
SLICE, PROJECTION = (DistillationConfig(vectors=1.0, match=m) for m in ("slice", "projection"))


def texts(seed=0, width=D):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(X, width)).astype(np.float32) * rng.uniform(0.1, 9, (X, 1))


def vector_oracle(config, widths, student, teacher, projection):
    """Text by text and width by width."""
    total = 0.0
    for width, weight in widths:
        for x, t in zip(student.astype(np.float64), teacher.astype(np.float64), strict=True):
            if config.match == "projection":
                x = sum(x[i] * projection[i].astype(np.float64) for i in range(width))
            else:
                x, t = x[:width][: len(t)], t[:width]
            cosine = x @ t / np.linalg.norm(x) / np.linalg.norm(t)
            total += weight * (1 - cosine) / len(student)
    return total


@pytest.mark.parametrize("teacher_width", [W, D, 11])
@pytest.mark.parametrize("widths", [[(D, 1.0)], [(D, 1.0), (3, 0.5)]])
@pytest.mark.parametrize("config", [SLICE, PROJECTION], ids=lambda config: config.match)
def test_vectors_against_the_oracle_with_gradients(config, widths, teacher_width):
    student, teacher = texts(1), texts(2, teacher_width)
    projection = np.asarray(initial_projection(jax.random.key(0), D, teacher_width))

    def loss(student, projection):
        return vector_loss(config, widths, student, teacher, projection)

    expected = vector_oracle(config, widths, student, teacher, projection)
    np.testing.assert_allclose(loss(student, projection), expected, rtol=1e-5, atol=1e-6)
    gradients = jax.grad(loss, (0, 1))(student, projection)
    rng = np.random.default_rng(3)
    for place, (array, gradient) in enumerate(zip((student, projection), gradients, strict=True)):
        direction = rng.normal(size=array.shape)
        ends = []
        for sign in (1, -1):
            moved = [student.astype(np.float64), projection.astype(np.float64)]
            moved[place] = moved[place] + sign * 1e-5 * direction
            ends.append(vector_oracle(config, widths, moved[0], teacher, moved[1]))
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-3, atol=1e-5)


def score_oracle(config, widths, scale, query, document, valid, scores):
    """Query by query, in float64."""
    total = 0.0
    for width, weight in widths:
        losses = []
        for q, d_MD, there, score in zip(query, document, valid, scores, strict=True):
            known = [m for m in range(len(there)) if there[m] and np.isfinite(score[m])]
            if len(known) < 2:
                continue
            logits = np.array([np.float64(score[m]) for m in known]) / config.teacher_temperature
            p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            q = q[:width].astype(np.float64)
            student = []
            for m in known:
                d = d_MD[m, :width].astype(np.float64)
                student.append(scale * (q @ d) / np.linalg.norm(q) / np.linalg.norm(d))
            log_r = np.array(student) - np.log(np.sum(np.exp(student)))
            losses.append(sum(x * (np.log(x) - y) for x, y in zip(p, log_r, strict=True) if x > 0))
        total += weight * np.mean(losses) if losses else 0.0
    return total


def scored_batch(seed=0, B=7, N=3):
    rng = np.random.default_rng(seed)
    query, document = rng.normal(size=(B, D)), rng.normal(size=(B, 1 + N, D))
    valid = np.arange(1 + N) <= rng.integers(0, N + 1, B)[:, None]
    document[~valid] = np.nan  # must never be read
    scores = rng.normal(size=valid.shape)
    scores[rng.random(scores.shape) < 0.25] = np.nan  # not known
    return query.astype(np.float32), document.astype(np.float32), valid, scores.astype(np.float32)


@pytest.mark.parametrize("widths", [[(D, 1.0)], [(D, 1.0), (3, 0.5)]])
@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_scores_against_the_oracle_with_gradients(widths, temperature):
    config = DistillationConfig(scores=1.0, teacher_temperature=temperature)
    query, document, valid, scores = scored_batch()
    assert 0 < (valid & np.isfinite(scores)).sum(axis=1).min() + 1 < 3  # some have too few

    def loss(query, document, scale):
        return score_loss(config, widths, scale, query, document, valid, scores)

    scale = jnp.float32(7.0)
    expected = score_oracle(config, widths, 7.0, query, document, valid, scores)
    assert expected > 0.1
    np.testing.assert_allclose(loss(query, document, scale), expected, rtol=1e-5)
    gradients = jax.grad(loss, (0, 1, 2))(query, document, scale)
    arrays = [query.astype(np.float64), document.astype(np.float64), np.float64(7.0)]
    rng = np.random.default_rng(3)
    for place, gradient in enumerate(gradients):
        assert np.isfinite(gradient).all()
        direction = rng.normal(size=arrays[place].shape)
        ends = []
        for sign in (1, -1):
            moved = list(arrays)
            moved[place] = moved[place] + sign * 1e-5 * direction
            q, d, s = moved
            ends.append(score_oracle(config, widths, s, q, d, valid, scores))
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-3, atol=1e-5)


def test_the_same_ranking_loses_nothing_and_no_scores_lose_nothing():
    query, document, valid, _ = scored_batch()
    config = DistillationConfig(scores=1.0, teacher_temperature=0.5)
    d = np.nan_to_num(document)
    norms = np.linalg.norm(d, axis=-1) * np.linalg.norm(query, axis=-1)[:, None]
    cosines = np.einsum("bd,bmd->bm", query, d) / np.maximum(norms, 1e-9)
    texts = (config, [(D, 1.0)], jnp.float32(4.0), query, document, valid)
    assert abs(float(score_loss(*texts, (2 * cosines).astype(np.float32)))) < 1e-6
    unknown = np.full(valid.shape, np.nan, np.float32)
    value, gradient = jax.value_and_grad(lambda q: score_loss(*texts[:3], q, *texts[4:], unknown))(
        query
    )
    assert value == 0 and (gradient == 0).all()


def test_equal_vectors_lose_nothing_and_a_projection_keeps_lengths():
    student = texts()
    assert abs(float(vector_loss(SLICE, [(D, 1.0)], student, 3 * student))) < 1e-6
    assert float(vector_loss(SLICE, [(D, 1.0)], student, -student)) == pytest.approx(2)
    projection = initial_projection(jax.random.key(1), 400, 300)
    x = jnp.ones(400) / 20
    assert float(jnp.linalg.norm(x @ projection)) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(vectors=-1), "loss.distillation.vectors=-1 must be 0"),
        (dict(batch_scores=-1), "loss.distillation.batch_scores=-1 must be 0"),
        (dict(vectors=1.0, match="linear"), "loss.distillation.match='linear': choose from"),
        (dict(scores_from="model"), "loss.distillation.scores_from='model': choose from"),
        (dict(teacher_temperature=0.0), "loss.distillation.teacher_temperature=0.0 must be above"),
        (dict(contrast=0.0), "nothing is learned"),
    ],
)
def test_bad_keys_are_refused(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        DistillationConfig(**values)
