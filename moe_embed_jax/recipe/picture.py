"""report.png of a recipe: the loss of each stage, what became of the pairs, the evaluations."""

import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_embed_jax import storage
from moe_embed_jax.evaluation.model_scores import BM25
from moe_embed_jax.recipe.config import MERGED
from moe_embed_jax.recipe.facts import Facts

COLOURS = {
    BM25: "0.7",
    "stage1": "C7",
    "stage2": "C0",
    "stage3": "C2",
    MERGED: "C1",
    "stage4": "C3",
}
MASKED_TITLE = "masked language modelling"
TITLES = {
    "stage1": MASKED_TITLE,
    "stage2": "contrastive",
    "stage3": "fine-tuning",
    "stage4": "further",
}


def draw(path: pathlib.Path, facts: Facts) -> None:
    figure = Figure(figsize=(13, 7), layout="constrained")
    grid = figure.add_gridspec(2, len(facts.stages))
    for column, name in enumerate(facts.stages):
        axes = figure.add_subplot(grid[0, column])
        loss_S = facts.stages[name].loss_S
        step_S = np.arange(1, len(loss_S) + 1)
        axes.plot(step_S, loss_S, ".", markersize=3, color="0.7")
        # A running mean, so that batches of other languages do not hide the way down.
        width = max(1, len(loss_S) // 20)
        mean = np.convolve(loss_S, np.ones(width) / width, "valid")
        axes.plot(step_S[width - 1 :], mean, color=COLOURS[name])
        axes.set(title=f"stage {name[-1]}: {TITLES[name]}", xlabel="step", ylabel="loss (nats)")
        axes.set_ylim(0, 1.05 * loss_S.max())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _draw_pairs(figure.add_subplot(grid[1, 0]), facts)
    if facts.scores:
        _draw_scores(figure.add_subplot(grid[1, 1:]), facts)
    with storage.written_whole(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _draw_pairs(axes, facts: Facts) -> None:
    counts = {step: facts.pairs[step]["rows"] for step in ("prepare", "filter", "mine")}
    labels = ["prepared", "kept by the filter", "to fine-tune on"]
    axes.barh(labels, list(counts.values()), color="C0")
    for place, count in enumerate(counts.values()):
        axes.text(count, place, f" {count:,}", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(title="Pairs")


def _draw_scores(axes, facts: Facts) -> None:
    models = [BM25, *facts.models]
    of_last = facts.scores[facts.models[-1]]
    exact = [dim for dim in of_last if " " not in dim]  # not those of compressed indexes
    rows = [(name, dim) for dim in exact for name in of_last[dim]]
    rows.sort(key=lambda row: row[0])
    place = np.arange(len(rows))
    for i, model in enumerate(models):
        values = [facts.ndcg(model, dim, name) for name, dim in rows]
        height = [np.nan if value is None else value for value in values]
        label = {BM25: "BM25", MERGED: MERGED}.get(model, f"stage {model[-1]}")
        bar = 0.8 / len(models)
        left = place + bar * (i - (len(models) - 1) / 2)
        axes.bar(left, height, 0.95 * bar, label=label, color=COLOURS[model])
    axes.set_xticks(place, [f"{name}\n{dim} dimensions" for name, dim in rows])
    axes.set(title="Evaluation: nDCG@10, means over languages", ylim=(0, 1))
    axes.legend(fontsize=8, ncols=4)
