"""BEIR folders as pairs: each judgement above 0 is a pair, documents judged 0 are its negatives.

    corpus.jsonl[.gz]   {"_id", "title", "text"}
    queries.jsonl[.gz]  {"_id", "text"}
    qrels/train.tsv, or qrels.tsv[.gz]: query id, corpus id, score

An id is what evaluation takes, see `judgements`. The title of a query is not read, as in BEIR. A
row that repeats an id with the same text says nothing new. With another text it is a bad row, and
so is every judgement of that id. Only the judged texts are kept in memory, not the corpus.
"""

from collections.abc import Iterator
from typing import NamedTuple

from moe_embed_jax.data.judgements import check_id, grade_of, id_of, is_number
from moe_embed_jax.preparation.beam.formats import (
    BadField,
    Texts,
    passage,
    text_of,
    with_usable_negatives,
)
from moe_embed_jax.preparation.beam.read import (
    MAX_RAW,
    Bad,
    Good,
    exists,
    lines,
    records,
    row_language,
)
from moe_embed_jax.preparation.beam.sources import Part, Source


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
    judgements, header = [], None
    for judgement in _judgements(qrels):
        if isinstance(judgement, Bad):
            yield judgement
        elif judgement.grade is None:
            header = judgement
        else:
            judgements.append(judgement)
    documents = Found({j.document for j in judgements})
    yield from documents.read(corpus, passage)
    questions = Found({j.query for j in [*judgements, *filter(None, [header])]})
    yield from questions.read(
        queries, lambda record: (text_of(record, "text"), row_language(source, part, record))
    )
    if header and header.query in questions.values:
        problem = "the first line is a judgement, and its grade is no integer"
        yield Bad(qrels, header.line, "score", problem, header.raw)
    of_query: dict[str, tuple[list[str], list[str]]] = {}
    for judgement in judgements:
        if judgement.document in documents.values:
            positives, negatives = of_query.setdefault(judgement.query, ([], []))
            text = documents.values[judgement.document]
            (positives if judgement.grade > 0 else negatives).append(text)
    for line, query, document, grade, raw in judgements:
        if grade <= 0:
            continue
        if why := questions.missing(query, queries):
            yield Bad(qrels, line, "query-id", why, raw)
        elif why := documents.missing(document, corpus):
            yield Bad(qrels, line, "corpus-id", why, raw)
        else:
            text, language = questions.values[query]
            positives, negatives = of_query[query]
            pair = Texts(text, documents.values[document], tuple(negatives))
            yield Good(line, *with_usable_negatives(pair, positives), language)


def _find(folder: str, *names: str) -> str:
    return next((f"{folder}/{n}" for n in names if exists(f"{folder}/{n}")), "")


class _Judgement(NamedTuple):
    """A line of a qrels file; `grade` None: the first line, which seems to be a header."""

    line: int
    query: str
    document: str
    grade: int | None
    raw: str


def _judgements(path: str) -> Iterator[_Judgement | Bad]:
    is_first = True
    for line in lines(path):
        if isinstance(line, Bad):
            yield line
            continue
        number, raw = line
        if not raw.strip():
            continue
        field, shown = "", raw.decode("utf-8", errors="replace")[:MAX_RAW]
        try:
            cells = raw.decode("utf-8").split("\t")
            if len(cells) != 3:
                raise ValueError("must be query id, corpus id and a whole number, tabs between")
            if is_first and not is_number(cells[2]):
                yield _Judgement(number, cells[0], cells[1], None, shown)
                continue
            field = "query-id"
            check_id(cells[0])
            field = "corpus-id"
            check_id(cells[1])
            field = "score"
            yield _Judgement(number, cells[0], cells[1], grade_of(cells[2]), shown)
        except UnicodeDecodeError as error:
            yield Bad(path, number, "", f"bad UTF-8 at byte {error.start + 1} of the line", shown)
        except ValueError as error:
            yield Bad(path, number, field, str(error), shown)
        finally:
            is_first = False


class Found:
    """The texts of the wanted ids of a file.

    values: id -> what `read` makes of its record. Of ids with several texts there is none.
    """

    def __init__(self, wanted: set[str]):
        self.values: dict = {}
        self._wanted = wanted
        self._lines: dict[str, int] = {}
        self._several: set[str] = set()

    def read(self, path: str, read, key: str = "_id") -> Iterator[Bad]:
        """Yields the bad lines of a file; `key` is the field of its ids."""
        for record in records(path):
            if isinstance(record, Bad):
                yield record
                continue
            number, value, raw = record
            try:
                self._add(number, value, read, key)
            except BadField as error:
                yield Bad(path, number, error.field, str(error), raw[:MAX_RAW])
        for identity in self._several:
            self.values.pop(identity, None)

    def _add(self, number: int, record: dict, read, key: str) -> None:
        if key not in record:
            text_of(record, key)  # says which fields there are
        try:
            identity = id_of(record[key])
        except ValueError as error:
            raise BadField(key, str(error)) from None
        if identity not in self._wanted:
            return
        value = read(record)
        if self.values.setdefault(identity, value) != value:
            self._several.add(identity)
            first = self._lines[identity]
            raise BadField(key, f"repeats {identity!r:.60} of line {first} with another text")
        self._lines.setdefault(identity, number)

    def missing(self, identity: str, path: str) -> str:
        """Why an id has no value; "" if it has one."""
        if identity in self._several:
            return f"{identity!r:.60} has several texts in {path}"
        return "" if identity in self.values else f"{identity!r:.60} is not in {path}"
