"""The contrastive objective of a run (stages 2 and 3): its data, batches, step and evaluation.

What `loop.py` asks of an objective is what this class and `MaskedLM` (masked_lm.py) both have.
"""

import pathlib

import numpy as np

from moe_embed_jax.data.batches import Batches
from moe_embed_jax.data.schedule import Group, Schedule, mixture_groups
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.embedder import Embedder
from moe_embed_jax.errors import UserError
from moe_embed_jax.processes import process_0_first
from moe_embed_jax.training import report
from moe_embed_jax.training import workdir as workdir_module
from moe_embed_jax.training.overview import describe_run
from moe_embed_jax.training.run_config import RunConfig
from moe_embed_jax.training.state import TrainState
from moe_embed_jax.training.step import Batch, StepConfig, jit_train_step

SAME = "a batch is of one source and language, and there all queries or all documents are one text"


class Contrastive:
    """
    Attributes:
      batches: `iterate(start, stop)` gives `BatchArrays`.
      data_spec: what decides the batches, for checkpoints.
      step_config: of the training step and its state.
    """

    def __init__(self, config: RunConfig, workdir: pathlib.Path, mesh, is_writer: bool):
        """Prepares the data if need be. Every process calls this."""
        self._config, self._workdir, self._mesh, self._is_writer = config, workdir, mesh, is_writer
        store, self._vocabulary = process_0_first(
            "data", lambda: workdir_module.open_data(workdir, config, write=is_writer)
        )
        data = config.data
        groups = mixture_groups(store.groups, data.rates)
        self._constant = groups_without_negatives(store, groups, config.batch_size, data.negatives)
        if len(self._constant) == len(groups):
            alone = "a batch is one pair, and none has hard negatives"
            raise UserError(
                f"no pair of {store.folder} has a negative in its batch (batch_size="
                f"{config.batch_size}, data.negatives={data.negatives}): "
                f"{alone if config.batch_size == 1 else SAME}, so the loss is always 0; use other "
                "pairs, larger batches or hard negatives"
            )
        schedule = Schedule(
            groups, config.batch_size, config.steps, config.seed, data.language_exponent
        )
        self.batches = Batches(
            store,
            schedule,
            mesh,
            data.row_length,
            data.texts_per_row,
            self._vocabulary.pad_id,
            data.chunk_rows,
            data.negatives,
        )
        self.data_spec = workdir_module.data_spec(store, config)
        self.step_config = StepConfig(config.model, config.loss, data.texts_per_row)

    def jit_train_step(self, optimizer):
        """`step(state, arrays of a batch) -> (state, metrics)`, compiled."""
        step = jit_train_step(self.step_config, optimizer, self._mesh)
        return lambda state, arrays: step(state, Batch(**arrays))

    def describe(self) -> str:
        """What the run says about itself before it starts."""
        lines = describe_run(self._config, self.batches, self._mesh)
        if self._constant:
            names = ", ".join(group.name for group in self._constant[:5])
            more = f" and {len(self._constant) - 5} more" if len(self._constant) > 5 else ""
            lines += f"\nWARNING: the loss of {names}{more} is always 0: {SAME}"
        return lines

    def judge(self) -> report.Judge:
        """Evaluates the run."""
        return report.Judge(self._workdir, self._config, self._is_writer)

    def trained_model(self, state: TrainState) -> Embedder:
        """What the judge evaluates."""
        data = self._config.data
        lengths = {"query": data.query_length, "document": data.document_length}
        return Embedder(self._config.model, state.params, self._vocabulary, lengths, self._mesh)


def groups_without_negatives(
    store: TokenStore, groups: list[Group], batch_size: int, hard_negatives: int
) -> list[Group]:
    """The groups whose batches never hold a negative for any pair.

    Args:
      hard_negatives: of a pair, at most, that the run uses.
    """
    found = []
    for group in groups:
        first, last = store.negative_starts[[group.start, group.stop]]
        if hard_negatives and last > first:
            continue
        ids_N22 = store.content_ids[group.start : group.stop]
        # A few rows tell it of nearly every group.
        if batch_size == 1 or (_same_side(ids_N22[:100]) and _same_side(ids_N22)):
            found.append(group)
    return found


def _same_side(ids_N22: np.ndarray) -> bool:
    """Whether all queries, or all documents, are one text."""
    return bool((ids_N22 == ids_N22[:1]).all(axis=(0, 2)).any())
