"""report.png: how a run went. Loss, held-out quality, learning rate and gradients, experts."""

import pathlib

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display on a TPU VM
import matplotlib.pyplot as plt

from moe_embed_jax.training import expert_pictures
from moe_embed_jax.training.journal import main_loss
from moe_embed_jax.training.run_config import Run

WIDTH = 13.0  # inches
CURVES_HEIGHT = 3.6  # inches of a row of curves
MANY = 500  # steps: smaller dots
# Metric of an evaluation -> what it measures, and its name.
QUALITIES = {
    "ndcg_at_10": ("retrieval", "nDCG@10"),
    "perplexity": ("documents", "pseudo-perplexity"),
}


def draw_report(
    path: pathlib.Path,
    config: Run,
    records: list[dict],
    evaluations: list[dict],
    share_by_language: dict[str, np.ndarray],
) -> None:
    """Draws a run, finished or not; what it does not have (experts, evaluations) takes no room.

    Args:
      records: lines of metrics.jsonl, of one step at least.
      evaluations: lines of evaluations.jsonl.
      share_by_language: language -> share of assignments [M, E] (M MoE layers); may be empty.
    """
    has_experts = "expert_load" in records[0]
    maps = expert_pictures.maps(config.model, records, share_by_language) if has_experts else []
    curves = [lambda axes: _draw_loss(axes, records)]
    if evaluations:
        curves.append(lambda axes: _draw_quality(axes, evaluations))
    curves.append(lambda axes: _draw_rates(axes, config, records))
    if has_experts:
        curves.append(lambda axes: expert_pictures.draw_use(axes, config, records))
    rows = -(-len(curves) // 2)
    heights = [CURVES_HEIGHT * rows, *(each.height for each in maps)]
    figure = plt.figure(figsize=(WIDTH, sum(heights) + 0.4), layout="constrained")
    # A part of the figure each, so that the width of one does not depend on labels of another.
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    grid = parts[0].add_gridspec(rows, 2)
    for i, draw in enumerate(curves):
        alone = i == len(curves) - 1 and i % 2 == 0
        draw(parts[0].add_subplot(grid[i // 2, :] if alone else grid[i // 2, i % 2]))
    for part, each in zip(parts[1:], maps, strict=True):
        each.draw(part)
    last = records[-1]["step"]
    end = "" if last == config.steps else f", stopped after step {last:,} of {config.steps:,}"
    figure.suptitle(f"{path.parent.name}{end}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_loss(axes, records: list[dict]) -> None:
    by_source: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        source = record["group"].split("/")[0]
        by_source.setdefault(source, []).append((record["step"], main_loss(record)))
    for source, points in by_source.items():
        step, loss = np.array(points, float).T
        axes.plot(step, loss, ".", markersize=_marker_size(records), label=source)
    axes.set(title="Training loss of each batch, by source", ylabel="loss (nats)")
    axes.set_ylim(bottom=0)
    expert_pictures.steps_along(axes)
    # The best place is slow to find among many points, and losses fall.
    place = "best" if len(records) < MANY else "upper right"
    axes.legend(fontsize=8, loc=place, markerscale=8 / (1 + _marker_size(records)))


def _draw_quality(axes, evaluations: list[dict]) -> None:
    """Mean of the metric over the languages that every evaluation contains."""
    metrics = [metrics for evaluation in evaluations for metrics in evaluation["sets"].values()]
    metric = next((m for m in QUALITIES if metrics and m in metrics[0]), "ndcg_at_10")
    names = [set(evaluation["sets"]) for evaluation in evaluations]
    common = set.intersection(*names)
    curves: dict[str, list[tuple[int, float]]] = {}
    for evaluation in evaluations:
        for set_name in sorted({name.split("/")[0] for name in evaluation["sets"]}):
            members = [name for name in evaluation["sets"] if name.split("/")[0] == set_name]
            members = [name for name in members if name in common] or members
            mean = np.mean([evaluation["sets"][name][metric] for name in members])
            curves.setdefault(set_name, []).append((evaluation["step"], mean))
    for set_name, points in curves.items():
        step, value = np.array(points).T
        axes.plot(step, value, "o-", markersize=3, label=set_name)
    subject, name = QUALITIES[metric]
    axes.set(title=f"Held-out {subject} (languages of every evaluation)", ylabel=name)
    if metric == "ndcg_at_10":
        axes.set_ylim(0, 1)
    else:
        axes.set_yscale("log")
    expert_pictures.steps_along(axes)
    axes.legend(fontsize=8)


def _draw_rates(axes, config: Run, records: list[dict]) -> None:
    """Learning rate, and the norm of the gradient on an axis of its own."""
    step = [record["step"] for record in records]
    norm = np.array([record["grad_norm"] for record in records], float)
    drawn = np.isfinite(norm) & (norm > 0)
    twin = axes.twinx()
    if drawn.any():
        size = _marker_size(records)
        twin.plot(np.array(step)[drawn], norm[drawn], ".", color="0.6", markersize=size)
        twin.set_yscale("log")
    twin.axhline(config.optimizer.clip_norm, color="0.6", linewidth=0.8, linestyle="--")
    twin.set_ylabel("gradient norm (dashed: clipped)", color="0.4")
    rate = [record.get("learning_rate", np.nan) for record in records]  # older runs have none
    axes.plot(step, rate, color="C0")
    axes.set_zorder(twin.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.set(title=f"Learning rate ({config.optimizer.schedule}) and gradient")
    axes.set_ylabel("learning rate", color="C0")
    axes.set_ylim(bottom=0)
    expert_pictures.steps_along(axes)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _marker_size(records: list[dict]) -> float:
    return 4.0 if len(records) < MANY else 1.5
