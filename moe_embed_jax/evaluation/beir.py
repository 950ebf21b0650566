"""Retrieval sets in BEIR's layout: corpus.jsonl, queries.jsonl and qrels.tsv, plain or .gz."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_embed_jax import storage
from moe_embed_jax.data.judgements import check_id, grade_of, id_of, is_number
from moe_embed_jax.data.text_files import read_json, read_lines, string_field, title_and_text
from moe_embed_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RetrievalSet:
    """Queries, documents and graded judgements; only queries with a relevant judgement are kept.

    `qrels[query id][document id]` is the grade, relevant if above 0. A grade may belong to a
    document that the corpus lacks: it can never be found but counts in the ideal ranking, as in
    trec_eval. The counts say what a loader left out or met.
    """

    name: str
    query_ids: list[str]
    queries: list[str]
    document_ids: list[str]
    documents: list[str]
    qrels: dict[str, dict[str, int]]
    unjudged_queries: int = 0  # without a relevant judgement: left out
    unknown_queries: int = 0  # judged, but not in queries.jsonl: left out
    unknown_documents: int = 0  # judgements of kept queries naming a document not in the corpus
    repeated_documents: int = 0  # lines of the corpus replaced by a later one of the same id

    def __post_init__(self):
        if not self.queries or not self.documents:
            raise ValueError(
                f"retrieval set '{self.name}' has {len(self.queries)} queries and "
                f"{len(self.documents)} documents: both are needed"
            )

    def oddities(self) -> str:
        """What was left out or met while loading, in one line; empty if nothing."""
        counts = {
            "queries without a relevant document (left out)": self.unjudged_queries,
            "judged queries that do not exist (left out)": self.unknown_queries,
            "judged documents that do not exist (never found)": self.unknown_documents,
            "repeated document ids (the last one stays)": self.repeated_documents,
        }
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def load_beir(folder: str | Path, name: str | None = None) -> RetrievalSet:
    """Loads a BEIR-like folder.

    corpus.jsonl: objects with `_id`, `text` and optionally `title`, joined by a space; an empty
    text is allowed. queries.jsonl: objects with `_id` and `text`; a title is not read. qrels.tsv or
    qrels/test.tsv: query id, document id and an integer grade, separated by tabs, with or without a
    header line. Ids are texts or whole numbers, see `data.judgements`. Each may end in .gz. `name`
    defaults to the folder's name. Public sets repeat a document id now and then: the last one
    stays, as in BEIR's loader, unless the texts differ and a judgement could mean either.

    Raises `UserError`, one line naming file, line, field and fault.
    """
    files = find_files(folder)
    corpus: dict[str, str] = {}
    repeated, differing = 0, []
    for where, identity, text in read_records(files.corpus):
        repeated += identity in corpus
        if corpus.setdefault(identity, text) != text:
            differing.append((identity, where))
            corpus[identity] = text
    questions = load_questions(files)
    meant = questions.judged_documents()
    for identity, where in differing:
        if identity in meant:
            raise repeated_id(where, identity)
    kept = questions.qrels
    return RetrievalSet(
        name=name or unique_names([folder])[0],
        query_ids=list(kept),
        queries=list(questions.queries.values()),
        document_ids=list(corpus),
        documents=list(corpus.values()),
        qrels=kept,
        unjudged_queries=questions.unjudged,
        unknown_queries=questions.unknown,
        unknown_documents=sum(d not in corpus for grades in kept.values() for d in grades),
        repeated_documents=repeated,
    )


@dataclasses.dataclass(frozen=True)
class BeirFiles:
    corpus: Path
    queries: Path
    qrels: Path


def find_files(folder: str | Path, split: str = "test") -> BeirFiles:
    """The files of a BEIR-like folder; qrels.tsv, or else the split's.

    Raises `UserError`: no folder, or one of the files is missing.
    """
    folder = storage.path(folder)
    if not folder.is_dir():
        fault = "is not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {fault}; expected a folder with corpus.jsonl, queries.jsonl")
    return BeirFiles(
        corpus=_find(folder, ("corpus.jsonl",)),
        queries=_find(folder, ("queries.jsonl",)),
        qrels=_find(folder, ("qrels.tsv", f"qrels/{split}.tsv")),
    )


@dataclasses.dataclass(frozen=True)
class Questions:
    """Queries with a relevant judgement, id -> text, and their judgements, in the same order.

    unjudged: queries without one. unknown: judged queries that do not exist. Both are left out.
    """

    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    unjudged: int
    unknown: int

    def judged_documents(self) -> set[str]:
        return {document_id for grades in self.qrels.values() for document_id in grades}


def load_questions(files: BeirFiles) -> Questions:
    """The queries and judgements of a folder; raises as `load_beir` does."""
    queries: dict[str, str] = {}
    for where, identity, text in read_records(files.queries, with_title=False):
        if queries.setdefault(identity, text) != text:
            raise UserError(
                f"{where}: field '_id' repeats {identity!r:.60} with another text: keep one"
            )
    return judged_questions(queries, _read_qrels(files.qrels, queries), files.queries, files.qrels)


def judged_questions(
    queries: dict[str, str], judged: dict[str, dict[str, int]], query_file: Path, qrels_file: Path
) -> Questions:
    """What of `queries` has a relevant judgement; `UserError` if nothing has."""
    kept = {
        query_id: judged[query_id]
        for query_id in queries
        if any(grade > 0 for grade in judged.get(query_id, {}).values())
    }
    if not kept:
        raise UserError(f"{qrels_file}: no query of {query_file.name} has a relevant document")
    return Questions(
        queries={query_id: queries[query_id] for query_id in kept},
        qrels=kept,
        unjudged=len(queries) - len(kept),
        unknown=sum(query_id not in queries for query_id in judged),
    )


def repeated_id(where: str, identity: str) -> UserError:
    """The error of a judged document with two texts, to be raised."""
    return UserError(
        f"{where}: id {identity!r:.60} repeats with another text, and it is judged: keep one"
    )


def unique_names(folders: Sequence[str | Path]) -> list[str]:
    """For each folder the shortest end of its path that no other folder shares.

    Raises `UserError` for no folder at all and for the same folder twice.
    """
    if not folders:
        raise UserError("no folder of a retrieval set was named")
    # Also of a bucket: what matters is that equal folders have equal parts.
    parts = [os.path.normpath(storage.path(f).absolute()).split("/") for f in folders]
    if repeated := [folder for folder, p in zip(folders, parts, strict=True) if parts.count(p) > 1]:
        raise UserError(f"{repeated[0]}: the same folder was named twice")
    names = []
    for mine in parts:
        ends = range(1, len(mine) + 1)
        shortest = next(n for n in ends if sum(p[-n:] == mine[-n:] for p in parts) == 1)
        names.append("/".join(mine[-shortest:]))
    return names


def _find(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of the files, each plain before .gz."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if storage.has_entry(path):
                return path
    raise UserError(f"{folder}: no {' or '.join(names)}, neither plain nor .gz")


def read_records(
    path: Path, id_field: str = "_id", with_title: bool = True
) -> Iterator[tuple[str, str, str]]:
    """Yields (`file:line`, id, text, after its title if asked for) of a JSONL file, line by line.

    Blank lines are skipped. Raises `UserError`: a bad line, or no line at all.
    """
    is_empty = True
    for where, record in read_json(path):
        is_empty = False
        read = title_and_text if with_title else _text
        yield where, _identity(record, id_field, where), read(record, where)
    if is_empty:
        raise UserError(f"{path}: empty file, expected one JSON object per line")


def _text(record: dict, where: str) -> str:
    return string_field(record, "text", where).strip()


def _identity(record: dict, field: str, where: str) -> str:
    if not isinstance(record, dict) or field not in record:
        string_field(record, field, where)  # says what is wrong
    try:
        return id_of(record[field])
    except ValueError as error:
        raise UserError(f"{where}: field '{field}' {error}") from None


def _read_qrels(path: Path, queries: dict[str, str]) -> dict[str, dict[str, int]]:
    judged: dict[str, dict[str, int]] = {}
    for where, is_first, (query_id, document_id, score) in _qrels_rows(path):
        # The header, whatever it is called.
        if is_first and not is_number(score) and query_id not in queries:
            continue
        add_judgement(judged, query_id, document_id, score, where)
    if not judged:
        raise UserError(f"{path}: empty file, expected query-id, corpus-id and score per line")
    return judged


def add_judgement(
    judged: dict[str, dict[str, int]], query_id: str, document_id: str, score: str, where: str
) -> None:
    """Adds a judgement; `UserError` for a bad id or grade, and if the pair has another grade."""
    for name, read, value in (
        ("query-id", check_id, query_id),
        ("corpus-id", check_id, document_id),
        ("score", grade_of, score),
    ):
        try:
            grade = read(value)
        except ValueError as error:
            raise UserError(f"{where}: field '{name}' {error}") from None
    grades = judged.setdefault(query_id, {})
    if grades.setdefault(document_id, grade) != grade:
        raise UserError(
            f"{where}: query {query_id!r:.60} and document {document_id!r:.60} were judged "
            f"{grades[document_id]} before, now {grade}"
        )


def _qrels_rows(path: Path) -> Iterator[tuple[str, bool, list[str]]]:
    is_first = True
    for number, line in read_lines(path):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != 3:
            raise UserError(
                f"{path}:{number}: expected 3 fields separated by tabs "
                f"(query-id, corpus-id, score), got {len(fields)}"
            )
        yield f"{path}:{number}", is_first, fields
        is_first = False
