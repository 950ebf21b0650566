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
    row = np.zeros(lengths.size, np.int32)
    index = np.zeros(lengths.size, np.int32)
    start = np.zeros(lengths.size, np.int32)
    rows_with_room = [[] for _ in range(row_length + 1)]  # free tokens -> rows, used as stacks
    texts_in_row: list[int] = []
    for text in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[text])
        free = next((f for f in range(need, row_length + 1) if rows_with_room[f]), None)
        if free is None:
            free, chosen = row_length, len(texts_in_row)
            texts_in_row.append(0)
        else:
            chosen = rows_with_room[free].pop()
        row[text], index[text], start[text] = chosen, texts_in_row[chosen], row_length - free
        texts_in_row[chosen] += 1
        if texts_in_row[chosen] < slots and free > need:
            rows_with_room[free - need].append(chosen)
    return Packing(row, index, start, len(texts_in_row))


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
