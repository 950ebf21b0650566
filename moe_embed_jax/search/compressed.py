"""Vectors in a quarter (int8) and a thirty-second (bits) of their bytes, and search in them.

    float32   4 D bytes a vector    search.knn.top_k
    int8        D bytes a vector    Int8Vectors.top_k: exact over the rounded vectors
    binary    D/8 bytes a vector    rescored_top_k: by Hamming distance, the best ranked again

Definitions as in the field (scalar and binary quantization of sentence-transformers, Faiss' SQ8):
int8 has a scale per dimension, a bit says whether a component is above the mean of its dimension;
both are taken from the vectors themselves. The few candidates that bits find are ranked again with
the query in float32.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from moe_embed_jax.search import BINARY, INT8, knn
from moe_embed_jax.search.knn import Documents, pad_rows
from moe_embed_jax.search.selection import Best, empty_top_k, masked, merge

LEVELS = 127  # -127 ... 127; -128 is not used, so that a vector and its negative are both exact
OVERSAMPLE = 4  # candidates of the bits per wanted neighbour
PIECE = 16_384  # vectors read at a time
BLOCK = 16_384  # documents whose distances to QUERY_BLOCK queries exist at once
QUERY_BLOCK = 256
RESCORED = 1 << 22  # components of candidates that exist in float32 at once, plus one query's


class Int8Vectors:
    """Component d of a vector is `values_ND[:, d] * scale_D[d]`, values from -127 to 127.

    One symmetric scale per dimension, the largest magnitude there / 127: components of embeddings
    differ in size by dimension, not by vector (they are of unit norm); it costs no bytes per
    vector; and it goes into the query, so that a score is one product with int8. No component is
    off by more than half its scale, so a score by at most sum |query_d| scale_d / 2.

    It is a `knn.Documents` of its int8 values.
    """

    def __init__(self, values_ND: np.ndarray, scale_D: np.ndarray):
        """Raises ValueError: another dtype, or shapes that do not fit."""
        if values_ND.dtype != np.int8 or values_ND.ndim != 2:
            raise ValueError(f"values must be int8 [N, D], got {values_ND.dtype} {values_ND.shape}")
        if scale_D.shape != values_ND.shape[1:]:
            raise ValueError(f"scale {scale_D.shape} does not fit values {values_ND.shape}")
        self.values_ND = values_ND
        self.scale_D = scale_D.astype(np.float32)

    @classmethod
    def compress(cls, document_ND: Documents, scale_D: np.ndarray | None = None) -> "Int8Vectors":
        """Of float vectors, read in slices, twice without a scale.

        scale_D: of a sample, for vectors that are to be added to its index; positive. Components
        beyond 127 scales become 127 scales. None: of these vectors, none of which is cut off.
        """
        N, D = document_ND.shape
        if scale_D is None:
            largest_D = np.zeros(D, np.float32)
            for _, x_nD in _pieces(document_ND):
                np.maximum(largest_D, np.abs(x_nD).max(axis=0), out=largest_D)
            # A product, as compilers make of a division by a constant: training has equal scales.
            scale_D = largest_D * np.float32(1 / LEVELS)
            scale_D = np.maximum(scale_D, np.finfo(np.float32).tiny)
        scale_D = np.asarray(scale_D, np.float32)
        if scale_D.shape != (D,) or not (np.isfinite(scale_D) & (scale_D > 0)).all():
            raise ValueError(f"scale_D must be {D} positive numbers, one per dimension")
        values_ND = np.empty((N, D), np.int8)
        for first, x_nD in _pieces(document_ND):
            value_nD = np.clip(np.rint(x_nD / scale_D), -LEVELS, LEVELS)
            values_ND[first : first + len(x_nD)] = value_nD
        return cls(values_ND, scale_D)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values_ND.shape

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.values_ND.nbytes + self.scale_D.nbytes

    @property
    def bytes_per_vector(self) -> int:
        """Bytes that one more vector takes."""
        return self.values_ND[:1].nbytes

    def __len__(self) -> int:
        return len(self.values_ND)

    def __getitem__(self, rows) -> np.ndarray:
        return self.values_ND[rows]

    def to_float(self) -> np.ndarray:
        """float32 [N, D]: what the vectors are now."""
        return self.values_ND * self.scale_D

    def top_k(self, query_BD: np.ndarray, k: int, mesh=None) -> tuple[np.ndarray, np.ndarray]:
        """`knn.top_k` of float queries with the vectors as they are now: exact over them."""
        query_BD = _checked_queries(query_BD, self.shape[1])
        return knn.top_k(query_BD * self.scale_D, self, k, mesh)

    def scores(self, query_BD: np.ndarray, index_Bm: np.ndarray) -> np.ndarray:
        """Inner products [B, m] of each query with the vectors `index_Bm[b]`."""
        query_BD = query_BD * self.scale_D
        return np.einsum("BD,BmD->Bm", query_BD, self.values_ND[index_Bm].astype(np.float32))


class BinaryVectors:
    """Component d of a vector is a sign: +1 (bit 1) above `threshold_D[d]`, else -1.

    `bits_NW`: uint8 [N, ceil(D / 8)], dimension 0 the highest bit of byte 0 (`np.packbits`), zeros
    behind the last dimension.

    The thresholds are the means of the dimensions. Usual are zeros, but embeddings of many models
    share a large offset, and a bit that is the same in all vectors says nothing: of
    multilingual-e5-small's 384 bits on XQuAD's paragraphs 187 are nearly constant with zeros, and
    nDCG@10 by Hamming distance is 0.63 instead of 0.93. An offset of the documents changes all
    scores of a query by the same amount, so nothing is lost.
    """

    def __init__(self, bits_NW: np.ndarray, threshold_D: np.ndarray):
        """Raises ValueError: another dtype, or thresholds that the bytes do not fit."""
        width = len(threshold_D)
        if bits_NW.dtype != np.uint8 or bits_NW.ndim != 2 or bits_NW.shape[1] != -(-width // 8):
            raise ValueError(
                f"bits must be uint8 [N, {-(-width // 8)}] for width {width}, got "
                f"{bits_NW.dtype} {bits_NW.shape}"
            )
        self.bits_NW, self.threshold_D = bits_NW, threshold_D.astype(np.float32)

    @classmethod
    def compress(
        cls, document_ND: Documents, threshold_D: np.ndarray | None = None
    ) -> "BinaryVectors":
        """Of float vectors, read in slices, twice without thresholds.

        threshold_D: of a sample, for vectors that are to be added to its index; zeros for plain
        signs. None: the means of these vectors.
        """
        N, D = document_ND.shape
        if threshold_D is None:
            sum_D = sum((x_nD.sum(axis=0, dtype=np.float64) for _, x_nD in _pieces(document_ND)))
            threshold_D = np.zeros(D) + sum_D / max(N, 1)
        threshold_D = np.asarray(threshold_D, np.float32)
        if threshold_D.shape != (D,) or not np.isfinite(threshold_D).all():
            raise ValueError(f"threshold_D must be {D} numbers, one per dimension")
        bits_NW = np.empty((N, -(-D // 8)), np.uint8)
        for first, x_nD in _pieces(document_ND):
            bits_NW[first : first + len(x_nD)] = np.packbits(x_nD > threshold_D, axis=1)
        return cls(bits_NW, threshold_D)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.bits_NW), len(self.threshold_D)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.bits_NW.nbytes + self.threshold_D.nbytes

    @property
    def bytes_per_vector(self) -> int:
        """Bytes that one more vector takes."""
        return self.bits_NW[:1].nbytes

    def __len__(self) -> int:
        return len(self.bits_NW)

    def signs(self, rows) -> np.ndarray:
        """+1 and -1, float32 [..., D], of `rows` (a slice, or indices of any shape)."""
        bit = np.unpackbits(self.bits_NW[rows], axis=-1, count=self.shape[1])
        return bit.astype(np.float32) * 2 - 1

    def top_k(self, query_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `min(k, N)` vectors of least Hamming distance to the signs of each query.

        Returns:
          scores float32 [B, min(k, N)], D - 2 distance (the inner product of the signs), and
          indices int32; best first, equal scores by the lower index.
        """
        query_BD = _checked_queries(query_BD, self.shape[1])
        (N, D), B = self.shape, len(query_BD)
        wanted = _checked_k(k, N)
        if B == 0 or wanted == 0:
            return np.zeros((B, wanted), np.float32), np.zeros((B, wanted), np.int32)
        query_BW = _words(np.packbits(query_BD > self.threshold_D, axis=1))
        block = min(BLOCK, _power_of_two(N))
        parts = [query_BW[start : start + QUERY_BLOCK] for start in range(0, B, QUERY_BLOCK)]
        parts = [pad_rows(part, _power_of_two(len(part))) for part in parts]
        found = [empty_top_k(len(part), wanted) for part in parts]
        for first in range(0, N, block):
            block_nW = pad_rows(_words(self.bits_NW[first : first + block]), block)
            block_nW = jnp.asarray(block_nW)
            found = [
                _nearer(best, part, block_nW, first, N - first, D)
                for best, part in zip(found, parts, strict=True)
            ]
        score_Bk, index_Bk = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return score_Bk[:B], index_Bk[:B]

    def scores(self, query_BD: np.ndarray, index_Bm: np.ndarray) -> np.ndarray:
        """Inner products [B, m] of each float query, less the thresholds, with the signs of the
        vectors `index_Bm[b]`."""
        return np.einsum("BD,BmD->Bm", query_BD - self.threshold_D, self.signs(index_Bm))


def rescored_top_k(
    query_BD: np.ndarray,
    bits: BinaryVectors,
    k: int,
    rescorer: Int8Vectors | BinaryVectors | None = None,
    oversample: int = OVERSAMPLE,
) -> tuple[np.ndarray, np.ndarray]:
    """The `oversample * k` nearest by Hamming distance, ranked again; the best `min(k, N)` of them.

    The binary search of Yamada et al. (arXiv 2106.00882, section 3): candidates by the bits of
    query and document, ranked by the float query with the documents as `rescorer` holds them.

    Args:
      rescorer: the same vectors as int8, which take D more bytes per vector; None: the bits
        themselves, which take none.

    Returns:
      scores float32 [B, min(k, N)] by `rescorer`, descending, and indices int32; equal scores by
      the lower index.

    Raises:
      ValueError: shapes that do not fit, k or oversample below 1, queries that are not finite.
    """
    rescorer = bits if rescorer is None else rescorer
    if rescorer.shape != bits.shape:
        raise ValueError(f"rescorer {rescorer.shape} and bits {bits.shape}: not the same vectors")
    if oversample < 1:
        raise ValueError(f"oversample={oversample} must be at least 1")
    query_BD = _checked_queries(query_BD, bits.shape[1])
    wanted = _checked_k(k, len(bits))
    _, index_Bm = bits.top_k(query_BD, oversample * k)
    index_Bm = np.sort(index_Bm, axis=1)  # of equal scores the lower index is first
    score_Bm = np.empty(index_Bm.shape, np.float32)
    step = max(1, RESCORED // max(1, index_Bm.shape[1] * bits.shape[1]))
    for start in range(0, len(query_BD), step):
        rows = slice(start, start + step)
        score_Bm[rows] = rescorer.scores(query_BD[rows], index_Bm[rows])
    order_Bk = np.argsort(-score_Bm, axis=1, kind="stable")[:, :wanted]
    return np.take_along_axis(score_Bm, order_Bk, 1), np.take_along_axis(index_Bm, order_Bk, 1)


def search_as(form: str, query_BD: np.ndarray, document_ND: np.ndarray, k: int, mesh=None):
    """(score_Bk, index_Bk) of an index of this form, of `search.FORMS`. binary: found by Hamming
    distance, ranked again by the bits."""
    if form == INT8:
        return Int8Vectors.compress(document_ND).top_k(query_BD, k, mesh)
    if form == BINARY:
        return rescored_top_k(query_BD, BinaryVectors.compress(document_ND), k)
    return knn.top_k(query_BD, document_ND, k, mesh)


@jax.jit
def _nearer(best: Best, query_BW, document_nW, first, valid, width) -> Best:
    """`best` and the documents of a block, the first `valid` of which there are.

    Word by word: sums over a last axis of words would leave vector units idle.
    """
    different_Bn = sum(
        jax.lax.population_count(query_BW[:, w, None] ^ document_nW[None, :, w]).astype(jnp.int32)
        for w in range(query_BW.shape[1])
    )
    n = len(document_nW)
    score_Bn = masked((width - 2 * different_Bn).astype(jnp.float32), jnp.arange(n), valid)
    score_Bk, at_Bk = jax.lax.top_k(score_Bn, min(best[0].shape[1], n))
    return merge([best, (score_Bk, first + at_Bk)], best[0].shape[1])


def _words(bits_NW: np.ndarray) -> np.ndarray:
    """uint32 [N, ceil(W / 4)], zeros behind the last byte."""
    spare = -bits_NW.shape[1] % 4
    return np.ascontiguousarray(np.pad(bits_NW, ((0, 0), (0, spare)))).view(np.uint32)


def _pieces(document_ND: Documents) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first, float32 [n, D]) of all vectors. Raises ValueError: not finite."""
    for first in range(0, document_ND.shape[0], PIECE):
        x_nD = np.asarray(document_ND[first : first + PIECE]).astype(np.float32, copy=False)
        finite_n = np.isfinite(x_nD).all(axis=1)
        if not finite_n.all():
            row = first + int(np.argmin(finite_n))
            raise ValueError(f"document {row} holds a value that is not finite")
        yield first, x_nD


def _checked_queries(query_BD, width: int) -> np.ndarray:
    query_BD = np.asarray(query_BD, np.float32)
    if query_BD.ndim != 2 or query_BD.shape[1] != width:
        raise ValueError(f"queries must be [count, {width}], got shape {query_BD.shape}")
    if not np.isfinite(query_BD).all():
        raise ValueError("a query holds a value that is not finite")
    return query_BD


def _checked_k(k: int, N: int) -> int:
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    return min(k, N)


def _power_of_two(count: int) -> int:
    """At least `count`: arrays have few sizes, for each is a compilation."""
    return 1 << (count - 1).bit_length()
