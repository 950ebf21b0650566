"""Rows for masked language modelling: documents of one language, cut and packed to a fixed length.

A pure function of (lengths of the documents, row length, seed). Nothing is lost: a row table covers
every token of every document once.
"""

import dataclasses

import numpy as np

from moe_embed_jax.data.packing import pack
from moe_embed_jax.data.schedule import Group
from moe_embed_jax.shapes import PADDING

TASK = "documents"  # of the groups of a row table: one per language
# Documents that are packed together, in random order: more would not fill rows better, and would
# put the longest ones of the language side by side.
WINDOW = 4096


@dataclasses.dataclass(frozen=True)
class RowTable:
    """Row r holds the pieces starts[r] .. starts[r + 1] - 1, one after the other.

    document, begin, end: int64 [pieces]; tokens begin .. end - 1 of a document. With
      `across_documents`, <s> and </s> of the document are counted (token 0 and the last one).
    groups: rows of every language.
    """

    row_length: int
    across_documents: bool
    starts: np.ndarray
    document: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    groups: tuple[Group, ...]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def pieces(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of the pieces of `rows`, row after row."""
        return np.concatenate([np.arange(*self.starts[row : row + 2]) for row in rows])

    def tokens(self, rows: np.ndarray) -> int:
        """Tokens in `rows`, specials included."""
        pieces = self.pieces(rows)
        specials = 0 if self.across_documents else 2 * len(pieces)
        return int((self.end[pieces] - self.begin[pieces]).sum()) + specials

    def fill(self, row: int, documents: dict[int, np.ndarray], vocabulary):
        """token_L, text_index_L, position_L (int32) of a row.

        Args:
          documents: number -> ids without specials, of all documents in the row.

        Attention stays inside a document, and so do positions; with `across_documents` the row is
        one text.
        """
        token_L = np.full(self.row_length, vocabulary.pad_id, np.int32)
        text_index_L = np.full(self.row_length, PADDING, np.int32)
        position_L = np.zeros(self.row_length, np.int32)
        start = 0
        for index, piece in enumerate(self.pieces([row]).tolist()):
            ids = documents[int(self.document[piece])]
            part = slice(int(self.begin[piece]), int(self.end[piece]))
            if self.across_documents:
                ids = np.concatenate([[vocabulary.bos_id], ids, [vocabulary.eos_id]])[part]
            else:
                ids = np.concatenate([[vocabulary.bos_id], ids[part], [vocabulary.eos_id]])
            span = slice(start, start + len(ids))
            token_L[span] = ids
            text_index_L[span] = 0 if self.across_documents else index
            position_L[span] = np.arange(len(ids)) + (start if self.across_documents else 0)
            start = span.stop
        return token_L, text_index_L, position_L


def documents_by_language(groups: list[dict]) -> dict[str, np.ndarray]:
    """Language -> numbers of its documents, of all sources, from the groups of a token store."""
    numbers: dict[str, list[np.ndarray]] = {}
    for group in groups:
        numbers.setdefault(group["language"], []).append(np.arange(group["start"], group["stop"]))
    return {language: np.concatenate(parts) for language, parts in sorted(numbers.items())}


def row_table(
    lengths: np.ndarray, groups: list[dict], row_length: int, seed: int, across_documents: bool
) -> RowTable:
    """The rows of a token store of documents.

    Args:
      lengths: int [documents] ids without specials.
      groups: of the store; a row holds documents of one language.
    """
    cut = concatenate_documents if across_documents else pack_documents
    counts, pieces, ranges = [], [], []
    rows = 0
    for place, (language, numbers) in enumerate(documents_by_language(groups).items()):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, place))))
        order = rng.permutation(numbers)
        count_R, piece_N3 = cut(lengths[order], row_length)
        piece_N3[:, 0] = order[piece_N3[:, 0]]
        counts.append(count_R)
        pieces.append(piece_N3)
        ranges.append(Group(TASK, language, rows, rows + len(count_R), 1.0))
        rows += len(count_R)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return RowTable(
        row_length, across_documents, starts, *np.concatenate(pieces).T.copy(), tuple(ranges)
    )


def pack_documents(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(pieces per row, int64 [pieces, 3]: document, begin, end), rows in order.

    A document is cut into pieces that fill a row with their own <s> and </s>, and a rest; pieces
    share rows by best fit.
    """
    room = row_length - 2
    counts = -(-lengths // room)
    document = np.repeat(np.arange(len(lengths)), counts)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    begin = (np.arange(len(document)) - before) * room
    end = np.minimum(begin + room, lengths[document])
    row_of_piece = np.zeros(len(document), np.int64)
    rows = 0
    for start in range(0, len(document), WINDOW):
        part = slice(start, start + WINDOW)
        packing = pack((end - begin)[part] + 2, row_length, row_length)
        row_of_piece[part] = rows + packing.row
        rows += packing.rows
    order = np.argsort(row_of_piece, kind="stable")
    pieces = np.stack([document, begin, end], axis=1)[order]
    return np.bincount(row_of_piece, minlength=rows), pieces


def concatenate_documents(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """`pack_documents` as the reference does it: documents with <s> and </s> one after the other,
    cut into rows (the last one may be short: the reference drops it)."""
    stops = np.cumsum(lengths + 2)
    cuts = np.arange(row_length, stops[-1], row_length)
    ends = np.union1d(stops, cuts)
    begins = np.concatenate([[0], ends[:-1]])
    document = np.searchsorted(stops, begins, side="right")
    first = stops[document] - (lengths[document] + 2)
    pieces = np.stack([document, begins - first, ends - first], axis=1)
    return np.bincount(begins // row_length), pieces
