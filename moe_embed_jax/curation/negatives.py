"""Hard negatives: documents that a teacher ranks high for a query, and that are not its answers.

Positive-aware mining (NV-Retriever, arXiv 2407.15831) as in Nomic Embed v2 (arXiv 2502.07972,
equation 5): the candidates are the distinct documents of all pairs of a source and language, best
first by a teacher's score; those that score too close to the positive are taken to be answers that
nobody marked, and are left out.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from moe_embed_jax.curation.negatives_rule import NegativesRule
from moe_embed_jax.curation.pair_texts import (
    READ_AT_ONCE,
    Embedding,
    PairTexts,
    pair_scores,
    progress_bar,
    read_cache,
    read_texts,
)
from moe_embed_jax.curation.report import Example, MiningReport
from moe_embed_jax.curation.units import Curation, Judged, Unit
from moe_embed_jax.data.text_files import written_whole
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.pairs.normal_form import normal_form
from moe_embed_jax.pairs.row import PairRow
from moe_embed_jax.search.knn import top_k

QUERIES_AT_ONCE = 16_384  # distinct queries that are searched for and stored together
EXAMPLES = 5  # queries of each group that a report shows


def score_limit(rule: NegativesRule, positive_B: np.ndarray) -> np.ndarray:
    """float64 [B]: negatives score below it. Float32 scores are compared exactly."""
    positive_B = positive_B.astype(np.float64)
    limit_B = np.full(len(positive_B), np.inf)
    if rule.relative is not None:
        limit_B = positive_B - (1 - rule.relative) * np.abs(positive_B)
    if rule.absolute is not None:
        limit_B = np.minimum(limit_B, positive_B - rule.absolute)
    return limit_B


def choose(
    score_Bm: np.ndarray,
    index_Bm: np.ndarray,
    positive_B: np.ndarray,
    excluded: tuple[np.ndarray, np.ndarray],
    rule: NegativesRule,
) -> np.ndarray:
    """The negatives of B queries: int32 [B, count], best first, -1 behind the last.

    Args:
      score_Bm, index_Bm: ranked documents of each query; enough of them that `rule.search` are left
        without the excluded ones, or all there are.
      positive_B: lowest score of each query's own documents.
      excluded: (query number, document index) of each document that is no candidate.
    """
    most = int(max(index_Bm.max(initial=0), excluded[1].max(initial=0))) + 1
    key_Bm = np.arange(len(index_Bm), dtype=np.int64)[:, None] * most + index_Bm
    candidate_Bm = ~np.isin(key_Bm, excluded[0].astype(np.int64) * most + excluded[1])
    rank_Bm = candidate_Bm.cumsum(axis=1) - 1
    in_range_Bm = (rank_Bm >= rule.skip) & (rank_Bm < rule.search)
    taken_Bm = candidate_Bm & in_range_Bm & (score_Bm < score_limit(rule, positive_B)[:, None])
    place_Bm = taken_Bm.cumsum(axis=1) - 1
    taken_Bm &= place_Bm < rule.count
    chosen = np.full((len(index_Bm), rule.count), -1, np.int32)
    row, column = np.nonzero(taken_Bm)
    chosen[row, place_Bm[row, column]] = index_Bm[row, column]
    return chosen


def excluded_documents(texts: PairTexts) -> tuple[np.ndarray, np.ndarray]:
    """(query row, document row), sorted: each query's own documents, and itself as a document."""
    found = set(zip(texts.queries.row.tolist(), texts.documents.row.tolist(), strict=True))
    document_of = {normal_form(text): row for row, text in enumerate(texts.documents.texts)}
    for query, text in enumerate(texts.queries.texts):
        if (document := document_of.get(normal_form(text))) is not None:
            found.add((query, document))
    pairs = np.array(sorted(found), np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


@dataclasses.dataclass(frozen=True)
class Mined:
    """document_QN: int32 [Q, count] rows of the negatives, -1 behind the last. score_QN: theirs.
    positive_Q: lowest score of the query's own documents.
    """

    document_QN: np.ndarray
    score_QN: np.ndarray
    positive_Q: np.ndarray


def mine_group(
    folder: Path,
    texts: PairTexts,
    embedding: Embedding,
    rule: NegativesRule,
    mesh: jax.sharding.Mesh | None = None,
) -> Mined:
    """Negatives of every distinct query of a group; what `folder` has already is kept."""
    queries, documents = embedding.embed(folder, texts)
    sources = [dataclasses.asdict(rule), queries.about, documents.about]
    by_query = np.argsort(texts.queries.row, kind="stable")
    pair_query = texts.queries.row[by_query]
    excluded_query, excluded_row = excluded_documents(texts)
    parts = []
    with progress_bar(len(queries), " queries") as bar:
        for begin in range(0, len(queries), QUERIES_AT_ONCE):
            end = min(begin + QUERIES_AT_ONCE, len(queries))
            path = folder / f"negatives-{begin // QUERIES_AT_ONCE:05d}.npz"
            made_of = json.dumps([*sources, begin], sort_keys=True)
            part = _stored(path, made_of)
            if part is None:
                query_ND = queries[begin:end].astype(np.float32, copy=False)
                own = by_query[slice(*np.searchsorted(pair_query, [begin, end]))]
                own_query, own_row = texts.queries.row[own] - begin, texts.documents.row[own]
                positive_Q = np.full(end - begin, np.inf, np.float32)
                scores = pair_scores(query_ND, documents, own_query, own_row)
                np.minimum.at(positive_Q, own_query, scores)
                here = slice(*np.searchsorted(excluded_query, [begin, end]))
                excluded = excluded_query[here] - begin, excluded_row[here]
                part = _mine(query_ND, documents, positive_Q, excluded, rule, mesh)
                with written_whole(path) as file:
                    np.savez(file, made_of=made_of, **dataclasses.asdict(part))
            parts.append(part)
            bar.update(end - begin)
    return Mined(
        *(
            np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(Mined)
        )
    )


def _mine(query_ND, documents, positive_Q, excluded, rule: NegativesRule, mesh) -> Mined:
    # As many more as any query of this part may lose; in steps, for few compilations.
    lost = int(np.bincount(excluded[0], minlength=1).max())
    k = rule.search + -(-lost // 16) * 16
    score_Qm, index_Qm = top_k(query_ND, documents, k, mesh)
    document_QN = choose(score_Qm, index_Qm, positive_Q, excluded, rule)
    score_QN = np.full(document_QN.shape, -np.inf, np.float32)
    query, place = np.nonzero(document_QN >= 0)
    # Where each chosen document stands in its query's ranking.
    at = (index_Qm[query] == document_QN[query, place][:, None]).argmax(axis=1)
    score_QN[query, place] = score_Qm[query, at]
    return Mined(document_QN, score_QN, positive_Q)


def _stored(path: Path, made_of: str) -> Mined | None:
    stored = read_cache(path, made_of, [field.name for field in dataclasses.fields(Mined)])
    return None if stored is None else Mined(*stored)


class NegativeMining(Curation):
    """Replaces the negatives of every pair of a prepared folder; each pair is kept, in its place.

    Where fewer than `rule.count` are found, the pair has fewer, or none, and the report counts it.
    A unit is a source and language, since all of its documents are candidates.
    """

    kind = "mining"
    new_report = MiningReport

    def _places(self, start: int, stop: int, folder: Path) -> list[tuple[int, int, Path]]:
        return [(start, stop, folder)]

    def judge(self, unit: Unit) -> Judged:
        texts = read_texts(self.pairs, unit.start, unit.stop)
        mined = mine_group(unit.folder, texts, self.embedding, self.rule, self.mesh)
        own_P = own_scores(unit.folder, texts, self.embedding)
        found_Q = (mined.document_QN >= 0).sum(axis=1)
        counts = {
            "pairs": len(unit),
            "queries": len(found_Q),
            "documents": len(texts.documents.texts),
            "negatives": found_Q.sum(),
            "filled": (found_Q == self.rule.count).sum(),
            "short": ((found_Q > 0) & (found_Q < self.rule.count)).sum(),
            "empty": (found_Q == 0).sum(),
        }
        return Judged(
            np.ones(len(unit), bool),
            _rows_with_negatives(self.pairs, unit.start, unit.stop, texts, mined, own_P),
            {name: int(count) for name, count in counts.items()},
            _examples(texts, mined),
        )


def own_scores(folder: Path, texts: PairTexts, embedding: Embedding) -> np.ndarray:
    """float32 [P]: the teacher's score of each pair."""
    queries, documents = embedding.embed(folder, texts)
    own_P = np.zeros(len(texts.queries.row), np.float32)
    by_query = np.argsort(texts.queries.row, kind="stable")
    for begin in range(0, len(queries), QUERIES_AT_ONCE):
        query_ND = queries[begin : begin + QUERIES_AT_ONCE].astype(np.float32, copy=False)
        ends = np.searchsorted(texts.queries.row[by_query], [begin, begin + QUERIES_AT_ONCE])
        pairs = by_query[slice(*ends)]
        own_P[pairs] = pair_scores(
            query_ND, documents, texts.queries.row[pairs] - begin, texts.documents.row[pairs]
        )
    return own_P


def _rows_with_negatives(
    pairs: PairFolder, start: int, stop: int, texts: PairTexts, mined: Mined, own_P: np.ndarray
) -> Iterator[PairRow]:
    for begin in range(start, stop, READ_AT_ONCE):
        rows = range(begin, min(begin + READ_AT_ONCE, stop))
        for number, row in zip(rows, pairs.read(rows), strict=True):
            chosen = mined.document_QN[texts.queries.row[number - start]]
            negatives = tuple(texts.documents.texts[i] for i in chosen[chosen >= 0])
            scores = mined.score_QN[texts.queries.row[number - start]][chosen >= 0]
            yield row._replace(
                negatives=negatives, scores=(float(own_P[number - start]), *scores.tolist())
            )


def _examples(texts: PairTexts, mined: Mined) -> list[Example]:
    """Queries evenly spread over the group, with one of their documents."""
    count = len(texts.queries.texts)
    _, first_pair = np.unique(texts.queries.row, return_index=True)
    examples = []
    for query in np.linspace(0, count - 1, min(EXAMPLES, count)).astype(int):
        own = texts.documents.row[first_pair[query]]
        chosen = mined.document_QN[query]
        others = [
            (texts.documents.texts[row], float(score))
            for row, score in zip(chosen, mined.score_QN[query], strict=True)
            if row >= 0
        ]
        examples.append(
            Example(
                texts.queries.texts[query],
                texts.documents.texts[own],
                float(mined.positive_Q[query]),
                others,
            )
        )
    return examples
