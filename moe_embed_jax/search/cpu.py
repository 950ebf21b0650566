"""The walk over blocks of documents on CPUs: exact, at little more than the price of the products.

1. All products of a block, of vectors rounded to bfloat16 where the processor multiplies these
   faster (`search.rounded` says how far off they may be), and the peaks of what they may be at
   most, in groups of 16 documents. XLA's top-k would cost half of what the products do.
2. A document among the best k lies in a group whose peak is above the k-th best score so far. These
   groups are looked at one by one, and their documents that may be above get their scores
   (`search.exact`). After a few blocks they are few.
3. Where they are many, as in the first block, the k-th highest peak helps: k groups hold a document
   each that is at least as good, less twice the bound. A query that still has too many is compared
   with all documents of the block in float64.

XLA computes the next block while NumPy ranks this one.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from moe_embed_jax.search import exact
from moe_embed_jax.search.rounded import Rounded, rounded

BLOCK = 16_384  # documents scored at once
GROUP = 16  # documents with one peak
# A score of one pair takes 16 times the time of one of a product of matrices in float64.
MANY = 1 / 32  # of a block, candidates of a query
WORTH_MEASURING = 2e10  # products of a search that takes as long as `bfloat16_is_faster`


@dataclasses.dataclass
class Queries:
    """A part of the queries (rounded: padded, too) and the best k so far, as `exact.keys`."""

    rounded: Rounded
    exact_BD: np.ndarray
    found_Bk: np.ndarray

    @classmethod
    def start(cls, query_BD: np.ndarray, count: int, k: int, dtype) -> "Queries":
        """Nothing found yet for float32 `query_BD`, the first `count` of which are no padding."""
        near = rounded(query_BD, dtype)
        # Products with zeros are exact; else each document would be a candidate.
        is_zero_B = ~query_BD.any(axis=1)
        size_B, slope_B = (np.where(is_zero_B, 0, x_B) for x_B in (near.size_N, near.slope_N))
        return cls(
            near._replace(size_N=size_B, slope_N=slope_B),
            query_BD[:count].astype(np.float64),
            np.full((count, k), exact.EMPTY),
        )


def walk(parts: list[Queries], blocks: Iterable[tuple[int, np.ndarray, int]], dtype) -> None:
    """Compares all parts with all blocks: (index of the first document, documents, how many of
    them are no padding). A block must stay as it is until the next but one is asked for."""
    # Memory of scores, two arrays of each shape: new memory costs a tenth of the products.
    free, pending = collections.defaultdict(list), None
    for first, document_nD, count in blocks:
        near = rounded(document_nD, dtype)
        for queries in parts:
            shape = len(queries.rounded.x_ND), len(document_nD)
            memory_Bn = free[shape].pop() if free[shape] else jnp.zeros(shape, jnp.float32)
            score_Bn = _products(queries.rounded.x_ND, near.x_ND, memory_Bn)
            peak_BG = _peaks(score_Bn, queries.rounded, near, count, count == len(document_nD))
            if pending is not None:
                _rank(*pending)
                free[pending[4].shape].append(pending[4])
            pending = queries, near, document_nD[:count], first, score_Bn, peak_BG
    if pending is not None:
        _rank(*pending)


@jax.jit
def _product(query_BD, document_nD):
    return jax.lax.dot_general(
        query_BD,
        document_nD,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


@functools.partial(jax.jit, donate_argnums=2, keep_unused=True)
def _products(query_BD, document_nD, memory_Bn):
    """The scores of a block, in the place of `memory_Bn`."""
    del memory_Bn
    return _product(query_BD, document_nD)


@functools.partial(jax.jit, static_argnums=4)
def _peaks(score_Bn, query: Rounded, document: Rounded, count, is_full: bool):
    """[B, G]: what the best of each group may score at most; -inf where all is padding.

    is_full: there is no padding; to look for it takes as long as all else here.
    """
    score_BGt = _in_groups(score_Bn)
    if not is_full:
        is_there_Gt = _in_groups(jnp.arange(score_Bn.shape[1]) < count)
        score_BGt = jnp.where(is_there_Gt, score_BGt, -jnp.inf)
    return score_BGt.max(axis=-1) + _group_bound(query, document)


def _in_groups(x_n):
    """[..., n] -> [..., G, size of a group]"""
    size = GROUP if x_n.shape[-1] % GROUP == 0 else 1
    return x_n.reshape(*x_n.shape[:-1], -1, size)


def _group_bound(query: Rounded, document: Rounded):
    """[B, G]: how far a product in each group may be off."""
    size_G, residue_G = (_in_groups(x_n).max(axis=-1) for x_n in document[1:3])
    return query.slope_N[:, None] * size_G + query.size_N[:, None] * residue_G


@np.errstate(over="ignore", invalid="ignore")  # sizes may be infinite
def _rank(queries: Queries, document: Rounded, document_nD, first: int, score_Bn, peak_BG) -> None:
    """Adds the documents of a block, the first of which has the index `first`."""
    found_Bk, document = queries.found_Bk, Rounded(None, *map(np.asarray, document[1:]))
    (B, k), n, G = found_Bk.shape, len(document_nD), peak_BG.shape[1]
    query = Rounded(None, *(x_B[:B] for x_B in queries.rounded[1:]))
    peak_BG = np.asarray(peak_BG)[:B]

    bar_B = exact.unpacked(found_Bk[:, -1])[0]  # to be among the best: score above it
    above_BG = ~(peak_BG <= bar_B[:, None])  # so what is no number is above
    is_crowded_B = np.count_nonzero(above_BG, axis=1) > k
    if k <= G and is_crowded_B.any():
        rows = np.flatnonzero(is_crowded_B)
        bound_rG = _group_bound(Rounded(None, *(x_B[rows] for x_B in query[1:])), document)
        bar_B[rows] = np.maximum(bar_B[rows], _below_kth(peak_BG[rows], k, bound_rG))
        above_BG[rows] = ~(peak_BG[rows] <= bar_B[rows, None])
        is_crowded_B = np.count_nonzero(above_BG, axis=1) > MANY * n
        above_BG[is_crowded_B] = False

    query_P, at_P = _candidates(above_BG, bar_B, np.asarray(score_Bn), query, document)
    is_crowded_B |= np.bincount(query_P, minlength=B) > MANY * n
    few_P = (at_P < n) & ~is_crowded_B[query_P]
    query_P, at_P = query_P[few_P], at_P[few_P]

    if len(query_P):
        score_P = exact.pair_scores(queries.exact_BD, document_nD, query_P, at_P)
        found_Bk = exact.with_pairs(found_Bk, query_P, exact.keys(score_P, first + at_P))
    if is_crowded_B.any():
        found_Bk[is_crowded_B] = exact.with_all(
            found_Bk[is_crowded_B], queries.exact_BD[is_crowded_B], document_nD, first
        )
    queries.found_Bk = found_Bk


def _candidates(above_BG, bar_B, score_Bn, query: Rounded, document: Rounded):
    """(queries [P], ascending, places in the block [P]) of the documents in the groups `above_BG`
    that may be above the bar of their query."""
    place_g = np.flatnonzero(above_BG)  # in the groups of all queries
    query_g, group_g = np.divmod(place_g, above_BG.shape[1])
    size = score_Bn.shape[1] // above_BG.shape[1]
    most_gt = np.take(score_Bn.reshape(-1, size), place_g, axis=0)
    most_gt += query.slope_N[query_g, None] * document.size_N.reshape(-1, size)[group_g]
    most_gt += query.size_N[query_g, None] * document.residue_N.reshape(-1, size)[group_g]
    g_P, t_P = np.nonzero(~(most_gt <= bar_B[query_g, None]))
    return query_g[g_P], group_g[g_P] * size + t_P


def _below_kth(peak_BG, k: int, bound_BG) -> np.ndarray:
    """Something below the k-th best score: k groups hold a document each that is at least as good
    as the peak, less twice the bound, of the k-th of them."""
    least_BG = np.where(bound_BG < np.inf, peak_BG - 2 * bound_BG, -np.inf)
    return np.nextafter(np.partition(least_BG, -k, axis=1)[:, -k], np.float32(-np.inf))
