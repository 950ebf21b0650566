"""Scores of one model on many retrieval sets, at several widths; what BM25 has on them."""

import itertools
from collections.abc import Sequence

import numpy as np

from moe_embed_jax.evaluation.beir import RetrievalSet
from moe_embed_jax.evaluation.retrieval import Metrics, evaluate_many
from moe_embed_jax.search import FLOAT32

BM25 = "bm25"  # in place of a model


def score_model(
    embedder,
    groups: Sequence[dict[str, RetrievalSet]],
    dims: Sequence[int | None],
    prompts: tuple[str | None, str | None],
    show_progress: bool = False,
    indexes: Sequence[str] = (FLOAT32,),
) -> dict[int | str | None, dict[str, Metrics]]:
    """{dim: {name of the set: metrics}}; of other indexes under "256 int8", "all binary".

    Every text is embedded once, whatever the number of widths and indexes.

    Args:
      groups: the sets of a group are in memory, embedded, at the same time.
      dims: first features to keep, then normalised again (Matryoshka); None: all.
      indexes: forms in which documents are stored, see `search.compressed`.
      prompts: of queries and documents, see `Embedder.encode`.

    Raises:
      UserError: a width that the model does not have, or an unknown prompt.
    """
    from moe_embed_jax.embedder import unit_norm

    for dim in dims:
        for prompt in prompts:
            embedder.encode([], prompt=prompt, dim=dim)  # complains before anything is embedded
    results = {}
    for group in groups:
        encoded: dict[int, np.ndarray] = {}

        def encoder(side: int, dim: int | None, encoded=encoded):
            def encode(texts):
                if side not in encoded:
                    prompt = prompts[side]
                    encoded[side] = embedder.encode(
                        texts, prompt=prompt, show_progress=show_progress
                    )
                x_ND = encoded[side]
                return x_ND if dim is None else unit_norm(x_ND[:, :dim])

            return encode

        for dim, index in itertools.product(dims, indexes):
            sides = encoder(0, dim), encoder(1, dim)
            name = dim
            if [*indexes] != [FLOAT32]:
                name = str(dim or "all") if index == FLOAT32 else f"{dim or 'all'} {index}"
            found = evaluate_many(*sides, group, embedder.mesh, index)
            results[name] = results.get(name, {}) | found
    return results


def score_bm25(groups: Sequence[dict[str, RetrievalSet]]) -> dict[str, Metrics]:
    """{name of the set: metrics} of BM25 over words."""
    from moe_embed_jax.evaluation.bm25 import evaluate_bm25

    return {name: evaluate_bm25(each) for group in groups for name, each in group.items()}
