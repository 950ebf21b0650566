"""Vectors as a compressed index stores and scores them, for quantisation-aware training.

The forms, scales, thresholds and rounding are those of `search/compressed.py`, made of the
documents of the global batch in place of those of an index. Rounding has no gradient, so a
component passes its gradient on to the number that it was made of (straight-through, arXiv
1308.3432; for embeddings: pplx-embed, arXiv 2602.11151).
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_embed_jax.losses.contrast_config import BINARY, INT8

LEVELS = 127  # as of `Int8Vectors`


def as_stored(form: str, query_BD, document_BMD, valid_BM) -> tuple[jax.Array, jax.Array]:
    """(query_BD, document_BMD) whose inner products are the scores of an index of this form.

    Args:
      form: "float32" (nothing changes), "int8" or "binary".
      query_BD, document_BMD: float32, of unit length; zeros where `valid_BM` is False, there and in
        the result.

    int8: `Int8Vectors`, searched with queries in float32. binary: `BinaryVectors.scores`, which
    ranks what was found by Hamming distance: the query less the thresholds, with the signs of a
    document. The signs have one factor, the mean distance of all components from their thresholds
    (XNOR-Net, arXiv 1603.05279, equation 6), which changes no order. So scores and gradients are as
    large as those of float32. As cosines of what is above the thresholds they would be large also
    where vectors hardly differ, and their gradients would outweigh those of the other forms.
    """
    there_BM1 = valid_BM[..., None]
    if form == INT8:
        scale_D = int8_scale(document_BMD)
        value_BMD = jnp.clip(jnp.round(document_BMD / scale_D), -LEVELS, LEVELS)
        return query_BD, _straight_through(value_BMD * scale_D, document_BMD)
    if form == BINARY:
        threshold_D = binary_threshold(document_BMD, valid_BM)
        sign_BMD = jnp.where(document_BMD > threshold_D, 1.0, -1.0)
        factor = sign_factor(document_BMD, threshold_D, valid_BM)
        stored_BMD = _straight_through(factor * sign_BMD, document_BMD)
        return query_BD - threshold_D, jnp.where(there_BM1, stored_BMD, 0.0)
    return query_BD, document_BMD


def int8_scale(document_BMD):
    """scale_D: the largest magnitude of each dimension / 127."""
    largest_D = jnp.max(jnp.abs(document_BMD), axis=(0, 1))
    scale_D = jnp.maximum(largest_D * np.float32(1 / LEVELS), np.finfo(np.float32).tiny)
    return jax.lax.stop_gradient(scale_D)


def binary_threshold(document_BMD, valid_BM):
    """threshold_D: the mean of each dimension over all documents that are there."""
    sum_D = jnp.sum(document_BMD, axis=(0, 1))
    return jax.lax.stop_gradient(sum_D / jnp.sum(valid_BM))


def sign_factor(document_BMD, threshold_D, valid_BM):
    """Scalar: the mean of `|component - threshold|` over all documents that are there."""
    away_BMD = jnp.where(valid_BM[..., None], jnp.abs(document_BMD - threshold_D), 0.0)
    count = jnp.sum(valid_BM) * document_BMD.shape[-1]
    return jax.lax.stop_gradient(jnp.sum(away_BMD) / count)


def _straight_through(value, x):
    """Exactly `value`, with the gradient of `x`."""
    return jax.lax.stop_gradient(value) + (x - jax.lax.stop_gradient(x))
