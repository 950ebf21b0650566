"""Vectors of texts for evaluation: embedded once, kept in TensorStore, cut to several widths."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from moe_embed_jax import storage
from moe_embed_jax.embedder import unit_norm
from moe_embed_jax.search.vectors import VectorStore, cached_vectors, hash_texts

SIDES = ("query", "document", "symmetric")


class TextEncoder(Protocol):
    """Who is evaluated: an `Embedder`, or a teacher of sentence-transformers."""

    def encode(self, texts: list[str], prompt: str | None) -> np.ndarray:
        """float32 [len(texts), D] of unit norm."""

    def identity(self, prompt: str | None) -> dict:
        """Whatever decides those embeddings."""


class TextVectors:
    """The vectors of one encoder, by the side that a text takes part on.

    Attributes:
      widths: first features to score with, each normalised again (Matryoshka); None: all.
      mesh: what searches run on.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        cache: Path,
        prompts: dict[str, str | None],
        mesh: jax.sharding.Mesh | None = None,
        widths: Sequence[int | None] = (None,),
        dtype: str = "float32",
    ):
        """`prompts`: side -> prompt, see `SIDES`; `dtype`: of the kept vectors."""
        self.widths = tuple(widths)
        self.mesh = mesh
        self._encoder = encoder
        self._cache = storage.path(cache)
        self._prompts = prompts
        self._dtype = dtype
        self._stores: dict[tuple, VectorStore] = {}

    def identity(self) -> dict:
        return {side: self._encoder.identity(self._prompts[side]) for side in SIDES}

    def embed(self, texts: Sequence[str], side: str, label: str) -> np.ndarray:
        """float32 [n, D] in memory, all features. Equal texts are embedded once, so that their
        vectors are the same to the bit and ties among them do not depend on the encoder's luck."""
        row_of: dict[str, int] = {}
        rows = [row_of.setdefault(text, len(row_of)) for text in texts]
        store = self.stream(lambda: row_of, side, hash_texts(row_of), label)
        return store[:].astype(np.float32)[rows]

    def stream(
        self,
        texts: Callable[[], Iterable[str]],
        side: str,
        fingerprint: tuple[int, str],
        label: str,
    ) -> VectorStore:
        """The vectors of texts that need not fit into memory, on disk; embeds what is missing.

        `texts`, `fingerprint`, `label`: as of `search.vectors.cached_vectors`.
        """
        prompt = self._prompts[side]
        known = (prompt, *fingerprint)
        if known not in self._stores:  # processes of a run must ask once only
            self._stores[known] = cached_vectors(
                self._cache,
                texts,
                lambda chunk: self._encoder.encode(chunk, prompt=prompt),
                self._encoder.identity(prompt),
                self._dtype,
                fingerprint,
                label,
            )
        return self._stores[known]


def cut(x_ND: np.ndarray, width: int | None) -> np.ndarray:
    """The first `width` features, normalised again; None: all of them."""
    return x_ND if width is None else unit_norm(x_ND[:, :width])


class StoredRows:
    """The rows of several stores one after the other, cut to a width, read by slices: what
    `search.knn.top_k` takes as documents."""

    def __init__(self, stores: Sequence[VectorStore], width: int | None):
        self._stores = stores
        self._width = width
        self._ends = np.cumsum([len(store) for store in stores])
        self.shape = (int(self._ends[-1]), width or stores[0].shape[1])

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        parts = []
        for store, end in zip(self._stores, self._ends.tolist(), strict=True):
            first = end - len(store)
            if start < end and stop > first:
                parts.append(store[max(start - first, 0) : min(stop, end) - first])
        x_ND = np.concatenate(parts) if len(parts) != 1 else parts[0]
        return x_ND if self._width is None else cut(x_ND.astype(np.float32), self._width)
