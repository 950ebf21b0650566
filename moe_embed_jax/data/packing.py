"""Packing: several texts share a row of L token slots; attention and pooling keep them apart."""

import dataclasses

import numpy as np

from moe_embed_jax.shapes import PADDING


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where each of n texts lies: its row, its index within the row, its first token's column."""

    row: np.ndarray  # int32 [n]
    index: np.ndarray  # int32 [n]
    start: np.ndarray  # int32 [n]
    rows: int

    def slot(self, slots: int) -> np.ndarray:
        """row * S + index: position in pooled_RSD flattened."""
        return (self.row * slots + self.index).astype(np.int32)


class Rows:
    """Rows of L slots for at most S texts each, filled one text at a time: best fit."""

    def __init__(self, row_length: int, slots: int):
        self.row_length = row_length
        self.slots = slots
        self._with_room = [[] for _ in range(row_length + 1)]  # free tokens -> rows, as stacks
        self._frees = 0  # bit f: there is a row with f free tokens
        self._texts = []  # of each row

    def __len__(self) -> int:
        return len(self._texts)

    def open(self, rows: int = 1) -> None:
        """Adds empty rows."""
        for row in range(len(self), len(self) + rows):
            self._add(row, self.row_length)
        self._texts += [0] * rows

    def _add(self, row: int, free: int) -> None:
        self._with_room[free].append(row)
        self._frees |= 1 << free

    def place(self, length: int) -> tuple[int, int, int] | None:
        """(row, index, start) in the fullest row that still takes the text; None: no row does."""
        enough = self._frees >> length
        if not enough:
            return None
        free = length + (enough & -enough).bit_length() - 1  # the lowest bit
        rows = self._with_room[free]
        row = rows.pop()
        if not rows:
            self._frees ^= 1 << free
        index = self._texts[row]
        self._texts[row] += 1
        if index + 1 < self.slots and free > length:
            self._add(row, free - length)
        return row, index, self.row_length - free


def pack(lengths, row_length: int, slots: int) -> Packing:
    """Best-fit decreasing: each text, longest first, goes to the fullest row that still takes it.

    Args:
      lengths: int [n] tokens per text, each between 1 and `row_length`.
      slots: most texts per row (S).

    A pure function of its arguments (ties keep the order of the texts).
    """
    lengths = np.asarray(lengths)
    if lengths.size and (lengths.max() > row_length or lengths.min() < 1):
        bad = int(np.flatnonzero((lengths > row_length) | (lengths < 1))[0])
        raise ValueError(
            f"text {bad} has {lengths[bad]} tokens: a row takes 1 to {row_length} (row_length)"
        )
    rows = Rows(row_length, slots)
    places = np.zeros((lengths.size, 3), np.int32)
    for text in np.argsort(-lengths, kind="stable").tolist():
        place = rows.place(int(lengths[text]))
        if place is None:
            rows.open()
            place = rows.place(int(lengths[text]))
        places[text] = place
    return Packing(*places.T, len(rows))


def fill_rows(packing: Packing, sequences, rows: int, row_length: int, pad_id: int, positions=None):
    """token_RL, text_index_RL, position_RL (int32) with R = `rows` >= packing.rows.

    `positions`: of the tokens of each sequence; None counts from 0.
    """
    token_RL = np.full((rows, row_length), pad_id, np.int32)
    text_index_RL = np.full((rows, row_length), PADDING, np.int32)
    position_RL = np.zeros((rows, row_length), np.int32)
    places = zip(packing.row.tolist(), packing.index.tolist(), packing.start.tolist(), strict=True)
    if positions is None:
        positions = (np.arange(len(sequence)) for sequence in sequences)
    for (row, index, start), sequence, position in zip(places, sequences, positions, strict=True):
        span = slice(start, start + len(sequence))
        token_RL[row, span] = sequence
        text_index_RL[row, span] = index
        position_RL[row, span] = position
    return token_RL, text_index_RL, position_RL
