"""The score of a query and a document, and how scores are ordered.

A score is the float32 that is nearest to the inner product of the two vectors, which is summed in
float64: products of float32 are exact there, and the sum is off by at most D 2^-53 times the
product of their norms. So a score does not depend on what else is searched, or on blocks.
"""

import numpy as np
from jax.experimental import multihost_utils

CHUNK = 256  # pairs at a time: their vectors stay in the cache
PIECE = 1024  # documents that all queries are compared with at a time, in `all_keys`
EMPTY = np.iinfo(np.int64).max  # no document; behind all keys


def keys(score: np.ndarray, index: np.ndarray) -> np.ndarray:
    """int64 that ascend where scores fall; of equal scores, where indices rise."""
    # An overflow is a score, too: padding elsewhere is -inf. The sum makes -0 a 0.
    bits = (np.maximum(score, np.finfo(np.float32).min) + np.float32(0)).view(np.int32)
    rising = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    return ((~rising).astype(np.int64) << 32) | index


def unpacked(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scores float32, indices int32) of keys; -inf and -1 for EMPTY."""
    rising = ~(key >> 32).astype(np.int32)
    score = (rising ^ ((rising >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)
    is_there = key != EMPTY
    index = np.where(is_there, key & 0x7FFFFFFF, -1).astype(np.int32)
    return np.where(is_there, score, -np.inf).astype(np.float32), index


def pair_scores(query_BD, document_ND, query_P: np.ndarray, document_P: np.ndarray) -> np.ndarray:
    """float32 [P]: of the queries `query_P` (rows of float64) with the documents `document_P`."""
    P, D = len(query_P), query_BD.shape[1]
    score_P = np.empty(P)
    # New memory for each chunk would cost more than the sums.
    q_CD, d_CD = np.empty((2, min(CHUNK, P), D))
    stored_CD = np.empty(d_CD.shape, document_ND.dtype)
    for start in range(0, P, CHUNK):
        pairs = slice(start, start + CHUNK)
        n = len(query_P[pairs])
        np.take(query_BD, query_P[pairs], axis=0, out=q_CD[:n], mode="clip")
        d_CD[:n] = np.take(document_ND, document_P[pairs], axis=0, out=stored_CD[:n], mode="clip")
        np.einsum("pd,pd->p", q_CD[:n], d_CD[:n], out=score_P[pairs])
    return _nearest(score_P)


def with_pairs(found_Bk: np.ndarray, query_P, key_P) -> np.ndarray:
    """The best k of `found_Bk` and of the keys `key_P` of the queries `query_P`, which ascend."""
    count_B = np.bincount(query_P, minlength=len(found_Bk))
    place_P = np.arange(len(query_P)) - np.repeat(np.cumsum(count_B) - count_B, count_B)
    more_Bm = np.full((len(found_Bk), count_B.max(initial=0)), EMPTY)
    more_Bm[query_P, place_P] = key_P
    return _best(found_Bk, more_Bm)


def with_all(found_Bk: np.ndarray, query_BD, document_nD, first: int) -> np.ndarray:
    """The best k of `found_Bk` and of all documents of a block, the first of which has the index
    `first`; `query_BD`: float64.

    Scores come from products of matrices, whose order of sums is their own. Where that could round
    to another float32, the pair is summed as all pairs are.
    """
    D, size_B1 = query_BD.shape[1], np.linalg.norm(query_BD, axis=1, keepdims=True)
    for start in range(0, len(document_nD), PIECE):
        piece_nD = document_nD[start : start + PIECE].astype(np.float64)
        sum_Bn = query_BD @ piece_nD.T
        off_Bn = (D + 8) * 2.0**-52 * size_B1 * np.linalg.norm(piece_nD, axis=1)
        score_Bn, high_Bn = _nearest(sum_Bn - off_Bn), _nearest(sum_Bn + off_Bn)
        bar_B = unpacked(found_Bk[:, -1])[0]
        pairs = np.nonzero((score_Bn != high_Bn) & (high_Bn > bar_B[:, None]))
        score_Bn[pairs] = pair_scores(query_BD, piece_nD, *pairs)
        index_n = np.arange(first + start, first + start + len(piece_nD))
        found_Bk = _best(found_Bk, keys(score_Bn, index_n))
    return found_Bk


def best_of_all(found_Bk: np.ndarray) -> np.ndarray:
    """The best k of what each process of the run has found; all call this together."""
    # As pairs of int32: JAX has no int64 unless it is told to.
    found_PBk = multihost_utils.process_allgather(found_Bk.view(np.int32)).view(np.int64)
    return np.sort(np.concatenate([*found_PBk], axis=1), axis=1)[:, : found_Bk.shape[1]]


def _best(found_Bk, more_Bm):
    return np.sort(np.concatenate([found_Bk, more_Bm], axis=1), axis=1)[:, : found_Bk.shape[1]]


def _nearest(sums: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return sums.astype(np.float32)
