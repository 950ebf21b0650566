"""Cross-lingual retrieval: questions of any language, documents of any language."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.beir import RetrievalSet, load_beir
from moe_embed_jax.evaluation.retrieval import CANDIDATES, score_run
from moe_embed_jax.evaluation.streamed_retrieval import Retrieval
from moe_embed_jax.evaluation.subsets import SubsetScores, check_place
from moe_embed_jax.evaluation.text_vectors import TextVectors, cut
from moe_embed_jax.search.knn import top_k


@dataclasses.dataclass(frozen=True)
class CrossLingual(Retrieval):
    """A BEIR folder per language, with the same ids everywhere (as XQuAD has).

    Every language asks in every language; a subset is called QUERIES-DOCUMENTS (de-en).
    """

    languages: object = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check_place(self.path)

    def evaluate(self, root: Path, vectors: TextVectors, label: str) -> Iterator[SubsetScores]:
        subsets = {subset.name: subset for subset in self._subsets(root)}
        sets = {name: load_beir(subset.path, name) for name, subset in subsets.items()}
        queries, documents = {}, {}
        for name, each in sets.items():
            queries[name] = vectors.embed(each.queries, "query", f"{label} {name} queries")
            documents[name] = vectors.embed(each.documents, "document", f"{label} {name} documents")
        for asked in sets:
            for read in sets:
                mixed = across(sets[asked], sets[read], subsets[read].path)
                scores = {}
                for width in vectors.widths:
                    pair = cut(queries[asked], width), cut(documents[read], width)
                    _, index_Bk = top_k(*pair, CANDIDATES, vectors.mesh)
                    scores[width] = score_run(mixed, index_Bk)
                languages = subsets[asked].language, subsets[read].language
                yield SubsetScores(f"{asked}-{read}", languages, scores)


def across(asked: RetrievalSet, read: RetrievalSet, where: str) -> RetrievalSet:
    """The queries and judgements of one set over the documents of another.

    Raises `UserError` where a judged document is in the first set only: the ids are not the same.
    """
    there, here = set(read.document_ids), set(asked.document_ids)
    for grades in asked.qrels.values():
        if missing := [d for d in grades if d in here and d not in there]:
            raise UserError(
                f"{where}: corpus.jsonl has no document {missing[0]!r:.60}, which a query of "
                f"'{asked.name}' is about: the ids must be the same in all languages"
            )
    return RetrievalSet(
        f"{asked.name}-{read.name}",
        asked.query_ids,
        asked.queries,
        read.document_ids,
        read.documents,
        asked.qrels,
    )
