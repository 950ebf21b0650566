"""The layouts of raw records: which fields are the query, the document and the negatives.

    pairs     {"query": ..., "document": ...}
    triplets  the same and "negatives": a list of texts, or one text
    texts     {"text": ...}: a text alone, for masked language modelling: a pair without a query
    mc4       {"text": page}: its first line -> the rest (mC4, arXiv 2010.11934)
    ccnews    {"title": ..., "text": ...}: title -> text
    flagembedding  {"query": ..., "pos": [...], "neg": [...]}: a pair for every positive; "neg" may
              be missing; "pos_scores" and "neg_scores", where both are there, are the scores of a
              teacher; other fields (prompt, id) are not read
    scored    {"query": ..., "documents": [...], "scores": [...]}: the first document is the answer,
              of the others some are taken as negatives, see `scored.choose`
    scored_tables  the same in three tables, see `scored`
    miracl    {"query": ..., "positive_passages": [...], "negative_passages": [...]}, passages with
              "title" and "text" (arXiv 2210.09984): a pair for every positive passage
    beir      a folder with corpus, queries and qrels (see `beir`)

A record of a text file (.txt) is {"text": document}: what stands between blank lines, as in CC100.

A null is a field that is not there, as columnar files must write it: no title, no negatives; in a
list of texts or passages it is skipped.

The reader of a layout turns one record (a dict) into pairs, or raises `BadField`.
"""

import dataclasses
import math
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
    """What a record gives: one pair with its negatives; of a text alone the query is empty.

    scores: as of `PairRow`.
    """

    query: str
    document: str
    negatives: tuple[str, ...]
    scores: tuple[float, ...] = ()


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
    pairs = [Texts(query, document, negatives) for document in positives]
    names = fields["positive_scores"], fields["negative_scores"]
    if any(record.get(score_name) is None for score_name in names):
        return pairs
    positive_scores, negative_scores = (
        score_list(record, score_name, text_name)
        for score_name, text_name in zip(names, (name, fields["negatives"]), strict=True)
    )
    return [
        pair._replace(scores=(score, *negative_scores))
        for pair, score in zip(pairs, positive_scores, strict=True)
    ]


def score_list(record: dict, name: str, texts_name: str) -> tuple[float, ...]:
    """A score for each text of another field; NaN for null. A text that is null has none."""
    texts, scores = record.get(texts_name), record.get(name)
    texts = texts if isinstance(texts, list) else [] if texts is None else [texts]
    scores = scores if isinstance(scores, list) else [scores]
    if len(scores) != len(texts):
        raise BadField(name, f"has {len(scores)} scores of the {len(texts)} of {texts_name}")
    for i, score in enumerate(scores):
        if score is not None and (not isinstance(score, int | float) or isinstance(score, bool)):
            raise BadField(f"{name}[{i}]", f"must be a number, got {score!r:.40}")
    return tuple(
        math.nan if score is None else float(score)
        for score, text in zip(scores, texts, strict=True)
        if text is not None
    )


def _scored(record: dict, fields: dict[str, str]) -> list[Texts]:
    query, name = text_of(record, fields["query"]), fields["documents"]
    if name not in record or fields["scores"] not in record:
        text_of(record, name if name not in record else fields["scores"])
    documents = _text_list(record[name], name)
    if not documents:
        raise BadField(name, "is empty")
    scores = score_list(record, fields["scores"], name)
    return [Texts(query, documents[0], documents[1:], scores)]


def with_usable_negatives(texts: Texts, positives: Iterable[str]) -> tuple[Texts, int]:
    """`texts` with the negatives that say something, and how many do not.

    One that is in `normal_form` equal to the query, to one of its positives or to an earlier
    negative teaches nothing, or something wrong.
    """
    known = {normal_form(texts.query), *map(normal_form, positives)}
    kept = []
    for place, text in enumerate(texts.negatives):
        form = normal_form(text)
        if form not in known:
            kept.append(place)
        known.add(form)
    return with_negatives(texts, kept), len(texts.negatives) - len(kept)


def with_negatives(texts: Texts, places: Iterable[int]) -> Texts:
    """`texts` with those of its negatives, and their scores."""
    places = list(places)
    scores = texts.scores and (texts.scores[0], *(texts.scores[1 + i] for i in places))
    return texts._replace(negatives=tuple(texts.negatives[i] for i in places), scores=scores)


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
        {
            "query": "query",
            "positives": "pos",
            "negatives": "neg",
            "positive_scores": "pos_scores",
            "negative_scores": "neg_scores",
        },
        _flagembedding,
    ),
    "scored": Layout({"query": "query", "documents": "documents", "scores": "scores"}, _scored),
    "miracl": Layout(
        {"query": "query", "positives": "positive_passages", "negatives": "negative_passages"},
        _miracl,
    ),
    # Read as folders.
    "beir": Layout({}, lambda record, fields: []),
    "scored_tables": Layout({}, lambda record, fields: []),
}
