"""The best k of a block of scores, merged into the best k so far: exact, without sorting the block.

TPUs have a fast top-k. XLA's on CPUs costs half of what the products cost, so scores are looked at
in groups of neighbours there. A document among the best k lies in one of the k groups with the
highest peaks (else each of those k groups would hold a better document), so only those groups are
ranked. After a few blocks the k-th best so far is a bar that few groups clear, and a handful is
enough; how many clear it is counted, so nothing is lost.
"""

import functools

import jax
import jax.numpy as jnp

GROUP = 16  # neighbouring documents whose best score stands for all of them
FEW = 32  # groups that are ranked where no query has more above its bar
# XLA's top-k on CPUs runs on one thread: as independent parts it runs on several.
CPU_PARTS = 4
SMALLEST_PART = 64  # queries

Best = tuple[jax.Array, jax.Array]  # scores [B, k] float32, descending, and indices [B, k] int32


def nothing(B: int, k: int) -> Best:
    """No document yet: score -inf, index -1."""
    return jnp.full((B, k), -jnp.inf, jnp.float32), jnp.full((B, k), -1, jnp.int32)


def merge(parts: list[Best], k: int, cpu: bool) -> Best:
    """The best k of several. Equal scores keep the order of `parts`, and the order in each."""
    score_Bm = jnp.concatenate([score for score, _ in parts], axis=1)
    index_Bm = jnp.concatenate([index for _, index in parts], axis=1)
    score_Bk, at_Bk = _top_k(score_Bm, min(k, score_Bm.shape[1]), cpu)
    return score_Bk, jnp.take_along_axis(index_Bm, at_Bk, axis=1)


def merge_block(best: Best, score_Bn, first, valid, bar_B, recall: float | None, cpu: bool) -> Best:
    """`best` and the documents of a block, which come after those of `best`.

    Args:
      best: the best k so far.
      score_Bn: of `first` + 0, 1, ..., n - 1; only the first `valid` are documents.
      bar_B: a document that does not score above it may be left out.
      recall: None is exact; else the expected share of the block's best k that is found, by the
        partial reduction that TPUs have for it (`jax.lax.approx_max_k`).
      cpu: rank groups, as CPUs like it.

    Returns:
      The best k, equal scores by the lower index.
    """
    B, n = score_Bn.shape
    k = best[0].shape[1]
    at_n = jnp.arange(n)
    if recall is not None or not cpu:
        score_Bn = _masked(score_Bn, at_n, valid)
        if recall is None:
            score_Bk, at_Bk = jax.lax.top_k(score_Bn, min(k, n))
        else:
            score_Bk, at_Bk = jax.lax.approx_max_k(score_Bn, min(k, n), recall_target=recall)
        return merge([best, (score_Bk, first + at_Bk)], k, cpu)

    size = GROUP if n % GROUP == 0 else 1
    groups = n // size
    score_BGn = score_Bn.reshape(B, groups, size)
    peak_BG = _masked(score_BGn, at_n.reshape(groups, size), valid).max(axis=2)
    bar_B = jnp.maximum(bar_B, best[0][:, -1])
    peak_BG = jnp.where(peak_BG > bar_B[:, None], peak_BG, -jnp.inf)

    def rank(count: int) -> Best:
        if count == groups:
            candidate_Bm = _masked(score_Bn, at_n, valid)
            index_Bm = jnp.broadcast_to(first + at_n, (B, n))
        else:
            # In order of index, on which the order of equal scores rests.
            group_Bg = jnp.sort(_top_k(peak_BG, count, cpu)[1], axis=1)
            found_Bgn = jnp.take_along_axis(score_BGn, group_Bg[:, :, None], axis=1)
            at_Bgn = group_Bg[:, :, None] * size + jnp.arange(size)
            candidate_Bm = _masked(found_Bgn, at_Bgn, valid).reshape(B, -1)
            index_Bm = first + at_Bgn.reshape(B, -1)
        return merge([best, (candidate_Bm, index_Bm)], k, cpu)

    most = min(k, groups)
    few = min(FEW, most)
    above = (peak_BG > -jnp.inf).sum(axis=1).max()
    stage = jnp.where(above == 0, 0, jnp.where(above <= few, 1, 2))
    ranks = [functools.partial(rank, count) for count in (few, most)]
    return jax.lax.switch(stage, [lambda: best, *ranks])


def _masked(score, at, valid):
    """-inf behind the last document; an overflow to -inf must still rank above that."""
    score = jnp.maximum(score, jnp.finfo(jnp.float32).min)
    score = jnp.where(score == 0, 0.0, score)  # top-k ranks -0 below 0
    return jnp.where(at < valid, score, -jnp.inf)


def _top_k(score_Bm, k: int, cpu: bool):
    B = score_Bm.shape[0]
    parts = CPU_PARTS if cpu and B % (CPU_PARTS * SMALLEST_PART) == 0 else 1
    found = [jax.lax.top_k(part, k) for part in jnp.split(score_Bm, parts)]
    return tuple(jnp.concatenate(arrays) for arrays in zip(*found, strict=True))
