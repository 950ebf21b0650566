"""Tables of pairs between the stages of the pipeline: keys, buckets, duplicates.

A pair's key is a hash of its normalised query and document. Rows are spread over buckets by ranges
of the key, so that duplicates meet, and buckets in order are rows in the order of their keys: an
order that depends on the texts alone, and not on files, workers or bundles.
"""

import hashlib

import numpy as np
import pyarrow as pa

from moe_embed_jax.pairs.normal_form import normal_form

SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("part", pa.int32()),
        ("number", pa.int64()),  # in its part: with `part` the place in the input
        ("language", pa.string()),
        ("query", pa.string()),
        ("document", pa.string()),
        ("negatives", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),  # as of `PairRow`
        ("query_tokens", pa.int32()),
        ("document_tokens", pa.int32()),
    ]
)


def pair_key(query: str, document: str) -> bytes:
    """16 bytes, equal for pairs that are equal in `normal_form`."""
    text = f"{normal_form(query)}\0{normal_form(document)}"
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def piece(batch: dict[str, np.ndarray], part: int, first: int) -> pa.Table:
    """The pairs among the rows of `task.read_shard`'s batch.

    `first`: the number of the batch's first row in its part.
    """
    good = np.flatnonzero(batch["problem"] == b"")
    texts = {
        name: [text.decode("utf-8") for text in batch[name][good]]
        for name in ("query", "document", "language")
    }
    all_negatives = [text.decode("utf-8") for text in batch["negatives"]]
    negatives, scores = (
        [values[end - count : end] for end, count in zip(np.cumsum(counts), counts, strict=True)]
        for values, counts in (
            (all_negatives, batch["negative_counts"]),
            (batch["scores"].tolist(), batch["score_counts"]),
        )
    )
    zeros = np.zeros(len(good), np.int32)
    pairs = zip(texts["query"], texts["document"], strict=True)
    columns = {
        "key": [pair_key(query, document) for query, document in pairs],
        "part": np.full(len(good), part, np.int32),
        "number": first + good,
        **texts,
        "negatives": [negatives[row] for row in good],
        "scores": [scores[row] for row in good],
        **{
            name: batch[name][good].astype(np.int32) if name in batch else zeros
            for name in ("query_tokens", "document_tokens")
        },
    }
    return pa.table(columns, schema=SCHEMA)


def buckets_of(table: pa.Table, buckets: int) -> np.ndarray:
    """int64 [rows]: the bucket of every row, a range of its key."""
    keys = b"".join(table["key"].to_pylist())
    head = np.frombuffer(keys, ">u4").reshape(-1, 4)[:, 0].astype(np.uint64)
    return ((head * np.uint64(buckets)) >> np.uint64(32)).astype(np.int64)


def to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_bytes(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def without_duplicates(table: pa.Table) -> tuple[pa.Table, dict[str, dict[str, int]]]:
    """The rows of a bucket by language and key, one of each key; what was removed, by language.

    Of duplicates the one that comes first in the input stays, and gets the negatives of the
    others, with their scores (NaN where a text has none). The counts are {"exact": {language: n},
    "normalised": {language: n}}, by the language of the row that was removed.
    """
    order = [("key", "ascending"), ("part", "ascending"), ("number", "ascending")]
    table = table.sort_by(order)
    rows = table.num_rows
    keys = np.frombuffer(b"".join(table["key"].to_pylist()), "V16")
    is_first = np.ones(rows, bool)
    is_first[1:] = keys[1:] != keys[:-1]
    removed: dict[str, dict[str, int]] = {"exact": {}, "normalised": {}}
    firsts = np.flatnonzero(is_first)
    # Place of a first row -> normal form -> text and score; the document's stands under None.
    merged: dict[int, dict[str | None, tuple[str, float]]] = {}
    for place in np.flatnonzero(~is_first).tolist():
        first = int(firsts[np.searchsorted(firsts, place, side="right") - 1])
        same = all(
            table[name][place].as_py() == table[name][first].as_py()
            for name in ("query", "document")
        )
        counts = removed["exact" if same else "normalised"]
        language = table["language"][place].as_py()
        counts[language] = counts.get(language, 0) + 1
        if first not in merged:
            merged[first] = _scored_texts(table, first)
        for form, entry in _scored_texts(table, place).items():
            known = merged[first].setdefault(form, entry)
            if np.isnan(known[1]):
                merged[first][form] = known[0], entry[1]
    if merged:
        columns = {name: table[name].to_pylist() for name in ("negatives", "scores")}
        for row, entries in merged.items():
            columns["negatives"][row] = [
                text for form, (text, _) in entries.items() if form is not None
            ]
            scores = [score for _, score in entries.values()]
            columns["scores"][row] = [] if np.isnan(scores).all() else scores
        for name, column in columns.items():
            field = SCHEMA.field(name)
            index = table.schema.get_field_index(name)
            table = table.set_column(index, field, pa.array(column, field.type))
    table = table.take(pa.array(firsts))
    return table.sort_by([("language", "ascending"), ("key", "ascending")]), removed


def _scored_texts(table: pa.Table, row: int) -> dict[str | None, tuple[str, float]]:
    """The document (under None) and the negatives (by normal form) of a row, with scores."""
    texts = table["negatives"][row].as_py()
    scores = table["scores"][row].as_py() or [np.nan] * (1 + len(texts))
    forms = [None, *map(normal_form, texts)]
    return dict(zip(forms, zip(["", *texts], scores, strict=True), strict=True))
