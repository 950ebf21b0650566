"""Row counts of packed batches: few of them, because every row count is a compilation."""

import math

import numpy as np

from moe_embed_jax.data.data_config import MAX_BUCKETS

SHORT_RUN = 1000  # steps


def most_buckets(steps: int, platform: str) -> int:
    """How many row counts a run may have where its config does not say (`data.row_buckets=0`).

    One in a short run on a TPU or GPU: a compilation takes minutes there, and a step milliseconds.
    """
    return 1 if platform in ("tpu", "gpu") and steps < SHORT_RUN else MAX_BUCKETS


def in_chunks(rows: int, chunk_rows: int) -> tuple[int, int]:
    """(number of chunks, rows of each): the fewest equal chunks of at most `chunk_rows` rows that
    hold `rows`, so that at most `chunks - 1` rows are added."""
    chunks = -(-rows // chunk_rows) if chunk_rows else 1
    return chunks, -(-rows // chunks)


def choose_buckets(
    rows_needed, most_rows: int | None = None, chunk_rows: int = 0, most: int = MAX_BUCKETS
) -> tuple[int, ...]:
    """At most `most` row counts that waste least on these steps.

    Args:
      rows_needed: rows per device of every step of the run, or of a sample of them.
      most_rows: for a sample, the last bucket (one text per row), so that every step fits one; the
        one before it gets 3 % of head room for steps that were not sampled.
        It comes on top if `most` is 1, and hardly any step needs it.
      chunk_rows: buckets are whole numbers of equal chunks, see `in_chunks`.

    The exact optimum over thresholds taken from `rows_needed`, by dynamic programming. A threshold
    more is a compilation more, so it has to save 2 % of all slots.
    """
    needed = np.array([math.prod(in_chunks(int(rows), chunk_rows)) for rows in rows_needed])
    values, counts = np.unique(needed, return_counts=True)
    best = {(0, 0): (0, ())}  # (values covered, thresholds used) -> (slots wasted, thresholds)
    for used in range(1, max(most - (most_rows is not None), 1) + 1):
        for end in range(1, values.size + 1):
            options = []
            for begin in range(end):
                if (begin, used - 1) in best:
                    waste, chosen = best[begin, used - 1]
                    spare = (values[end - 1] - values[begin:end]) * counts[begin:end]
                    options.append((waste + int(spare.sum()), (*chosen, int(values[end - 1]))))
            if options:
                best[end, used] = min(options)
    price = 0.02 * float(needed.sum())
    _, thresholds = min(
        (waste + price * used, thresholds)
        for (end, used), (waste, thresholds) in best.items()
        if end == values.size
    )
    if most_rows is None:
        return thresholds
    last = min(math.ceil(1.03 * thresholds[-1]), most_rows)
    ends = {math.prod(in_chunks(rows, chunk_rows)) for rows in (last, most_rows)}
    return tuple(sorted({*thresholds[:-1], *ends}))
