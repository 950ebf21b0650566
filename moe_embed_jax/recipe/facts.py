"""What a finished recipe left behind, read from its files."""

import dataclasses
import pathlib

import numpy as np

from moe_embed_jax import config as config_files
from moe_embed_jax import storage
from moe_embed_jax.evaluation.heldout_documents import HeldOutDocuments, geometric_mean
from moe_embed_jax.evaluation.heldout_retrieval import HeldOutRetrieval
from moe_embed_jax.evaluation.model_scores import BM25
from moe_embed_jax.json_file import read_object
from moe_embed_jax.models.encoder import EncoderConfig, count_params
from moe_embed_jax.pairs.manifest import read_manifest
from moe_embed_jax.recipe.config import STAGES
from moe_embed_jax.recipe.inputs import WHOLE, means_of
from moe_embed_jax.recipe.records import Records
from moe_embed_jax.recipe.steps import Step, models_of
from moe_embed_jax.stages.registry import STAGES as STAGE_OF
from moe_embed_jax.training.finished import RESULTS_FILE
from moe_embed_jax.training.records import METRICS_FILE, read_records

TRAINED = "trained"  # of the columns of results.json


@dataclasses.dataclass(frozen=True)
class Training:
    """A stage: its parameters, its metrics. perplexity: column -> pseudo-perplexity, of stage 1."""

    total: int
    active: int
    batch_size: int
    unit: str  # that batch_size counts
    loss_S: np.ndarray
    tokens: int
    perplexity: dict[str, float]

    @property
    def final_loss(self) -> float:
        """Mean over the last tenth of the steps."""
        return float(self.loss_S[-max(1, len(self.loss_S) // 10) :].mean())


@dataclasses.dataclass(frozen=True)
class Facts:
    """scores: model -> dimensions -> set -> metrics, means over languages. pairs: step -> manifest
    of what it wrote. models: folders, the last one is the result. merged: steps of the checkpoints.
    beside: (what it is, dimensions -> set -> metrics) of the last model of another recipe."""

    seconds: dict[str, float]
    pairs: dict[str, dict]
    filtered: dict
    mined: dict
    stages: dict[str, Training]
    scores: dict[str, dict[str, dict[str, dict]]]
    exported_bytes: int
    models: tuple[str, ...]
    merged: tuple[int, ...]
    beside: tuple[str, dict] | None

    def ndcg(self, model: str, dim: str, name: str) -> float | None:
        of_model = self.scores.get(model, {})
        found = of_model.get(WHOLE if model == BM25 else dim, {}).get(name)
        return None if found is None else found[HeldOutRetrieval.metric.key]


def collect(
    steps: list[Step], workdir: pathlib.Path, beside: tuple[str, dict] | None = None
) -> Facts:
    """`beside`: `inputs.last_scores` of another recipe."""
    records = Records(workdir)
    by_name = {step.name: step for step in steps}
    folders = {"prepare": "pairs", "filter": "filtered", "mine": "mined"}
    export = workdir / "export"
    return Facts(
        seconds={step.name: records.read(step.name)["seconds"] for step in steps},
        pairs={step: read_manifest(workdir / folder) for step, folder in folders.items()},
        filtered=_curation_report(workdir / "filtered"),
        mined=_curation_report(workdir / "mined"),
        stages={name: _training(workdir / name) for name in STAGES if name in by_name},
        scores=_scores(by_name["evaluate"]) if "evaluate" in by_name else {},
        exported_bytes=sum(path.stat().st_size for path in export.rglob("*") if path.is_file()),
        models=(*models_of(steps),),
        merged=tuple(by_name["merge"].arguments["steps"]) if "merge" in by_name else (),
        beside=beside,
    )


def _curation_report(folder: pathlib.Path) -> dict:
    """The work folder has it too, and had it first."""
    paths = [folder / "report.json", folder.with_name(f"{folder.name}.work") / "report.json"]
    return next((read_object(path) for path in paths if storage.has_entry(path)), {})


def _training(folder: pathlib.Path) -> Training:
    card = read_object(folder / "config.json")
    total, active = count_params(config_files.build(EncoderConfig, card["model"], "model"))
    records = read_records(folder / METRICS_FILE)
    results = read_object(folder / RESULTS_FILE)
    columns = sorted(results, key=lambda name: name == TRAINED)  # before and after
    stage = STAGE_OF[card["objective"]]
    perplexity = {
        name: geometric_mean(results[name].values())
        for name in columns
        if all(HeldOutDocuments.metric.key in metrics for metrics in results[name].values())
    }
    return Training(
        total,
        active,
        card["batch_size"],
        stage.unit,
        np.array([record[stage.loss_name] for record in records]),
        sum(int(record["tokens"]) for record in records),
        perplexity,
    )


def _scores(step: Step) -> dict:
    scores = {}
    for command in step.commands:
        content = read_object(command.output)
        model = command.output.stem
        dim = WHOLE if model == BM25 else step.arguments.get("dim", WHOLE)
        scores[model] = means_of(content, dim)
    return scores
