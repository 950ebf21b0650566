"""Records of the token store: the token sequences of a row, one after the other.

Little-endian: uint32 magic, uint32 n, uint32 lengths[n], int32 tokens[sum(lengths)]. The texts of a
row are query, document, then as many hard negatives as it has.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FORMAT = 1
MAGIC = 0x4D454A00 | FORMAT  # "MEJ" and the format number


class Negatives(NamedTuple):
    """Hard negatives of n rows, J in all, the first row's first.

    tokens: int32 [sum(lengths)], text after text.
    lengths: int [J] tokens of each text.
    content_ids: int32 [J, 2].
    counts: int [n] texts of each row.
    scores: float32 [J] of a teacher, NaN where none is known; None: nowhere.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    content_ids: np.ndarray
    counts: np.ndarray
    scores: np.ndarray | None = None

    def of_rows(self, keep: np.ndarray) -> "Negatives":
        """Those of the rows that the mask `keep` [n] chooses."""
        return self._texts(np.repeat(keep, self.counts), self.counts[keep])

    def longer_than(self, tokens: int) -> "Negatives":
        """Those texts that have more than `tokens` tokens."""
        keep = self.lengths > tokens
        row = np.repeat(np.arange(len(self.counts)), self.counts)
        counts = np.bincount(row[keep], minlength=len(self.counts))
        return self._texts(keep, counts)

    def _texts(self, keep: np.ndarray, counts: np.ndarray) -> "Negatives":
        tokens = self.tokens[np.repeat(keep, self.lengths)]
        scores = None if self.scores is None else self.scores[keep]
        return Negatives(tokens, self.lengths[keep], self.content_ids[keep], counts, scores)


def no_negatives(rows: int) -> Negatives:
    return Negatives(
        np.zeros(0, np.int32),
        np.zeros(0, np.int64),
        np.zeros((0, 2), np.int32),
        np.zeros(rows, np.int64),
    )


def encode_record(sequences: Sequence[np.ndarray]) -> bytes:
    """One record from int token sequences."""
    header = np.array([MAGIC, len(sequences), *(len(s) for s in sequences)], dtype="<u4")
    return header.tobytes() + b"".join(np.asarray(s).astype("<i4").tobytes() for s in sequences)


def encode_records(
    ids: Sequence[np.ndarray], lengths: np.ndarray, negatives: Negatives | None = None
) -> list[bytes]:
    """`encode_record` of N rows at once; arguments as in `TokenStoreWriter.write_batch`."""
    count, always = lengths.shape
    more = no_negatives(count) if negatives is None else negatives
    row_of_negative = np.repeat(np.arange(count), more.counts)
    negative_tokens = np.bincount(row_of_negative, weights=more.lengths, minlength=count)
    texts = always + more.counts
    sizes = 2 + texts + lengths.sum(axis=1) + negative_tokens.astype(np.int64)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    words = np.empty(ends[-1] if count else 0, dtype="<i4")
    words[starts] = MAGIC
    words[starts + 1] = texts
    places = starts + 2 + texts
    for text in range(always):
        length = lengths[:, text]
        words[starts + 2 + text] = length
        # Token i of a row's text goes to `places` + i; `ids` counts i over all rows.
        before = np.cumsum(length) - length
        words[np.repeat(places - before, length) + np.arange(len(ids[text]))] = ids[text]
        places = places + length
    if len(more.lengths):
        number = np.arange(len(more.lengths)) - np.repeat(
            np.cumsum(more.counts) - more.counts, more.counts
        )
        words[(starts + 2 + always)[row_of_negative] + number] = more.lengths
        # The negatives of a row follow each other in the record as in `tokens`.
        per_row = negative_tokens.astype(np.int64)
        before = np.cumsum(per_row) - per_row
        words[np.repeat(places - before, per_row) + np.arange(len(more.tokens))] = more.tokens
    data = words.tobytes()
    return [
        data[start:end]
        for start, end in zip((4 * starts).tolist(), (4 * ends).tolist(), strict=True)
    ]


def decode_record(record: bytes) -> list[np.ndarray]:
    """The int32 sequences of a record.

    Raises:
      ValueError: says what is wrong with the bytes.
    """
    if len(record) < 8 or len(record) % 4:
        raise ValueError(f"{len(record)} bytes cannot be a record")
    words = np.frombuffer(record, dtype="<i4")
    magic, count = int(words[0]), int(words[1])
    if magic != MAGIC:
        raise ValueError(f"it starts with {magic:#x} instead of {MAGIC:#x}")
    ends = 2 + count + np.cumsum(words[2 : 2 + count])
    if (
        count < 1
        or len(words) < 2 + count
        or ends[-1] != len(words)
        or (words[2:][:count] < 0).any()
    ):
        raise ValueError(f"its {len(words)} words do not match its header")
    return np.split(words[2 + count :].astype(np.int32, copy=False), ends[:-1] - 2 - count)
