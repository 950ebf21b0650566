"""Retrieval metrics of embeddings over BEIR-like sets, one by one or many small ones at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import ir_measures
import numpy as np
from ir_measures import RR, R, nDCG

from moe_embed_jax.evaluation.beir import RetrievalSet
from moe_embed_jax.search import FLOAT32

if TYPE_CHECKING:
    import jax

Encode = Callable[[list[str]], np.ndarray]  # n texts -> [n, D]
Metrics = dict[str, float]  # ndcg_at_10, recall_at_100, mrr_at_10, queries, documents

DEPTH = 100  # of the ranking that is judged
CANDIDATES = DEPTH + 1  # to ask of a search: one of them may be the query itself
METRICS = ("ndcg_at_10", "recall_at_100", "mrr_at_10")


def evaluate_retrieval(
    encode_queries: Encode,
    encode_documents: Encode,
    retrieval_set: RetrievalSet,
    mesh: "jax.sharding.Mesh | None" = None,
) -> Metrics:
    """Metrics of one set by exact inner-product search; see `score_run` for what they are.

    `encode_queries` and `encode_documents` each turn a list of texts into [n, D] vectors and are
    called once; `mesh` spreads the search.
    """
    sets = {retrieval_set.name: retrieval_set}
    return evaluate_many(encode_queries, encode_documents, sets, mesh)[retrieval_set.name]


def evaluate_many(
    encode_queries: Encode,
    encode_documents: Encode,
    retrieval_sets: Mapping[str, RetrievalSet],
    mesh: "jax.sharding.Mesh | None" = None,
    index: str = FLOAT32,
) -> dict[str, Metrics]:
    """Metrics of many small sets: {name: metrics}, in the order of `retrieval_sets`.

    The texts of all sets go to the encoders in one call per side, each different text once (the
    same English query is asked of every language); a query then meets only the documents of
    its set. All vectors are in host memory at once. `index`: the form in which documents are stored
    and searched, see `search.compressed.search_as`.
    """
    from moe_embed_jax.search.compressed import search_as  # here: BM25's are judged without it

    sets = list(retrieval_sets.values())
    queries = _encode_once(encode_queries, [s.queries for s in sets])
    documents = _encode_once(encode_documents, [s.documents for s in sets])
    results = {}
    for name, query_BD, document_ND in zip(retrieval_sets, queries, documents, strict=True):
        _, index_Bk = search_as(index, query_BD(), document_ND(), CANDIDATES, mesh)
        results[name] = score_run(retrieval_sets[name], index_Bk)
    return results


def score_run(retrieval_set: RetrievalSet, index_Bk: np.ndarray) -> Metrics:
    """Metrics of a ranking, by ir_measures (trec_eval), as means over the queries.

    ndcg_at_10 has linear gains and log2 discounts; recall_at_100 is the share of a query's
    relevant documents in its first 100; mrr_at_10 is the mean of 1 / rank of the first relevant
    document, 0 beyond rank 10. Besides those: the numbers of `queries` and `documents`.

    A document with the id of the query is taken out of the query's ranking, as BEIR does (in
    ArguAna and Quora the query itself is in the corpus), unless it is judged relevant: then the
    two merely share a numbering. Rank `CANDIDATES` documents, so that 100 remain.

    Args:
      index_Bk: document indices in `retrieval_set`, best first, without repetition; -1 where a
        query found fewer. The order is taken as it is: ties were broken by whoever ranked.

    Raises:
      ValueError: another number of rows than queries.
    """
    if len(index_Bk) != len(retrieval_set.queries):
        raise ValueError(
            f"ranking has {len(index_Bk)} rows, set '{retrieval_set.name}' has "
            f"{len(retrieval_set.queries)} queries"
        )
    ids = retrieval_set.document_ids
    rankings = {
        query_id: [ids[index] for index in index_k if index >= 0]
        for query_id, index_k in zip(retrieval_set.query_ids, index_Bk.tolist(), strict=True)
    }
    metrics = score_rankings(retrieval_set.qrels, rankings)
    return {**metrics, "queries": len(rankings), "documents": len(ids)}


def score_rankings(
    qrels: Mapping[str, Mapping[str, int]], rankings: Mapping[str, Sequence[str]]
) -> Metrics:
    """The metrics of `score_run` without its counts, of document ids per query id, best first."""
    run = {}
    # trec_eval sorts by score and breaks ties by document id; scores made of ranks leave it none.
    rank_scores = [float(score) for score in range(DEPTH, 0, -1)]
    for query_id, ranked in rankings.items():
        if qrels[query_id].get(query_id, 0) <= 0:
            ranked = [document_id for document_id in ranked if document_id != query_id]
        run[query_id] = dict(zip(ranked, rank_scores, strict=False))  # cut at DEPTH
    # trec_eval knows no cut-off for the reciprocal rank: ranks beyond 10 are cut off here.
    evaluator = ir_measures.pytrec_eval.evaluator([nDCG @ 10, R @ DEPTH, RR], qrels)
    total = dict.fromkeys(("nDCG", "R", "RR"), 0.0)
    for metric in evaluator.iter_calc(run):
        name = metric.measure.NAME
        if name != "RR" or metric.value > 1 / 10.5:
            total[name] += metric.value
    return {name: value / len(run) for name, value in zip(METRICS, total.values(), strict=True)}


def mean_over_languages(results: Mapping[str, Metrics]) -> dict[str, Metrics]:
    """Results of sets named `<set>/<language>` to one entry per `<set>`.

    Metrics are plain means over the languages, whatever their sizes; `queries` and `documents`
    are sums, `languages` counts.
    """
    groups: dict[str, list[Metrics]] = {}
    for name, metrics in results.items():
        groups.setdefault(name.rpartition("/")[0] or name, []).append(metrics)
    return {
        name: {
            **{metric: float(np.mean([m[metric] for m in group])) for metric in METRICS},
            "queries": sum(m["queries"] for m in group),
            "documents": sum(m["documents"] for m in group),
            "languages": len(group),
        }
        for name, group in groups.items()
    }


def _encode_once(
    encode: Encode, texts_of_sets: Sequence[list[str]]
) -> list[Callable[[], np.ndarray]]:
    """Encodes each different text once; one function per set gives the set's vectors."""
    row_of: dict[str, int] = {}
    rows_of_sets = [
        np.array([row_of.setdefault(text, len(row_of)) for text in texts], np.int64)
        for texts in texts_of_sets
    ]
    x_ND = np.asarray(encode(list(row_of)))
    if x_ND.ndim != 2 or len(x_ND) != len(row_of):
        raise ValueError(f"the encoder gave shape {x_ND.shape} for {len(row_of)} texts")
    return [lambda rows=rows: x_ND[rows] for rows in rows_of_sets]
