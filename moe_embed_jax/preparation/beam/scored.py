"""Queries with documents that a teacher has scored: the pair, its negatives, and all their scores.

Of `scored` a row has the texts. `scored_tables` is a folder with three tables, each a file
(`scores.parquet`) or a folder of files (`scores/`), in any form that `records` reads:

    queries      {"query_id", "query"}
    documents    {"document_id", "document"}
    scores       {"query_id", "document_ids": [...], "scores": [...]}

as lightonai/embeddings-fine-tuning has them: the first document is the answer, the others were
mined. "text" is read where a table has no "query" or "document". Only the texts of chosen documents
are kept in memory.
"""

import math
import posixpath
from collections.abc import Iterator

from moe_embed_jax.data.judgements import id_of
from moe_embed_jax.preparation.beam.beir_folders import Found
from moe_embed_jax.preparation.beam.formats import (
    BadField,
    Texts,
    score_list,
    text_of,
    with_negatives,
    with_usable_negatives,
)
from moe_embed_jax.preparation.beam.read import MAX_RAW, Bad, Good, records, row_language
from moe_embed_jax.preparation.beam.sources import COLUMNAR, SUFFIXES, Part, Source, list_files

TABLES = ("queries", "documents", "scores")


def choose(texts: Texts, count: int, relative: float | None) -> Texts:
    """`texts` with the best `count` negatives, best first.

    Those that score `relative` times the answer's score or more are left out: they may be answers
    that nobody marked (NV-Retriever, arXiv 2407.15831; for an answer with a score s below 0 the
    limit is s - (1 - relative) |s|, as launch/mine.py has it). So are those without a score.
    """
    own, *scores = texts.scores
    limit = math.inf
    if relative is not None and not math.isnan(own):
        limit = own - (1 - relative) * abs(own)
    places = [i for i, score in enumerate(scores) if score < limit]
    return with_negatives(texts, sorted(places, key=lambda i: -scores[i])[:count])


def read_folder(source: Source, part: Part) -> Iterator[Good | Bad]:
    """The pairs in the order of the scores; bad rows of any of the tables."""
    files = {name: _find(part.path, name) for name in TABLES}
    for name, found in files.items():
        if not found:
            yield Bad(part.path, 0, "", f"the folder has no {name} table", "")
    if not all(files.values()):
        return
    chosen: list[tuple[str, int, str, str, Texts]] = []
    for path in files["scores"]:
        for record in records(path):
            if isinstance(record, Bad):
                yield record
                continue
            line, value, raw = record
            try:
                ids = _scored_ids(value)
            except BadField as error:
                yield Bad(path, line, error.field, str(error), raw[:MAX_RAW])
                continue
            chosen.append(
                (path, line, raw[:MAX_RAW], ids.query, choose(ids, source.count, source.relative))
            )
    documents = Found({i for *_, ids in chosen for i in (ids.document, *ids.negatives)})
    for path in files["documents"]:
        yield from documents.read(path, lambda r: _text(r, "document"), "document_id")
    queries = Found({query for *_, query, _ in chosen})
    for path in files["queries"]:
        yield from queries.read(
            path, lambda r: (_text(r, "query"), row_language(source, part, r)), "query_id"
        )
    for path, line, raw, query, ids in chosen:
        where = f"the {TABLES[1]} of {part.path}"
        if why := queries.missing(query, f"the {TABLES[0]} of {part.path}"):
            yield Bad(path, line, "query_id", why, raw)
            continue
        if missing := next(
            filter(None, (documents.missing(i, where) for i in (ids.document, *ids.negatives))), ""
        ):
            yield Bad(path, line, "document_ids", missing, raw)
            continue
        text, language = queries.values[query]
        document, *negatives = (documents.values[i] for i in (ids.document, *ids.negatives))
        pair = Texts(text, document, tuple(negatives), ids.scores)
        yield Good(line, *with_usable_negatives(pair, [document]), language)


def _find(folder: str, name: str) -> list[str]:
    paths = [path for path, _ in list_files(f"{folder}/**")]
    known = [path for path in paths if path.endswith((*SUFFIXES, *COLUMNAR))]
    inside = [path.removeprefix(folder).lstrip("/") for path in known]
    return sorted(
        path
        for path, rest in zip(known, inside, strict=True)
        if rest.startswith(f"{name}/") or posixpath.basename(rest).partition(".")[0] == name
    )


def _text(record: dict, name: str) -> str:
    return text_of(record, name if name in record or "text" not in record else "text")


def _scored_ids(record: dict) -> Texts:
    """Ids in place of texts: of the query, the answer and the other documents; and the scores."""
    for name in ("query_id", "document_ids", "scores"):
        if name not in record:
            text_of(record, name)  # says which fields there are
    ids = record["document_ids"]
    if not isinstance(ids, list) or not ids:
        raise BadField("document_ids", f"must be a list of ids, got {ids!r:.40}")
    query = _identity(record["query_id"], "query_id")
    document, *others = (_identity(value, f"document_ids[{i}]") for i, value in enumerate(ids))
    return Texts(query, document, tuple(others), score_list(record, "scores", "document_ids"))


def _identity(value: object, field: str) -> str:
    try:
        return id_of(value)
    except ValueError as error:
        raise BadField(field, str(error)) from None
