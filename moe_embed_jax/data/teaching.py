"""What comes with a batch of pairs for distillation: a teacher's vectors, its scores, or both."""

import numpy as np

from moe_embed_jax.data.teacher_vectors import TeacherVectors
from moe_embed_jax.data.token_store import TokenStore


class Teaching:
    """Vectors and scores by rows of a token store.

    Attributes:
      teacher: the vectors; None where only scores of the store are learned.
      width (W): of the vectors that come with a batch; 0: none do.
      has_scores: whether scores come with a batch.
    """

    def __init__(
        self,
        store: TokenStore,
        teacher: TeacherVectors | None = None,
        has_vectors: bool = False,
        scores_from: str = "",
    ):
        """`scores_from`: "pairs" (those of `store`), "teacher" (inner products), or "" (none)."""
        self.teacher = teacher
        self.width = teacher.width if has_vectors else 0
        self.has_scores = bool(scores_from)
        self._store, self._scores_from = store, scores_from

    def vectors(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n, W] of the queries and of the own documents of these rows."""
        if not self.width:
            none_NW = np.zeros((len(rows), 0), np.float32)
            return none_NW, none_NW
        return self.teacher.queries(rows), self.teacher.documents(rows)

    def scores(self, rows: np.ndarray, mask_BN: np.ndarray, places: np.ndarray) -> np.ndarray:
        """float32 [n, 1 + N] of the own documents and hard negatives, NaN where none is known;
        [n, 0] without scores.

        Args:
          mask_BN, places: which hard negatives there are, and where in the store, row by row.
        """
        if not self.has_scores:
            return np.zeros((len(rows), 0), np.float32)
        scores_BM = np.full((len(rows), 1 + mask_BN.shape[1]), np.nan, np.float32)
        if self._scores_from == "pairs":
            scores_BM[:, 0] = self._store.document_scores[rows]
            scores_BM[:, 1:][mask_BN] = self._store.negative_scores[places]
        else:
            query_BW = self.teacher.queries(rows)
            scores_BM[:, 0] = np.sum(query_BW * self.teacher.documents(rows), axis=1)
            query_JW = np.repeat(query_BW, mask_BN.sum(axis=1), axis=0)
            scores_BM[:, 1:][mask_BN] = np.sum(query_JW * self.teacher.negatives(places), axis=1)
        return scores_BM

    def scored_rows(self, negatives: int) -> np.ndarray:
        """bool [rows]: those with known scores of two or more documents, of the own one and the
        first `negatives` hard ones."""
        store = self._store
        if self._scores_from == "pairs":
            own, known = np.isfinite(store.document_scores), np.isfinite(store.negative_scores)
        else:
            own, known = np.ones(len(store), bool), self.teacher.has_negative
        counts = np.diff(store.negative_starts)
        row = np.repeat(np.arange(len(store)), counts)
        number = np.arange(len(row)) - store.negative_starts[row]
        return own + np.bincount(row[known & (number < negatives)], minlength=len(store)) >= 2
