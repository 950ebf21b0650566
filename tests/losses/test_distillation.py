"""What is learned from a teacher, against loops in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed_jax.errors import UserError
from moe_embed_jax.losses.distillation import initial_projection, vector_loss
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
        (dict(vectors=1.0, match="linear"), "loss.distillation.match='linear': choose from"),
        (dict(contrast=0.0), "nothing is learned"),
    ],
)
def test_bad_keys_are_refused(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        DistillationConfig(**values)
