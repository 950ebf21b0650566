"""MIRACL (arXiv 2210.09984): questions about Wikipedia in 18 languages, corpora of up to 33
million passages."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from moe_embed_jax.data.text_files import read_lines, read_table
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.beir import Questions, add_judgement, judged_questions
from moe_embed_jax.evaluation.streamed_retrieval import evaluate_streamed
from moe_embed_jax.evaluation.subsets import (
    SubsetScores,
    Task,
    check_files,
    check_place,
    expand,
    find_subsets,
)
from moe_embed_jax.evaluation.text_vectors import TextVectors


@dataclasses.dataclass(frozen=True)
class Miracl(Task):
    """Files in the layout of the hub's `miracl/miracl` and `miracl/miracl-corpus`.

    topics: tables of query id and query, without a header. qrels: TREC's (query, Q0, passage,
    grade). corpus: JSON lines with docid, title and text in shards (`*`).
    """

    main_score = "ndcg_at_10"

    topics: str
    qrels: str
    corpus: str
    split: str = dataclasses.field(default="dev", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        for key in ("topics", "qrels", "corpus"):
            check_place(getattr(self, key), key)

    def files(self, root: Path) -> list[Path]:
        return check_files(
            path
            for topics, qrels, corpus in self._subsets(root)
            for path in (topics.path, qrels.path, *expand(corpus.path))
        )

    def evaluate(self, root: Path, vectors: TextVectors, label: str) -> Iterator[SubsetScores]:
        for topics, qrels, corpus in self._subsets(root):
            questions = load_topics(topics.path, qrels.path)
            shards = expand(corpus.path)
            name = f"{label} {topics.name}"
            scores = evaluate_streamed(vectors, questions, shards, "docid", name)
            yield SubsetScores(topics.name, (topics.language,), scores)

    def _subsets(self, root: Path):
        topics = find_subsets(root, self.topics, self.languages)
        named = {subset.name: subset.language for subset in topics}
        others = (find_subsets(root, path, named) for path in (self.qrels, self.corpus))
        return list(zip(topics, *others, strict=True))


def load_topics(topics: Path, qrels: Path) -> Questions:
    """Questions and their judgements; `UserError` for a bad line of either file."""
    queries: dict[str, str] = {}
    for where, (identity, query) in read_table(topics, ("query id", "query"), header=False):
        if queries.setdefault(identity, query) != query:
            raise UserError(f"{where}: query id {identity!r:.60} repeats with another text")
    judged: dict[str, dict[str, int]] = {}
    for number, line in read_lines(qrels):
        if not line.strip():
            continue
        where, fields = f"{qrels}:{number}", line.split()
        if len(fields) != 4:
            raise UserError(f"{where}: expected 4 fields (query, Q0, passage, grade): {line!r:.60}")
        query_id, _, document_id, grade = fields
        add_judgement(judged, query_id, document_id, grade, where)
    return judged_questions(queries, judged, topics, qrels)
