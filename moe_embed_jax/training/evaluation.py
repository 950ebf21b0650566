"""How good the model is and how it got there: evaluations during the run, the report at its end.

What is measured is the stage's `HeldOut` (stages/stage.py): its sets, its metric, its table.
"""

import pathlib

import numpy as np
from rich.console import Console

from moe_embed_jax.config import save_json
from moe_embed_jax.processes import wait_for_all
from moe_embed_jax.training.finished import RESULTS_FILE
from moe_embed_jax.training.records import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    append_record,
    read_records,
)
from moe_embed_jax.training.run_config import Run

ROUTING_FILE = "routing.json"
PICTURE_FILE = "report.png"


class Evaluator:
    """Evaluates one run on the held-out data of its stage; keeps the records in its folder.

    Every process calls its methods: what is encoded is encoded on the mesh; process 0 writes.
    """

    def __init__(
        self, workdir: pathlib.Path, config: Run, held_out, loss_name: str, is_writer: bool
    ):
        """
        Args:
          held_out: a `HeldOut`.
          loss_name: of the stage's own loss in metrics.jsonl, for the picture.
        """
        self.workdir = workdir
        self.config = config
        self.held_out = held_out
        self.loss_name = loss_name
        self.is_writer = is_writer
        self.model = None
        self._routing: dict[str, np.ndarray] = {}  # known at the end of a run
        if is_writer and not held_out.sets:
            print(f"evaluation  none: there are no held-out sets in {held_out.folder}")

    def use(self, model) -> None:
        """The model for `report`, instead of an evaluation that was recorded before."""
        self.model = model

    def evaluate(self, model, step: int, every_language: bool) -> dict[str, float]:
        """Evaluates now; returns {"<metric>/<set>": mean over the languages evaluated}.

        Empty, and nothing is recorded, where there is nothing to evaluate on.
        """
        self.model = model
        results = self.held_out.evaluate(model, every_language)
        if not results:
            return {}
        if self.is_writer:
            record = {"step": step, "complete": every_language, "sets": results}
            append_record(self.workdir / EVALUATIONS_FILE, record)
        return self.held_out.scores(results, every_language)

    def report(self) -> None:
        """Writes results.json ({} if nothing was evaluated), and routing.json of a model with
        experts ({language: each layer's shares of the assignments}); prints the table and some
        examples. `draw` comes after it.
        """
        self._routing = {}
        if self.config.model.moe_every:
            self._routing = self.held_out.expert_shares(self.model)
        examples = self.held_out.examples(self.model)
        if self.is_writer:
            if self._routing:
                shares = {language: share.tolist() for language, share in self._routing.items()}
                save_json(self.workdir / ROUTING_FILE, shares)
            columns = self._columns()
            save_json(self.workdir / RESULTS_FILE, columns)  # also says that the run is finished
            if columns:
                console = Console(width=110)
                console.print(self.held_out.table(columns))
                for line in examples:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
            print(f"Picture, metrics and checkpoints are in {self.workdir}/")
        # BM25 takes a while on large sets, and a process that is done waits only so long at its
        # exit for the others.
        wait_for_all("report")

    def draw(self) -> None:
        """Writes report.png, also of a run that was stopped: what there is of it."""
        records = read_records(self.workdir / METRICS_FILE) if self.is_writer else []
        if records:
            from moe_embed_jax.training import pictures  # matplotlib takes a third of a second

            pictures.draw_report(
                self.workdir / PICTURE_FILE,
                self.config,
                records,
                self._evaluations(),
                self._routing,
                self.loss_name,
                self.held_out.metric,
            )

    def _evaluations(self) -> list[dict]:
        return read_records(self.workdir / EVALUATIONS_FILE) if self.held_out.sets else []

    def _columns(self) -> dict[str, dict]:
        """{column of the table: {set: metrics}}: baselines, the model before and after training."""
        complete = [record for record in self._evaluations() if record["complete"]]
        if not complete:
            return {}
        columns = self.held_out.baselines()
        if complete[0]["step"] == 0:
            start = "before" if self.config.init.source else "untrained"
            columns[start] = complete[0]["sets"]
        columns["trained"] = complete[-1]["sets"]
        return columns
