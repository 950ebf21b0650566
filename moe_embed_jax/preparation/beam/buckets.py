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
    ends = np.cumsum(batch["negative_counts"])
    all_negatives = [text.decode("utf-8") for text in batch["negatives"]]
    negatives = [
        all_negatives[ends[row] - batch["negative_counts"][row] : ends[row]] for row in good
    ]
    zeros = np.zeros(len(good), np.int32)
    pairs = zip(texts["query"], texts["document"], strict=True)
    columns = {
        "key": [pair_key(query, document) for query, document in pairs],
        "part": np.full(len(good), part, np.int32),
        "number": first + good,
        **texts,
        "negatives": negatives,
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
    others. The counts are {"exact": {language: n}, "normalised": {language: n}}, by the language of
    the row that was removed.
    """
    order = [("key", "ascending"), ("part", "ascending"), ("number", "ascending")]
    table = table.sort_by(order)
    rows = table.num_rows
    keys = np.frombuffer(b"".join(table["key"].to_pylist()), "V16")
    is_first = np.ones(rows, bool)
    is_first[1:] = keys[1:] != keys[:-1]
    removed: dict[str, dict[str, int]] = {"exact": {}, "normalised": {}}
    firsts = np.flatnonzero(is_first)
    negatives: dict[int, dict[str, str]] = {}  # place of a first row -> normal form -> text
    for place in np.flatnonzero(~is_first).tolist():
        first = int(firsts[np.searchsorted(firsts, place, side="right") - 1])
        same = all(
            table[name][place].as_py() == table[name][first].as_py()
            for name in ("query", "document")
        )
        counts = removed["exact" if same else "normalised"]
        language = table["language"][place].as_py()
        counts[language] = counts.get(language, 0) + 1
        if first not in negatives:
            negatives[first] = {normal_form(t): t for t in table["negatives"][first].as_py()}
        for text in table["negatives"][place].as_py():
            negatives[first].setdefault(normal_form(text), text)
    if negatives:
        column = table["negatives"].to_pylist()
        for row, texts in negatives.items():
            column[row] = list(texts.values())
        index = table.schema.get_field_index("negatives")
        table = table.set_column(
            index, SCHEMA.field("negatives"), pa.array(column, SCHEMA.field("negatives").type)
        )
    table = table.take(pa.array(firsts))
    return table.sort_by([("language", "ascending"), ("key", "ascending")]), removed
