"""The best k of scores: what all walks over documents share."""

import jax
import jax.numpy as jnp

Best = tuple[jax.Array, jax.Array]  # scores [B, k] float32, descending, and indices [B, k] int32


def empty_top_k(B: int, k: int) -> Best:
    """No document yet: score -inf, index -1."""
    return jnp.full((B, k), -jnp.inf, jnp.float32), jnp.full((B, k), -1, jnp.int32)


def merge(parts: list[Best], k: int) -> Best:
    """The best k of several. Equal scores keep the order of `parts`, and the order in each."""
    score_Bm = jnp.concatenate([score for score, _ in parts], axis=1)
    index_Bm = jnp.concatenate([index for _, index in parts], axis=1)
    score_Bk, at_Bk = jax.lax.top_k(score_Bm, min(k, score_Bm.shape[1]))
    return score_Bk, jnp.take_along_axis(index_Bm, at_Bk, axis=1)


def masked(score, at, valid):
    """Scores as they rank; -inf where `at` is `valid` or more, behind the last document."""
    score = jnp.maximum(score, jnp.finfo(jnp.float32).min)  # an overflow ranks above padding
    score = jnp.where(score == 0, 0.0, score)  # top-k ranks -0 below 0
    return jnp.where(at < valid, score, -jnp.inf)
