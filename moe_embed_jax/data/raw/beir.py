"""BEIR folders as pairs: every judgement above 0 is a pair, those of 0 are negatives of its query.

    corpus.jsonl[.gz]   {"_id", "title", "text"}
    queries.jsonl[.gz]  {"_id", "text"}
    qrels/train.tsv, or qrels.tsv[.gz]: query id, corpus id, score

Only the judged texts are kept in memory, not the corpus.
"""

from collections.abc import Iterator

from apache_beam.io.filesystems import FileSystems

from moe_embed_jax.data.raw.layouts import BadField, Texts, passage, text_of
from moe_embed_jax.data.raw.records import MAX_RAW, Bad, Good, lines, records, row_language
from moe_embed_jax.data.raw.sources import Part, Source


def read_folder(source: Source, part: Part) -> Iterator[Good | Bad]:
    """The pairs in the order of the qrels; bad lines of any of the files."""
    qrels = _find(
        part.path,
        f"qrels/{source.qrels}.tsv",
        f"qrels/{source.qrels}.tsv.gz",
        "qrels.tsv",
        "qrels.tsv.gz",
    )
    corpus = _find(part.path, "corpus.jsonl", "corpus.jsonl.gz")
    queries = _find(part.path, "queries.jsonl", "queries.jsonl.gz")
    for name, found in (("qrels", qrels), ("corpus", corpus), ("queries", queries)):
        if not found:
            yield Bad(part.path, 0, "", f"the folder has no {name} file", "")
    if not (qrels and corpus and queries):
        return
    judgements = []
    for judgement in _judgements(qrels):
        if isinstance(judgement, Bad):
            yield judgement
        else:
            judgements.append(judgement)
    documents: dict[str, str] = {}
    wanted = {document for _, _, document, _ in judgements}
    yield from _texts(corpus, wanted, passage, documents)
    texts: dict[str, tuple[str, str]] = {}
    wanted = {query for _, query, _, _ in judgements}
    yield from _texts(queries, wanted, lambda r: _query(source, part, r), texts)
    negatives: dict[str, list[str]] = {}
    for _, query, document, score in judgements:
        if score <= 0 and document in documents:
            negatives.setdefault(query, []).append(documents[document])
    for number, query, document, score in judgements:
        if score <= 0:
            continue
        raw = f"{query}\t{document}\t{score}"
        if query not in texts:
            yield Bad(qrels, number, "query-id", f"{query!r:.60} is not in {queries}", raw)
        elif document not in documents:
            yield Bad(qrels, number, "corpus-id", f"{document!r:.60} is not in {corpus}", raw)
        else:
            text, language = texts[query]
            found = tuple(negatives.get(query, ()))
            yield Good(number, Texts(text, documents[document], found), language)


def _query(source: Source, part: Part, record: dict) -> tuple[str, str]:
    return text_of(record, "text"), row_language(source, part, record)


def _find(folder: str, *names: str) -> str:
    return next((f"{folder}/{n}" for n in names if FileSystems.exists(f"{folder}/{n}")), "")


def _judgements(path: str) -> Iterator[tuple[int, str, str, int] | Bad]:
    for line in lines(path):
        if isinstance(line, Bad):
            yield line
            continue
        number, raw = line
        text = raw.decode("utf-8", errors="replace")
        cells = text.split("\t")
        if number == 1 and cells[0] in ("query-id", "qid", "query_id"):
            continue
        try:
            query, document, score = cells
            yield number, query, document, int(score)
        except ValueError:
            problem = "must be query id, corpus id and a whole number, with tabs between"
            yield Bad(path, number, "", problem, text[:MAX_RAW])


def _texts(path: str, wanted: set[str], read, found: dict) -> Iterator[Bad]:
    """Puts `read(record)` of the wanted ids into `found`; yields the bad lines."""
    for record in records(path):
        if isinstance(record, Bad):
            yield record
            continue
        number, value, raw = record
        try:
            identifier = text_of(value, "_id")
            if identifier in wanted:
                found[identifier] = read(value)
        except BadField as error:
            yield Bad(path, number, error.field, str(error), raw[:MAX_RAW])
