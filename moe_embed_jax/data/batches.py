"""From step to device arrays: read this process's slice, pack it per device, put it on the mesh."""

import concurrent.futures
import dataclasses
import math

import jax
import numpy as np

from moe_embed_jax.data.packing import fill_rows, pack
from moe_embed_jax.data.schedule import Group, Schedule
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import batch_sharding, local_device_positions, rows_sharding

MAX_BUCKETS = 4  # row counts, hence compilations, per run
SAMPLED_TEXTS = 500_000  # packed once at the start, at least, to choose the buckets from
SAMPLED_STEPS = 64  # at least
PREFETCH = 2  # batches prepared ahead of the device


@dataclasses.dataclass(frozen=True)
class BatchArrays:
    """The fields of `training.step.Batch`, as a dict of global arrays, and where they come from."""

    arrays: dict[str, jax.Array]
    step: int
    group: Group
    tokens: int  # real tokens of the global batch


def in_chunks(rows: int, chunk_rows: int) -> tuple[int, int]:
    """(number of chunks, rows of each): the fewest equal chunks of at most `chunk_rows` rows that
    hold `rows`, so that at most `chunks - 1` rows are added."""
    chunks = -(-rows // chunk_rows) if chunk_rows else 1
    return chunks, -(-rows // chunks)


def choose_buckets(
    rows_needed, most_rows: int | None = None, chunk_rows: int = 0
) -> tuple[int, ...]:
    """At most `MAX_BUCKETS` row counts that waste least on these steps.

    Args:
      rows_needed: rows per device of every step of the run, or of a sample of them.
      most_rows: for a sample, the last bucket (one text per row), so that every step fits one; the
        one before it gets 3 % of head room for steps that were not sampled.
      chunk_rows: buckets are whole numbers of equal chunks, see `in_chunks`.

    The exact optimum over thresholds taken from `rows_needed`, by dynamic programming. A threshold
    more is a compilation more, so it has to save 2 % of all slots.
    """
    needed = np.array([math.prod(in_chunks(int(rows), chunk_rows)) for rows in rows_needed])
    values, counts = np.unique(needed, return_counts=True)
    best = {(0, 0): (0, ())}  # (values covered, thresholds used) -> (slots wasted, thresholds)
    for used in range(1, MAX_BUCKETS + (most_rows is None)):
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


class Batches:
    """`Batches(...).at(step)` is the global batch of that step, the same on any mesh of any hosts.

    Pair i of the global batch belongs to mesh position i // (B / devices). Row counts come from a
    few buckets, chosen from the data spec alone, so every process agrees on the shape of a step
    without talking to the others.
    """

    def __init__(
        self,
        store: TokenStore,
        schedule: Schedule,
        mesh: jax.sharding.Mesh,
        row_length: int,
        slots: int,
        pad_id: int,
        chunk_rows: int = 0,
        negatives: int = 0,
    ):
        """
        Args:
          chunk_rows: rows that a device encodes at a time, at most; 0: all of them.
          negatives: hard negatives of a pair (N), at most: the first of those it has.
        """
        if schedule.batch_size % mesh.size:
            raise UserError(
                f"batch_size={schedule.batch_size} is not divisible by the {mesh.size} devices of "
                f"the mesh; choose a multiple of {mesh.size}"
            )
        self.negatives = negatives
        used = [store.lengths, store.negative_lengths] if negatives else [store.lengths]
        longest = max(int(lengths.max(initial=0)) for lengths in used)
        if longest > row_length:
            raise UserError(
                f"data.row_length={row_length} is shorter than the longest prepared text "
                f"({longest} tokens); raise it or prepare with shorter texts"
            )
        self.store = store
        self.schedule = schedule
        self.mesh = mesh
        self.row_length = row_length
        self.slots = slots
        self.pad_id = pad_id
        self.chunk_rows = chunk_rows
        self.pairs_per_device = schedule.batch_size // mesh.size
        affordable = SAMPLED_TEXTS // ((2 + negatives) * schedule.batch_size)
        affordable = max(SAMPLED_STEPS, affordable)
        sample = np.linspace(0, schedule.steps - 1, min(affordable, schedule.steps))
        sample = np.unique(sample.astype(int)).tolist()
        self.buckets = choose_buckets(
            [max(packing.rows for packing in self._packings(step)[1]) for step in sample],
            None if len(sample) == schedule.steps else (2 + negatives) * self.pairs_per_device,
            chunk_rows,
        )
        # A shape is a compilation; nobody waits for a fifth one by surprise.
        assert len(self.buckets) <= MAX_BUCKETS
        # Real tokens per global batch, for estimates.
        self.mean_tokens = float(np.mean([self._tokens(schedule.rows(s)) for s in sample]))

    def _hard(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mask [rows, N], places of the chosen ones in the store's arrays, row by row)."""
        starts = self.store.negative_starts[rows]
        counts = np.minimum(self.store.negative_starts[rows + 1] - starts, self.negatives)
        mask_BN = np.arange(self.negatives) < counts[:, None]
        places_BN = starts[:, None] + np.arange(self.negatives)
        return mask_BN, places_BN[mask_BN]

    def _tokens(self, rows: np.ndarray) -> int:
        """Real tokens of these pairs, their hard negatives included."""
        _, places = self._hard(rows)
        return int(self.store.lengths[rows].sum() + self.store.negative_lengths[places].sum())

    def _packings(self, step: int):
        """Rows of the store and, for every device of the mesh, the packing of its texts.

        A device's texts are its queries, then its documents, then the hard negatives of its first
        pair, of its second, ...
        """
        rows = self.schedule.rows(step)
        packings = []
        for own_rows in rows.reshape(self.mesh.size, -1):
            _, places = self._hard(own_rows)
            lengths = [
                self.store.lengths[own_rows].T.reshape(-1),
                self.store.negative_lengths[places],
            ]
            packings.append(pack(np.concatenate(lengths), self.row_length, self.slots))
        return rows, packings

    def at(self, step: int) -> BatchArrays:
        """Arrays of step `step` (0-based); reads only the pairs of this process's devices."""
        rows, packings = self._packings(step)
        needed = max(packing.rows for packing in packings)
        bucket = next(bucket for bucket in self.buckets if bucket >= needed)
        parts = [
            self._device_arrays(rows, packings, position, bucket)
            for position in local_device_positions(self.mesh)
        ]
        arrays = {}
        for name in parts[0]:
            is_rows = name.endswith("_CRL")
            sharding = rows_sharding(self.mesh) if is_rows else batch_sharding(self.mesh)
            own = np.concatenate([part[name] for part in parts], axis=int(is_rows))
            arrays[name] = jax.make_array_from_process_local_data(sharding, own)
        return BatchArrays(arrays, step, self.schedule.group(step), self._tokens(rows))

    def _device_arrays(self, rows, packings, position: int, bucket: int) -> dict[str, np.ndarray]:
        pairs = self.pairs_per_device
        own_rows = rows[position * pairs : (position + 1) * pairs]
        sequences = self.store.read(own_rows)
        texts = [pair[0] for pair in sequences] + [pair[1] for pair in sequences]
        for pair in sequences:
            texts += pair[2 : 2 + self.negatives]
        packing = packings[position]
        rows_RL = fill_rows(packing, texts, bucket, self.row_length, self.pad_id)
        shape = (*in_chunks(bucket, self.chunk_rows), self.row_length)
        token_CRL, text_index_CRL, position_CRL = (array.reshape(shape) for array in rows_RL)
        slot = packing.slot(self.slots)
        content = self.store.content_ids[own_rows]
        mask_BN, places = self._hard(own_rows)
        # Where a pair has fewer, the place is never read: any slot will do.
        document_slot_BM = np.zeros((pairs, 1 + self.negatives), np.int32)
        document_slot_BM[:, 0] = slot[pairs : 2 * pairs]
        document_slot_BM[:, 1:][mask_BN] = slot[2 * pairs :]
        document_id_BM2 = np.zeros((*document_slot_BM.shape, 2), np.int32)
        document_id_BM2[:, 0] = content[:, 1]
        document_id_BM2[:, 1:][mask_BN] = self.store.negative_ids[places]
        return {
            "token_CRL": token_CRL,
            "text_index_CRL": text_index_CRL,
            "position_CRL": position_CRL,
            "query_slot_B": slot[:pairs],
            "document_slot_BM": document_slot_BM,
            "query_id_B2": content[:, 0],
            "document_id_BM2": document_id_BM2,
            "valid_BM": np.concatenate([np.ones((pairs, 1), bool), mask_BN], axis=1),
        }

    def iterate(self, start: int, stop: int):
        """Batches of steps start..stop-1, prepared in a thread while the device computes."""
        return prefetched(self.at, start, stop)


def prefetched(at, start: int, stop: int):
    """`at(step)` of steps start..stop-1, called in a thread some steps ahead."""
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        pending = []
        try:
            for step in range(start, min(start + PREFETCH, stop)):
                pending.append(executor.submit(at, step))
            for step in range(start, stop):
                batch = pending.pop(0).result()
                if step + PREFETCH < stop:
                    pending.append(executor.submit(at, step + PREFETCH))
                yield batch
        finally:
            for future in pending:
                future.cancel()
