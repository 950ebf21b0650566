"""Consistency filtering: a pair stays if its document is among the nearest of its query.

Nomic Embed v2 (arXiv 2502.07972), and E5 before it: within a chunk of pairs of one
source and language, a teacher ranks all documents for each query; a pair is kept if its own
document is among the top k (2). The docstring of `ConsistencyRule` says exactly what the rule is.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from moe_embed_jax.curation.consistency_rule import ConsistencyRule
from moe_embed_jax.curation.pair_texts import (
    READ_AT_ONCE,
    Embedding,
    PairTexts,
    pair_scores,
    read_cache,
    read_texts,
)
from moe_embed_jax.curation.report import Example, FilterReport
from moe_embed_jax.curation.units import Curation, Judged, Unit
from moe_embed_jax.data.text_files import written_whole
from moe_embed_jax.pairs.row import PairRow
from moe_embed_jax.search.knn import Documents, top_k

EXAMPLES = 5  # dropped pairs of each group that a report shows
NEIGHBOURS_FILE = "neighbours.npz"


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """own_P: score of each pair. other_Pk, other_row_Pk: scores and rows of the best k other
    documents, best first; -inf and -1 where there are fewer.
    """

    own_P: np.ndarray
    other_Pk: np.ndarray
    other_row_Pk: np.ndarray

    def kept(self, margin: float) -> np.ndarray:
        """bool [P]; see `ConsistencyRule`."""
        return self.other_Pk[:, -1] <= self.own_P + np.float32(margin)


def chunks(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """[start, stop) as the fewest ranges of at most `most`; their sizes differ by one at most."""
    count = -(-(stop - start) // most)
    edges = [start + (stop - start) * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def find_neighbours(
    query_ND: np.ndarray,
    document_ND: Documents,
    query_row_P: np.ndarray,
    document_row_P: np.ndarray,
    k: int,
    mesh: jax.sharding.Mesh | None = None,
) -> Neighbours:
    """The best `k` other documents of P pairs, by exact search.

    Args:
      query_ND, document_ND: vectors of distinct queries and documents.
      query_row_P, document_row_P: the pairs.
    """
    score_Bk, index_Bk = top_k(query_ND, document_ND, k + 1, mesh)
    missing = k + 1 - score_Bk.shape[1]
    score_Bk = np.pad(score_Bk, ((0, 0), (0, missing)), constant_values=-np.inf)
    index_Bk = np.pad(index_Bk, ((0, 0), (0, missing)), constant_values=-1)
    score_Pm, row_Pm = score_Bk[query_row_P], index_Bk[query_row_P]
    is_own_Pm = row_Pm == document_row_P[:, None]
    # The own document, or else the last of the k + 1, is no other document of interest.
    left_out_P = np.where(is_own_Pm.any(axis=1), is_own_Pm.argmax(axis=1), k)
    others_Pm = np.arange(k + 1) != left_out_P[:, None]
    own_P = pair_scores(query_ND, document_ND, query_row_P, document_row_P)
    # The search's own number where there is one: sums in another order differ in the last bits.
    own_P = np.where(is_own_Pm.any(axis=1), score_Pm[~others_Pm], own_P)
    shape = (len(query_row_P), k)
    return Neighbours(own_P, score_Pm[others_Pm].reshape(shape), row_Pm[others_Pm].reshape(shape))


class ConsistencyFilter(Curation):
    """Keeps the consistent pairs of a prepared folder. A unit is a chunk, see `ConsistencyRule`.

    Attributes:
      seconds: of this process, by what it did.
    """

    kind = "filter"
    new_report = FilterReport

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.seconds = {"embedding": 0.0, "search": 0.0}

    def _places(self, start: int, stop: int, folder: Path) -> list[tuple[int, int, Path]]:
        return [
            (first, last, folder / f"chunk-{number:05d}")
            for number, (first, last) in enumerate(chunks(start, stop, self.rule.chunk))
        ]

    def judge(self, unit: Unit) -> Judged:
        texts = read_texts(self.pairs, unit.start, unit.stop)
        found = chunk_neighbours(
            unit.folder, texts, self.embedding, self.rule, self.mesh, self.seconds
        )
        keep_P = found.kept(self.rule.margin)
        kept = int(keep_P.sum())
        counts = {"pairs": len(unit), "kept": kept, "dropped": len(unit) - kept}
        rows = self._rows(unit.start + np.flatnonzero(keep_P))
        return Judged(keep_P, rows, counts, _examples(texts, found, keep_P))

    def _rows(self, numbers: np.ndarray) -> Iterator[PairRow]:
        for begin in range(0, len(numbers), READ_AT_ONCE):
            yield from self.pairs.read(numbers[begin : begin + READ_AT_ONCE])


def chunk_neighbours(
    folder: Path,
    texts: PairTexts,
    embedding: Embedding,
    rule: ConsistencyRule,
    mesh,
    seconds: dict[str, float],
) -> Neighbours:
    """`find_neighbours` of a chunk, from `folder` if it is there; adds to `seconds`."""
    start = time.monotonic()
    queries, documents = embedding.embed(folder, texts)
    embedded = time.monotonic()
    seconds["embedding"] += embedded - start
    path = folder / NEIGHBOURS_FILE
    made_of = json.dumps([rule.k, queries.about, documents.about], sort_keys=True)
    stored = read_cache(path, made_of, ("own", "other", "other_row"))
    if stored is not None:
        return Neighbours(*stored)
    query_ND = queries[:].astype(np.float32, copy=False)
    found = find_neighbours(
        query_ND, documents, texts.queries.row, texts.documents.row, rule.k, mesh
    )
    seconds["search"] += time.monotonic() - embedded
    with written_whole(path) as file:
        np.savez(
            file,
            made_of=made_of,
            own=found.own_P,
            other=found.other_Pk,
            other_row=found.other_row_Pk,
        )
    return found


def _examples(texts: PairTexts, found: Neighbours, keep_P: np.ndarray) -> list[Example]:
    """Dropped pairs, evenly spread over the chunk."""
    dropped = np.flatnonzero(~keep_P)
    chosen = dropped[np.linspace(0, len(dropped) - 1, min(EXAMPLES, len(dropped))).astype(int)]
    return [
        Example(
            query=texts.queries.texts[texts.queries.row[p]],
            document=texts.documents.texts[texts.documents.row[p]],
            score=float(found.own_P[p]),
            others=[
                (texts.documents.texts[row], float(score))
                for row, score in zip(found.other_row_Pk[p], found.other_Pk[p], strict=True)
            ],
        )
        for p in chosen
    ]
