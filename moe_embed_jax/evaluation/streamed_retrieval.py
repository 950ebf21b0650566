"""Retrieval over corpora that do not fit into memory: read line by line, vectors on disk.

A corpus is a list of shards (files). Each is embedded into TensorStore, where it stays, and all of
them are searched exactly, in loads. Of the corpus 8 bytes per document are in memory: a hash of its
id, by which judgements find it. That two of 33 million documents share one by chance has a
probability of 3e-5; it would be reported as a repeated id.
"""

import dataclasses
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.beir import (
    Questions,
    find_files,
    load_questions,
    read_records,
    repeated_id,
)
from moe_embed_jax.evaluation.retrieval import CANDIDATES, Metrics, score_rankings
from moe_embed_jax.evaluation.subsets import Subset, SubsetScores, Task, find_subsets
from moe_embed_jax.evaluation.text_vectors import StoredRows, TextVectors, cut
from moe_embed_jax.search.knn import top_k
from moe_embed_jax.search.vectors import VectorStore, hash_texts

# Earlier documents of a repeated id are searched and then taken out, so each needs one more rank.
MOST_REPEATED = 1000


@dataclasses.dataclass(frozen=True)
class Retrieval(Task):
    """BEIR folders, of any size; see docs/evaluation.md. `split`: of qrels/SPLIT.tsv."""

    main_score = "ndcg_at_10"

    path: str
    languages: object = dataclasses.field(default="en", kw_only=True)

    def files(self, root: Path) -> list[Path]:
        found = (find_files(subset.path, self.split) for subset in self._subsets(root))
        return [path for f in found for path in (f.corpus, f.queries, f.qrels)]

    def evaluate(self, root: Path, vectors: TextVectors, label: str) -> Iterator[SubsetScores]:
        for subset in self._subsets(root):
            files = find_files(subset.path, self.split)
            scores = evaluate_streamed(
                vectors, load_questions(files), [files.corpus], "_id", f"{label} {subset.name}"
            )
            yield SubsetScores(subset.name, (subset.language,), scores)

    def _subsets(self, root: Path) -> list[Subset]:
        return find_subsets(root, self.path, self.languages)


@dataclasses.dataclass(frozen=True)
class Scan:
    """A shard that was read once: what its texts are (`hash_texts`), and a hash of every id."""

    texts: tuple[int, str]
    id_hash_N: np.ndarray


def evaluate_streamed(
    vectors: TextVectors,
    questions: Questions,
    shards: Sequence[Path],
    id_field: str,
    label: str,
) -> dict[int | None, Metrics]:
    """{width: metrics} as `retrieval.score_run` gives them, of a corpus in JSONL files.

    Shards that are embedded already are read once, for their hash, and not embedded again; a
    document whose id comes again later is left out, as in BEIR's loader.

    Raises `UserError`: a bad line, a judged id with two texts, too many repeated ids.
    """
    names = {id_hash(i): i for i in {*questions.judged_documents(), *questions.queries}}
    scans = [scan(shard, id_field) for shard in shards]
    id_hash_N = np.concatenate([each.id_hash_N for each in scans])
    replaced = repeated_rows(id_hash_N, names, questions, shards, id_field)
    stores = [
        _embedded(vectors, shard, each, id_field, f"{label} {shard.name}")
        for shard, each in zip(shards, scans, strict=True)
    ]
    query_BD = vectors.embed(list(questions.queries.values()), "query", f"{label} queries")
    documents = len(id_hash_N) - len(replaced)
    scores = {}
    for width in vectors.widths:
        _, index_Bk = top_k(
            cut(query_BD, width),
            StoredRows(stores, width),
            CANDIDATES + len(replaced),
            vectors.mesh,
        )
        rankings = {
            query_id: [
                names.get(found, str(found))
                for found in id_hash_N[index_k[~np.isin(index_k, replaced)]].tolist()
            ]
            for query_id, index_k in zip(questions.queries, index_Bk, strict=True)
        }
        metrics = score_rankings(questions.qrels, rankings)
        scores[width] = {**metrics, "queries": len(rankings), "documents": documents}
    return scores


def id_hash(identity: str) -> int:
    """64 bits of BLAKE2b."""
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def scan(shard: Path, id_field: str) -> Scan:
    """Reads a shard once, line by line."""
    hashes = array("Q")

    def texts():
        for _, identity, text in read_records(shard, id_field):
            hashes.append(id_hash(identity))
            yield text

    fingerprint = hash_texts(texts())
    return Scan(fingerprint, np.frombuffer(hashes, np.uint64))


def repeated_rows(
    id_hash_N: np.ndarray,
    names: dict[int, str],
    questions: Questions,
    shards: Sequence[Path],
    id_field: str,
) -> np.ndarray:
    """Rows whose id comes again later, int64.

    Raises `UserError` if one is judged and its texts differ, or they are many.
    """
    order = np.argsort(id_hash_N, kind="stable")
    is_again = id_hash_N[order[1:]] == id_hash_N[order[:-1]]
    replaced = order[:-1][is_again]
    judged = questions.judged_documents()
    meant = {names.get(found) for found in id_hash_N[replaced].tolist()} & judged
    _check_equal(shards, id_field, meant)
    where = shards[0] if len(shards) == 1 else f"{shards[0]} to {shards[-1].name}"
    if len(replaced) > MOST_REPEATED:
        raise UserError(f"{where}: {len(replaced):,} documents have an id that comes again")
    return replaced


def _check_equal(shards: Sequence[Path], id_field: str, identities: set[str]) -> None:
    """Reads the corpus again if need be; raises `UserError` for an id with two texts."""
    texts: dict[str, str] = {}
    for shard in shards if identities else ():
        for where, identity, text in read_records(shard, id_field):
            if identity in identities and texts.setdefault(identity, text) != text:
                raise repeated_id(where, identity)


def _embedded(
    vectors: TextVectors, shard: Path, each: Scan, id_field: str, label: str
) -> VectorStore:
    def texts() -> Iterator[str]:
        return (text for _, _, text in read_records(shard, id_field))

    return vectors.stream(texts, "document", each.texts, label)
