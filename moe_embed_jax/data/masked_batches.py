"""From step to device arrays for masked language modelling: rows of the schedule, tokens hidden."""

import jax
import numpy as np

from moe_embed_jax.data.batches import BatchArrays, in_chunks, prefetched
from moe_embed_jax.data.document_rows import RowTable
from moe_embed_jax.data.masking import Masking
from moe_embed_jax.data.schedule import MixedSchedule, Schedule
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import local_device_positions, rows_sharding
from moe_embed_jax.shapes import PADDING

SAMPLED_STEPS = 64


class MaskedBatches:
    """`MaskedBatches(...).at(step)` is the global batch of that step, the same on any mesh.

    Row i of the global batch belongs to mesh position i // (batch size / devices). All batches have
    one shape.

    Attributes:
      chunks, chunk_rows: chunks of a batch, and rows of a device in each.
      mean_tokens: real tokens of a batch, from a sample.
    """

    def __init__(
        self,
        store: TokenStore,
        table: RowTable,
        schedule: Schedule | MixedSchedule,
        mesh: jax.sharding.Mesh,
        masking: Masking,
        vocabulary,
        seed: int,
        chunk_rows: int = 0,
    ):
        """`chunk_rows`: rows that a device encodes at a time, at most; 0: all of them."""
        if schedule.batch_size % mesh.size:
            raise UserError(
                f"batch_size={schedule.batch_size} is not divisible by the {mesh.size} devices of "
                f"the mesh; choose a multiple of {mesh.size}"
            )
        self.store, self.table, self.schedule = store, table, schedule
        self.mesh, self.masking, self.vocabulary, self.seed = mesh, masking, vocabulary, seed
        self.rows_per_device = schedule.batch_size // mesh.size
        self.chunks, self.chunk_rows = in_chunks(self.rows_per_device, chunk_rows)
        sample = np.linspace(0, schedule.steps - 1, min(SAMPLED_STEPS, schedule.steps))
        tokens = [table.tokens(schedule.rows(int(step))) for step in sample]
        self.mean_tokens = float(np.mean(tokens))

    def at(self, step: int) -> BatchArrays:
        """Arrays of step `step` (0-based); reads only the rows of this process's devices."""
        rows = self.schedule.rows(step)
        count = self.rows_per_device
        parts = []
        for position in local_device_positions(self.mesh):
            first = position * count
            parts.append(self._device_arrays(rows[first : first + count], step, first))
        arrays = {}
        for name in parts[0]:
            own = np.concatenate([part[name] for part in parts], axis=1)
            placed = rows_sharding(self.mesh)
            arrays[name] = jax.make_array_from_process_local_data(placed, own)
        return BatchArrays(arrays, step, self.schedule.group(step), self.table.tokens(rows))

    def _device_arrays(self, rows: np.ndarray, step: int, first: int) -> dict[str, np.ndarray]:
        """Fields of `MaskedBatch`; row i of `rows` is row `first` + i of the global batch."""
        numbers = np.unique(self.table.document[self.table.pieces(rows)])
        read = self.store.read(numbers)
        documents = {n: ids for n, (ids,) in zip(numbers.tolist(), read, strict=True)}
        filled = []
        for i, row in enumerate(rows.tolist()):
            token_L, text_index_L, position_L = self.table.fill(row, documents, self.vocabulary)
            token_L, column_P, target_P = self.masking.hide(token_L, self.seed, step, first + i)
            filled.append((token_L, text_index_L, position_L, column_P, target_P))
        names = ("token", "text_index", "position", "column", "target")
        spare = {"token": self.vocabulary.pad_id, "text_index": PADDING, "target": PADDING}
        arrays = {}
        for name, part in zip(names, zip(*filled, strict=True), strict=True):
            letter = "P" if name in ("column", "target") else "L"
            array = np.full((self.chunks * self.chunk_rows, len(part[0])), spare.get(name, 0))
            array[: len(part)] = part
            arrays[f"{name}_CR{letter}"] = array.reshape(self.chunks, self.chunk_rows, -1).astype(
                np.int32
            )
        return arrays

    def iterate(self, start: int, stop: int):
        """Batches of steps start..stop-1, prepared in a thread while the device computes."""
        return prefetched(self.at, start, stop)
