"""Which texts share a device call when everything is to be encoded: full rows, few shapes."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from moe_embed_jax.data.packing import Packing, Rows

TOKENS_PER_CALL = 8_192  # slots per device and call
SHORTEST_ROW = 16  # of a text alone
SLOTS = 32  # most texts that share a row
TEXTS_PER_PLAN = 32_768  # planned together; more would not fill rows better


@dataclasses.dataclass(frozen=True)
class Call:
    """`rows` rows of `row_length` slots; `packing` says where text `members[i]` lies in them."""

    members: np.ndarray
    packing: Packing
    row_length: int

    @property
    def rows(self) -> int:
        return self.packing.rows


def plan_calls(
    lengths, devices: int, batch_size: int | None = None, tokens_per_call: int = TOKENS_PER_CALL
) -> Iterator[Call]:
    """Calls that cover every text of at least one token once; longest texts first.

    Args:
      lengths: int [n] tokens per text.
      devices: rows of a call are a multiple of it.
      batch_size: most texts in a call; None: the token budget decides.
      tokens_per_call: that budget, slots per device.

    Texts are packed into rows not much longer than themselves, because attention costs what the row
    is long; what stays free in a call is filled with shorter texts, so that one call of them all is
    not full. A text that comes alone, such as a query in a search box, has a row of its size.
    """
    lengths = np.asarray(lengths)
    if lengths.size == 1 and lengths[0] > 0:
        row_length = max(SHORTEST_ROW, _power_of_two(int(lengths[0])))
        rows = Rows(row_length, SLOTS)
        rows.open(devices)
        place = np.array(rows.place(int(lengths[0])), np.int32)
        yield Call(np.array([0]), Packing(*place[:, None], devices), row_length)
        return
    step = batch_size or TEXTS_PER_PLAN
    for begin in range(0, lengths.size, step):
        part = lengths[begin : begin + step]
        left = [i for i in np.argsort(-part, kind="stable").tolist() if part[i] > 0]
        while left:
            calls, left = _plan_longest(part, left, devices, tokens_per_call)
            for call in calls:
                yield dataclasses.replace(call, members=call.members + begin)


def _plan_longest(
    lengths, order: list[int], devices: int, tokens_per_call: int
) -> tuple[list[Call], list[int]]:
    """Calls of the row length that the first text of `order` needs, and the texts left over."""
    row_length = row_length_of(int(lengths[order[0]]))
    rows = Rows(row_length, SLOTS)
    members, places, left = [], [], []
    sizes = None
    for text in order:
        length = int(lengths[text])
        if sizes is None and row_length_of(length) < row_length:  # the rest only fills up
            sizes = call_rows(len(rows), row_length, devices, tokens_per_call)
            rows.open(sum(sizes) - len(rows))
        place = rows.place(length)
        if place is None and sizes is None:
            rows.open()
            place = rows.place(length)
        if place is None:
            left.append(text)
        else:
            members.append(text)
            places.append(place)
    sizes = sizes or call_rows(len(rows), row_length, devices, tokens_per_call)
    members, places = np.array(members), np.array(places, np.int32)
    calls, first = [], 0
    for size in sizes:
        here = (places[:, 0] >= first) & (places[:, 0] < first + size)
        packing = Packing(*(places[here] - [first, 0, 0]).T, size)
        calls.append(Call(members[here], packing, row_length))
        first += size
    return calls, left


def row_length_of(length: int) -> int:
    """64, 256, 512, 1024, ...: rows for a text of `length` tokens."""
    return 64 if length <= 64 else max(256, _power_of_two(length))


def call_rows(
    rows: int, row_length: int, devices: int, tokens_per_call: int = TOKENS_PER_CALL
) -> list[int]:
    """Rows of each call. Shapes are few, because a compilation costs more than a half-empty call:
    the token budget, and 1, 8, 64, ... rows a device below it; only the last call has spare rows,
    and not more than it uses if a smaller shape can help that."""
    full = max(tokens_per_call // row_length, 1)
    shapes = [8**i * devices for i in range(full.bit_length()) if 8**i < full] + [full * devices]
    sizes = []
    while rows > 0:
        enough = next((shape for shape in shapes if shape >= rows), shapes[-1])
        if 2 * rows < enough and enough > shapes[0]:
            enough = max(shape for shape in shapes if shape <= rows)
        sizes.append(enough)
        rows -= enough
    return sizes


def _power_of_two(length: int) -> int:
    return 1 << (length - 1).bit_length()
