"""The layouts of raw records: which fields are the query, the document and the negatives.

    pairs     {"query": ..., "document": ...}
    triplets  the same and "negatives": a list of texts, or one text
    texts     {"text": ...}: a text alone, for masked language modelling: a pair without a query
    mc4       {"text": page}: its first line -> the rest (mC4, arXiv 2010.11934)
    ccnews    {"title": ..., "text": ...}: title -> text
    flagembedding  {"query": ..., "pos": [...], "neg": [...]}: a pair for every positive; "neg" may
              be missing, and other fields (pos_scores, neg_scores, prompt, id) are not read
    miracl    {"query": ..., "positive_passages": [...], "negative_passages": [...]}, passages with
              "title" and "text" (arXiv 2210.09984): a pair for every positive passage
    beir      a folder with corpus, queries and qrels (see `beir`)

A record of a text file (.txt) is {"text": document}: what stands between blank lines, as in CC100.

A null is a field that is not there, as columnar files must write it: no title, no negatives; in a
list of texts or passages it is skipped.

The reader of a layout turns one record (a dict) into pairs, or raises `BadField`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from moe_embed_jax.data.text_files import listed
from moe_embed_jax.pairs.normal_form import normal_form
from moe_embed_jax.tokenizers.vocabulary import clean_text


class BadField(ValueError):
    """`field` of a record is not what it must be; the message says why."""

    def __init__(self, field: str, why: str):
        super().__init__(why)
        self.field = field


class Texts(NamedTuple):
    """What a record gives: one pair with its negatives; of a text alone the query is empty."""

    query: str
    document: str
    negatives: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """`fields`: role -> the usual name of its field; `read(record, fields)` gives the pairs."""

    fields: dict[str, str]
    read: Callable[[dict, dict[str, str]], list[Texts]]


def text_of(record: dict, field: str) -> str:
    """The text of a field, stripped; lone surrogates become U+FFFD.

    Raises `BadField`: missing, no string, or nothing but white space.
    """
    if field not in record:
        raise BadField(field, f"is missing (fields: {listed(sorted(map(str, record)))})")
    return _clean(record[field], field)


def _clean(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadField(field, f"must be a string, got {value!r:.40}")
    text = clean_text(value).strip()
    if not text:
        raise BadField(field, "is empty")
    return text


def _pairs(record: dict, fields: dict[str, str]) -> list[Texts]:
    return [Texts(text_of(record, fields["query"]), text_of(record, fields["document"]), ())]


def _triplets(record: dict, fields: dict[str, str]) -> list[Texts]:
    query, document = text_of(record, fields["query"]), text_of(record, fields["document"])
    name = fields["negatives"]
    if name not in record:
        raise BadField(name, "is missing")
    return [Texts(query, document, _text_list(record[name], name))]


def _text_list(value: Any, name: str) -> tuple[str, ...]:
    """A list of texts, or one text, or null."""
    if not isinstance(value, list):
        return () if value is None else (_clean(value, name),)
    texts = ((i, text) for i, text in enumerate(value) if text is not None)
    return tuple(_clean(text, f"{name}[{i}]") for i, text in texts)


def _flagembedding(record: dict, fields: dict[str, str]) -> list[Texts]:
    query, name = text_of(record, fields["query"]), fields["positives"]
    if name not in record:
        text_of(record, name)  # says which fields there are
    positives = _text_list(record[name], name)
    if not positives:
        raise BadField(name, "is empty")
    negatives = _text_list(record.get(fields["negatives"]), fields["negatives"])
    return [Texts(query, document, negatives) for document in positives]


def usable_negatives(
    query: str, positives: Iterable[str], negatives: Iterable[str]
) -> tuple[tuple[str, ...], int]:
    """The negatives that say something, and how many do not.

    One that is in `normal_form` equal to the query, to one of its positives or to an earlier
    negative teaches nothing, or something wrong.
    """
    known = {normal_form(query), *map(normal_form, positives)}
    kept, count = [], 0
    for text in negatives:
        form = normal_form(text)
        if form not in known:
            kept.append(text)
        known.add(form)
        count += 1
    return tuple(kept), count - len(kept)


def _texts(record: dict, fields: dict[str, str]) -> list[Texts]:
    return [Texts("", text_of(record, fields["text"]), ())]


def _mc4(record: dict, fields: dict[str, str]) -> list[Texts]:
    page = text_of(record, fields["text"])
    first, _, rest = page.partition("\n")
    if not rest.strip():
        raise BadField(fields["text"], "has one line only: nothing is left for the document")
    return [Texts(first.strip(), rest.strip(), ())]


def _miracl(record: dict, fields: dict[str, str]) -> list[Texts]:
    query = text_of(record, fields["query"])
    positives = _passages(record, fields["positives"])
    if not positives:
        raise BadField(fields["positives"], "is empty")
    negatives = tuple(_passages(record, fields["negatives"]))
    return [Texts(query, document, negatives) for document in positives]


def _passages(record: dict, field: str) -> list[str]:
    if field not in record:
        text_of(record, field)  # says which fields there are
    value = [] if record[field] is None else record[field]
    if not isinstance(value, list):
        raise BadField(field, f"must be a list, got {value!r:.40}")
    entries = ((i, entry) for i, entry in enumerate(value) if entry is not None)
    return [passage(entry, f"{field}[{i}]") for i, entry in entries]


def passage(record: Any, field: str = "text") -> str:
    """Title and text of a passage, joined by a space; the title may be missing or empty."""
    if not isinstance(record, dict):
        raise BadField(field, f"must be an object with title and text, got {record!r:.40}")
    title, text = record.get("title"), record.get("text")
    title = "" if title is None else title
    if not isinstance(title, str):
        raise BadField(f"{field}.title", f"must be a string, got {title!r:.40}")
    if not isinstance(text, str):
        raise BadField(f"{field}.text", f"must be a string, got {text!r:.40}")
    return _clean(f"{title.strip()} {text.strip()}", field)


LAYOUTS = {
    "pairs": Layout({"query": "query", "document": "document"}, _pairs),
    "triplets": Layout(
        {"query": "query", "document": "document", "negatives": "negatives"}, _triplets
    ),
    "texts": Layout({"text": "text"}, _texts),
    "mc4": Layout({"text": "text"}, _mc4),
    "ccnews": Layout({"query": "title", "document": "text"}, _pairs),
    "flagembedding": Layout(
        {"query": "query", "positives": "pos", "negatives": "neg"}, _flagembedding
    ),
    "miracl": Layout(
        {"query": "query", "positives": "positive_passages", "negatives": "negative_passages"},
        _miracl,
    ),
    "beir": Layout({}, lambda record, fields: []),  # read as a folder, see `beir`
}
