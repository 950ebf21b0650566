"""What an objective has to provide to be trained, planned and evaluated.

A new objective is a file beside contrastive.py, a config class in training/run_config.py, and a
line in registry.py. Training (training/loop.py, training/step.py), evaluation
(training/evaluation.py) and planning (planning/steps.py) use only what stands here.
"""

import dataclasses
import pathlib
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moe_embed_jax.data.batches import Batches
from moe_embed_jax.errors import UserError
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.routing.router import balance_loss, routing_metrics


class Stage(Protocol):
    """What is compiled: the loss and its parameters. A frozen dataclass, so that it is hashable."""

    objective: ClassVar[str]  # its name in configs
    unit: ClassVar[str]  # what `batch_size` counts: "pairs"
    loss_name: ClassVar[str]  # the metric that is its own loss, without the balance of the routers
    Batch: type  # a dataclass of arrays, see data/batches.py
    model: EncoderConfig

    @property
    def rules(self) -> tuple:
        """Sharding rules of all parameters, see sharding.py."""

    def extra_params(self, key: jax.Array) -> dict:
        """Fresh parameters beside the encoder: {"head": ...}, or the temperature and the projection
        of distillation."""

    def loss_and_metrics(self, params: dict, batch) -> tuple[jax.Array, dict]:
        """Total loss (float32 scalar) and metrics of one batch; `params` as of `TrainState`."""

    def clip(self, params: dict) -> dict:
        """`params` after an update, within their bounds."""

    @classmethod
    def open(cls, config, workdir: pathlib.Path, mesh, is_writer: bool) -> "StageRun":
        """The stage with the data of a run, which are prepared if need be. Every process calls
        this."""

    @classmethod
    def workload(cls, config, mesh, query_tokens: float, document_tokens: float) -> "Workload":
        """A typical training step of `config`, for the planner.

        Args:
          query_tokens, document_tokens: mean lengths, used where no data are prepared.
        """

    @staticmethod
    def longest_document(config) -> int:
        """Tokens of the longest document that is embedded."""

    @staticmethod
    def memory_advice(config, chunk_rows: int) -> list[str]:
        """What makes the activations of a step that does not fit smaller.

        Args:
          chunk_rows: a smaller value of data.chunk_rows.
        """


class StageRun(Protocol):
    """A stage with the data of one run.

    batches: `iterate(start, stop)`, see `Batches`. data_spec: what decides them, for checkpoints.
    """

    stage: Stage
    batches: Batches
    data_spec: dict

    def describe(self) -> str:
        """What the run says about itself before it starts."""

    def held_out(self) -> "HeldOut":
        """What the run is evaluated on."""

    def trained_model(self, params: dict):
        """What `HeldOut` evaluates: the model with these parameters."""


class HeldOut(Protocol):
    """Held-out data and the metric on them: evaluation/heldout_retrieval.py, heldout_documents.py.

    metric: how a run is judged. folder: of the sets, for people. sets: by name; may be empty.
    """

    metric: object
    folder: object
    sets: dict

    def evaluate(self, model, every_language: bool) -> dict[str, dict]:
        """{"<set>/<language>": metrics}; of a sample of the languages unless `every_language`."""

    def scores(self, results: dict[str, dict], every_language: bool) -> dict[str, float]:
        """{"<metric>/<set>": mean over languages} of what `evaluate` returned."""

    def baselines(self) -> dict[str, dict]:
        """{column: results} to compare the model with."""

    def table(self, columns: dict[str, dict]):
        """A rich table of {column: results}."""

    def examples(self, model) -> list:
        """Lines that show what the model does."""

    def expert_shares(self, model) -> dict[str, np.ndarray]:
        """{language: share of assignments [Y, E]} (Y layers with E experts)."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """The shape and the work of a typical training step.

    chunks (C) of `rows` rows per device. tokens: real ones of the global batch.
    batch_shapes: of every field of the stage's `Batch`.
    model_flops: of one step over all devices, of `work`. note: a line for the reader.
    """

    stage: Stage
    chunks: int
    rows: int
    tokens: float
    batch_shapes: dict[str, tuple[int, ...]]
    model_flops: float
    work: str
    note: str


def slot_metrics(text_index_CRL) -> dict:
    """`utilisation`, the share of slots that hold a token, and the number of `tokens`."""
    valid_CRL = text_index_CRL >= 0
    return {"utilisation": jnp.mean(valid_CRL.astype(jnp.float32)), "tokens": jnp.sum(valid_CRL)}


def add_balance(loss, metrics: dict, weight: float, statistics, balanced) -> tuple[jax.Array, dict]:
    """(total loss, all metrics): with experts `weight` times the balance loss is added.

    Args:
      statistics: of the routers, for the whole batch; None without experts.
      balanced: the statistics that the balance loss is of: these, or each device's.
    """
    if statistics is not None:
        balance = balance_loss(balanced)
        loss += weight * balance
        metrics = metrics | {"balance": balance} | routing_metrics(statistics)
    return loss, metrics | {"loss": loss}


def check_divisible(config, mesh) -> None:
    """Raises `UserError` if the mesh of a plan does not divide the batch."""
    if config.batch_size % mesh.size:
        raise UserError(
            f"batch_size={config.batch_size} is not divisible by the {mesh.size} chips of the "
            f"topology; choose a multiple of {mesh.size}"
        )
