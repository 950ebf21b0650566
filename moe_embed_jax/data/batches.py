"""From step to device arrays: read this process's slice, pack it per device, put it on the mesh."""

import abc
import concurrent.futures
import dataclasses
from collections.abc import Collection

import jax
import numpy as np
from jax.sharding import NamedSharding

from moe_embed_jax.data.buckets import choose_buckets, in_chunks, most_buckets
from moe_embed_jax.data.document_rows import RowTable
from moe_embed_jax.data.masking import Masking
from moe_embed_jax.data.packing import fill_rows, pack
from moe_embed_jax.data.schedule import Group, Schedule
from moe_embed_jax.data.teaching import Teaching
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import BATCH_SPEC, ROWS_SPEC, local_device_positions
from moe_embed_jax.shapes import PADDING

SAMPLED_TEXTS = 500_000  # packed once at the start, at least, to choose the buckets from
SAMPLED_STEPS = 64  # at least
PREFETCH = 2  # batches prepared ahead of the device

### What a batch holds

# Metadata of a field: the PartitionSpec and the type of its array.
ROWS = {"spec": ROWS_SPEC, "dtype": np.int32}
BATCH = {"spec": BATCH_SPEC, "dtype": np.int32}
MASK = {"spec": BATCH_SPEC, "dtype": bool}
FLOATS = {"spec": BATCH_SPEC, "dtype": np.float32}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PairBatch:
    """A global batch of B pairs, packed per device into rows, and rows in chunks.

    token_CRL, text_index_CRL, position_CRL: packed rows (text index -1: padding). Every device has
      R / devices rows of each chunk; one chunk is encoded at a time.
    query_slot_B: where each query was packed (device-local row * S + text index).
    document_slot_BM: the same of its own document, then its M - 1 hard negatives.
    query_id_B2, document_id_BM2: 64-bit content ids as two int32.
    valid_BM: which documents are there (a query may have fewer hard negatives); the first always.
    """

    token_CRL: jax.Array = dataclasses.field(metadata=ROWS)
    text_index_CRL: jax.Array = dataclasses.field(metadata=ROWS)
    position_CRL: jax.Array = dataclasses.field(metadata=ROWS)
    query_slot_B: jax.Array = dataclasses.field(metadata=BATCH)
    document_slot_BM: jax.Array = dataclasses.field(metadata=BATCH)
    query_id_B2: jax.Array = dataclasses.field(metadata=BATCH)
    document_id_BM2: jax.Array = dataclasses.field(metadata=BATCH)
    valid_BM: jax.Array = dataclasses.field(metadata=MASK)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class FullPairBatch(PairBatch):
    """A batch with what only some runs need, see `Contrastive.Batch`.

    teacher_query_BW, teacher_document_BW: its vectors of the queries and of their own documents;
      [B, 0] where they are not learned.
    teacher_score_BM: its scores of the documents, NaN where one is not known; [B, 0] likewise.
    in_batch_B: whether the texts of other pairs are negatives; the same for the whole batch.
    """

    teacher_query_BW: jax.Array = dataclasses.field(metadata=FLOATS)
    teacher_document_BW: jax.Array = dataclasses.field(metadata=FLOATS)
    teacher_score_BM: jax.Array = dataclasses.field(metadata=FLOATS)
    in_batch_B: jax.Array = dataclasses.field(metadata=MASK)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class MaskedBatch:
    """A global batch of rows, in chunks: every device has R / devices rows of each chunk.

    token_CRL, text_index_CRL, position_CRL: packed rows (text index -1: padding) after masking.
    column_CRP: where in its row a token is to be predicted.
    target_CRP: which token it was; -1 where a row has fewer than P.
    """

    token_CRL: jax.Array = dataclasses.field(metadata=ROWS)
    text_index_CRL: jax.Array = dataclasses.field(metadata=ROWS)
    position_CRL: jax.Array = dataclasses.field(metadata=ROWS)
    column_CRP: jax.Array = dataclasses.field(metadata=ROWS)
    target_CRP: jax.Array = dataclasses.field(metadata=ROWS)


def batch_specs(kind: type):
    """A batch of class `kind` that holds the PartitionSpec of every field."""
    return kind(**{field.name: field.metadata["spec"] for field in dataclasses.fields(kind)})


def batch_shardings(kind: type, mesh: jax.sharding.Mesh):
    """A batch of class `kind` that holds the sharding of every field."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), batch_specs(kind))


def abstract_batch(mesh: jax.sharding.Mesh, kind: type, **shapes: tuple[int, ...]):
    """A batch of class `kind` of ShapeDtypeStructs with these global shapes."""

    def array(field):
        sharding = NamedSharding(mesh, field.metadata["spec"])
        dtype = field.metadata["dtype"]
        return jax.ShapeDtypeStruct(shapes[field.name], dtype, sharding=sharding)

    return kind(**{field.name: array(field) for field in dataclasses.fields(kind)})


### What makes batches


@dataclasses.dataclass(frozen=True)
class BatchOfStep:
    """arrays: a `PairBatch` or `MaskedBatch` of global arrays. tokens: real ones in the batch."""

    arrays: PairBatch | MaskedBatch
    step: int
    group: Group
    tokens: int


class Batches(abc.ABC):
    """`at(step)` is the global batch of that step, the same on any mesh of any hosts.

    Row i of the schedule's rows belongs to mesh position i // (batch size / devices). What a batch
    looks like is decided by a subclass.
    """

    def __init__(self, schedule: Schedule, mesh: jax.sharding.Mesh, chunk_rows: int):
        """`chunk_rows`: rows that a device encodes at a time, at most; 0: all of them."""
        if schedule.batch_size % mesh.size:
            raise UserError(
                f"batch_size={schedule.batch_size} is not divisible by the {mesh.size} devices of "
                f"the mesh; choose a multiple of {mesh.size}"
            )
        self.schedule = schedule
        self.mesh = mesh
        self.chunk_rows = chunk_rows
        self.per_device = schedule.batch_size // mesh.size

    def at(self, step: int) -> BatchOfStep:
        """The batch of step `step` (0-based); reads only what this process's devices get."""
        rows = self.schedule.rows(step)
        parts = self.device_parts(step, rows, local_device_positions(self.mesh))

        def together(spec, *arrays):
            sharded_axis = next(axis for axis, names in enumerate(spec) if names)
            local = np.concatenate(arrays, axis=sharded_axis)
            return jax.make_array_from_process_local_data(NamedSharding(self.mesh, spec), local)

        arrays = jax.tree.map(together, batch_specs(type(parts[0])), *parts)
        return BatchOfStep(arrays, step, self.schedule.group(step), self.tokens(rows))

    def iterate(self, start: int, stop: int):
        """Batches of steps start..stop-1, prepared in a thread while the device computes."""
        executor = concurrent.futures.ThreadPoolExecutor(1)
        pending = []
        try:
            for step in range(start, min(start + PREFETCH, stop)):
                pending.append(executor.submit(self.at, step))
            for step in range(start, stop):
                batch = pending.pop(0).result()
                if step + PREFETCH < stop:
                    pending.append(executor.submit(self.at, step + PREFETCH))
                yield batch
        finally:
            # No wait: a batch that nobody takes may still be read, of a bucket that is lost.
            executor.shutdown(wait=False, cancel_futures=True)

    def sample(self, most: int) -> list[np.ndarray]:
        """The rows of at most `most` steps, evenly spaced over the run."""
        steps = np.linspace(0, self.schedule.steps - 1, min(most, self.schedule.steps))
        return [self.schedule.rows(step) for step in np.unique(steps.astype(int)).tolist()]

    def mean_tokens_of(self, batches: list[np.ndarray]) -> float:
        """Real tokens of a global batch, in the mean over batches of these rows."""
        return float(np.mean([self.tokens(rows) for rows in batches]))

    @abc.abstractmethod
    def tokens(self, rows: np.ndarray) -> int:
        """Real tokens of these rows of the schedule."""

    @abc.abstractmethod
    def device_parts(self, step: int, rows: np.ndarray, positions: list[int]) -> list:
        """Batches of NumPy arrays: what each of these mesh positions gets of the rows of a step."""

    def own(self, rows: np.ndarray, position: int) -> np.ndarray:
        """The rows of a mesh position."""
        return rows[position * self.per_device : (position + 1) * self.per_device]


class PairBatches(Batches):
    """Batches of pairs, whose texts share packed rows.

    Row counts come from a few buckets, chosen from the data spec alone, so every process agrees on
    the shape of a step without talking to the others.
    """

    def __init__(
        self,
        store: TokenStore,
        schedule: Schedule,
        mesh: jax.sharding.Mesh,
        row_length: int,
        texts_per_row: int,
        pad_id: int,
        chunk_rows: int = 0,
        negatives: int = 0,
        row_buckets: int = 0,
        teaching: Teaching | None = None,
        alone: Collection[str] = (),
    ):
        """
        Args:
          chunk_rows: as of `Batches`.
          negatives: hard negatives of a pair (N), at most: the first of those it has.
          row_buckets: the most row counts; 0: as `most_buckets` says.
          teaching: comes with the batches, which are then `FullPairBatch`es.
          alone: tasks whose pairs have no other negatives than their own; likewise.
        """
        super().__init__(schedule, mesh, chunk_rows)
        self.negatives, self.teaching, self.alone = negatives, teaching, alone
        used = [store.lengths, store.negative_lengths] if negatives else [store.lengths]
        longest = max(int(lengths.max(initial=0)) for lengths in used)
        if longest > row_length:
            raise UserError(
                f"data.row_length={row_length} is shorter than the longest prepared text "
                f"({longest} tokens); raise it or prepare with shorter texts"
            )
        self.store = store
        self.row_length = row_length
        self.texts_per_row = texts_per_row
        self.pad_id = pad_id
        affordable = SAMPLED_TEXTS // ((2 + negatives) * schedule.batch_size)
        sample = self.sample(max(SAMPLED_STEPS, affordable))
        self.buckets = choose_buckets(
            [self._rows_needed(self._packings(rows)) for rows in sample],
            None if len(sample) == schedule.steps else (2 + negatives) * self.per_device,
            chunk_rows,
            row_buckets or most_buckets(schedule.steps, mesh.devices.flat[0].platform),
        )
        self.mean_tokens = self.mean_tokens_of(sample)  # for estimates

    def _hard(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mask [rows, N], places of the chosen ones in the store's arrays, row by row)."""
        starts = self.store.negative_starts[rows]
        counts = np.minimum(self.store.negative_starts[rows + 1] - starts, self.negatives)
        mask_BN = np.arange(self.negatives) < counts[:, None]
        places_BN = starts[:, None] + np.arange(self.negatives)
        return mask_BN, places_BN[mask_BN]

    def tokens(self, rows: np.ndarray) -> int:
        """Real tokens of these pairs, their hard negatives included."""
        _, places = self._hard(rows)
        return int(self.store.lengths[rows].sum() + self.store.negative_lengths[places].sum())

    def _packings(self, rows: np.ndarray) -> list:
        """For every device of the mesh, the packing of its texts.

        A device's texts are its queries, then its documents, then the hard negatives of its first
        pair, of its second, ...
        """
        packings = []
        for position in range(self.mesh.size):
            own_rows = self.own(rows, position)
            _, places = self._hard(own_rows)
            lengths = [
                self.store.lengths[own_rows].T.reshape(-1),
                self.store.negative_lengths[places],
            ]
            packings.append(pack(np.concatenate(lengths), self.row_length, self.texts_per_row))
        return packings

    def _rows_needed(self, packings: list) -> int:
        return max(packing.rows for packing in packings)

    def device_parts(self, step: int, rows: np.ndarray, positions: list[int]) -> list[PairBatch]:
        packings = self._packings(rows)
        needed = self._rows_needed(packings)
        bucket = next(bucket for bucket in self.buckets if bucket >= needed)
        return [
            self._device_part(step, self.own(rows, position), packings[position], bucket)
            for position in positions
        ]

    def _device_part(self, step: int, own_rows: np.ndarray, packing, bucket: int) -> PairBatch:
        pairs = self.per_device
        sequences = self.store.read(own_rows)
        texts = [pair[0] for pair in sequences] + [pair[1] for pair in sequences]
        for pair in sequences:
            texts += pair[2 : 2 + self.negatives]
        rows_RL = fill_rows(packing, texts, bucket, self.row_length, self.pad_id)
        shape = (*in_chunks(bucket, self.chunk_rows), self.row_length)
        token_CRL, text_index_CRL, position_CRL = (array.reshape(shape) for array in rows_RL)
        slot = packing.slot(self.texts_per_row)
        content = self.store.content_ids[own_rows]
        mask_BN, places = self._hard(own_rows)
        # Where a pair has fewer, the place is never read: any slot will do.
        document_slot_BM = np.zeros((pairs, 1 + self.negatives), np.int32)
        document_slot_BM[:, 0] = slot[pairs : 2 * pairs]
        document_slot_BM[:, 1:][mask_BN] = slot[2 * pairs :]
        document_id_BM2 = np.zeros((*document_slot_BM.shape, 2), np.int32)
        document_id_BM2[:, 0] = content[:, 1]
        document_id_BM2[:, 1:][mask_BN] = self.store.negative_ids[places]
        batch = PairBatch(
            token_CRL=token_CRL,
            text_index_CRL=text_index_CRL,
            position_CRL=position_CRL,
            query_slot_B=slot[:pairs],
            document_slot_BM=document_slot_BM,
            query_id_B2=content[:, 0],
            document_id_BM2=document_id_BM2,
            valid_BM=np.concatenate([np.ones((pairs, 1), bool), mask_BN], axis=1),
        )
        if self.teaching is None and not self.alone:
            return batch
        teaching = self.teaching or Teaching(self.store)
        teacher_query_BW, teacher_document_BW = teaching.vectors(own_rows)
        return FullPairBatch(
            **vars(batch),
            teacher_query_BW=teacher_query_BW,
            teacher_document_BW=teacher_document_BW,
            teacher_score_BM=teaching.scores(own_rows, mask_BN, places),
            in_batch_B=np.full(pairs, self.schedule.group(step).task not in self.alone),
        )


class MaskedBatches(Batches):
    """Batches of rows of documents, with tokens masked. All batches have one shape.

    Attributes:
      chunks, rows: chunks of a batch, and rows of a device in each.
    """

    def __init__(
        self,
        store: TokenStore,
        table: RowTable,
        schedule: Schedule,
        mesh: jax.sharding.Mesh,
        masking: Masking,
        vocabulary,
        seed: int,
        chunk_rows: int = 0,
    ):
        super().__init__(schedule, mesh, chunk_rows)
        self.store, self.table = store, table
        self.masking, self.vocabulary, self.seed = masking, vocabulary, seed
        self.chunks, self.rows = in_chunks(self.per_device, chunk_rows)
        self.mean_tokens = self.mean_tokens_of(self.sample(SAMPLED_STEPS))  # for estimates

    def tokens(self, rows: np.ndarray) -> int:
        return self.table.tokens(rows)

    def device_parts(self, step: int, rows: np.ndarray, positions: list[int]) -> list[MaskedBatch]:
        return [
            self.masked_rows(self.own(rows, position), step, position * self.per_device)
            for position in positions
        ]

    def masked_rows(self, rows: np.ndarray, step: int, first: int) -> MaskedBatch:
        """These rows with tokens masked; `rows[i]` is row `first` + i of the global batch."""
        numbers = np.unique(self.table.document[self.table.pieces(rows)])
        read = self.store.read(numbers)
        documents = {n: ids for n, (ids,) in zip(numbers.tolist(), read, strict=True)}
        filled = []
        for i, row in enumerate(rows.tolist()):
            token_L, text_index_L, position_L = self.table.fill(row, documents, self.vocabulary)
            token_L, column_P, target_P = self.masking.hide(token_L, self.seed, step, first + i)
            filled.append((token_L, text_index_L, position_L, column_P, target_P))
        spare = MaskedBatch(self.vocabulary.pad_id, PADDING, 0, 0, PADDING)

        def in_chunks_of(spare, *rows):
            array = np.full((self.chunks * self.rows, len(rows[0])), spare, np.int32)
            array[: len(rows)] = rows
            return array.reshape(self.chunks, self.rows, -1)

        return jax.tree.map(in_chunks_of, spare, *(MaskedBatch(*row) for row in filled))
