"""Masked language modelling as the objective of a run (stage 1): data, batches, step, evaluation.

The counterpart of contrastive.py.
"""

import pathlib

from moe_embed_jax.data.data_spec import held_out_path
from moe_embed_jax.data.document_rows import row_table
from moe_embed_jax.data.masked_batches import MaskedBatches
from moe_embed_jax.data.masking import make_masking
from moe_embed_jax.data.schedule import MixedSchedule, Schedule
from moe_embed_jax.evaluation.pseudo_perplexity import MaskedModel
from moe_embed_jax.processes import process_0_first
from moe_embed_jax.training import workdir as workdir_module
from moe_embed_jax.training.masked_report import MaskedJudge
from moe_embed_jax.training.masked_step import MaskedBatch, MaskedStepConfig, jit_train_step
from moe_embed_jax.training.overview import describe_masked_run
from moe_embed_jax.training.run_config import MaskedRunConfig
from moe_embed_jax.training.state import HEAD, TrainState, encoder_params


class MaskedLM:
    """
    Attributes:
      batches: `iterate(start, stop)` gives `BatchArrays`.
      data_spec: what decides the batches, for checkpoints.
      step_config: of the training step and its state.
    """

    def __init__(self, config: MaskedRunConfig, workdir: pathlib.Path, mesh, is_writer: bool):
        """Prepares the data if need be. Every process calls this."""
        self._config, self._workdir, self._mesh, self._is_writer = config, workdir, mesh, is_writer
        store, self._vocabulary = process_0_first(
            "data", lambda: workdir_module.open_data(workdir, config, write=is_writer)
        )
        data, loss = config.data, config.loss
        masking = make_masking(self._vocabulary, loss.mask_rate, loss.mask_share, loss.random_share)
        table = row_table(
            store.lengths[:, 0], store.groups, data.row_length, config.seed, data.across_documents
        )
        kind = Schedule if data.one_language else MixedSchedule
        schedule = kind(
            list(table.groups), config.batch_size, config.steps, config.seed, data.language_exponent
        )
        self.batches = MaskedBatches(
            store, table, schedule, mesh, masking, self._vocabulary, config.seed, data.chunk_rows
        )
        self.data_spec = workdir_module.documents_spec(store, config)
        self.step_config = MaskedStepConfig(config.model, config.loss, self._vocabulary.size)

    def jit_train_step(self, optimizer):
        """`step(state, arrays of a batch) -> (state, metrics)`, compiled."""
        step = jit_train_step(self.step_config, optimizer, self._mesh)
        return lambda state, arrays: step(state, MaskedBatch(**arrays))

    def describe(self) -> str:
        """What the run says about itself before it starts."""
        return describe_masked_run(self._config, self.batches, self._mesh)

    def judge(self) -> MaskedJudge:
        """Evaluates the run."""
        config = self._config
        folder = held_out_path(config.data.preparation(), config.data.dir)
        return MaskedJudge(self._workdir, config, folder, self._is_writer)

    def trained_model(self, state: TrainState) -> MaskedModel:
        """What the judge evaluates."""
        params, head = encoder_params(state.params), state.params[HEAD]
        return MaskedModel(self._config.model, params, head, self._vocabulary, self._mesh)
