"""report.png: how a run went. Loss, held-out quality, learning rate and gradients, experts."""

import pathlib

import numpy as np
from matplotlib.figure import Figure

from moe_embed_jax import storage
from moe_embed_jax.evaluation.heldout import Metric
from moe_embed_jax.training import expert_pictures
from moe_embed_jax.training.run_config import Run

WIDTH = 13.0  # inches
CURVES_HEIGHT = 3.6  # inches of a row of curves
MANY = 500  # steps: smaller dots


def draw_report(
    path: pathlib.Path,
    config: Run,
    records: list[dict],
    evaluations: list[dict],
    share_by_language: dict[str, np.ndarray],
    loss_name: str,
    metric: Metric,
) -> None:
    """Draws a run, finished or not; what it does not have (experts, evaluations) takes no room.

    Args:
      records: lines of metrics.jsonl, of one step at least.
      evaluations: lines of evaluations.jsonl.
      share_by_language: language -> share of assignments [Y, E] (Y MoE layers); may be empty.
      loss_name: of the stage's own loss in `records`. metric: of the evaluations.
    """
    has_experts = "expert_load" in records[0]
    maps = expert_pictures.maps(config.model, records, share_by_language) if has_experts else []
    curves = [lambda axes: _draw_loss(axes, records, loss_name)]
    if evaluations:
        curves.append(lambda axes: _draw_evaluations(axes, evaluations, metric))
    curves.append(lambda axes: _draw_rates(axes, config, records))
    if has_experts:
        curves.append(lambda axes: expert_pictures.draw_use(axes, config, records))
    rows = -(-len(curves) // 2)
    heights = [CURVES_HEIGHT * rows, *(each.height for each in maps)]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.4), layout="constrained")
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
    with storage.written_whole(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _draw_loss(axes, records: list[dict], loss_name: str) -> None:
    by_source: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        source = record["group"].split("/")[0]
        by_source.setdefault(source, []).append((record["step"], record[loss_name]))
    for source, points in by_source.items():
        step, loss = np.array(points, float).T
        axes.plot(step, loss, ".", markersize=_marker_size(records), label=source)
    axes.set(title="Training loss of each batch, by source", ylabel="loss (nats)")
    axes.set_ylim(bottom=0)
    expert_pictures.steps_along(axes)
    # The best place is slow to find among many points, and losses fall.
    place = "best" if len(records) < MANY else "upper right"
    axes.legend(fontsize=8, loc=place, markerscale=8 / (1 + _marker_size(records)))


def _draw_evaluations(axes, evaluations: list[dict], metric: Metric) -> None:
    """Mean of the metric over the languages that every evaluation contains."""
    names = [set(evaluation["sets"]) for evaluation in evaluations]
    common = set.intersection(*names)
    curves: dict[str, list[tuple[int, float]]] = {}
    for evaluation in evaluations:
        for set_name in sorted({name.split("/")[0] for name in evaluation["sets"]}):
            members = [name for name in evaluation["sets"] if name.split("/")[0] == set_name]
            members = [name for name in members if name in common] or members
            mean = np.mean([evaluation["sets"][name][metric.key] for name in members])
            curves.setdefault(set_name, []).append((evaluation["step"], mean))
    for set_name, points in curves.items():
        step, value = np.array(points).T
        axes.plot(step, value, "o-", markersize=3, label=set_name)
    title = f"Held-out {metric.subject} (languages of every evaluation)"
    axes.set(title=title, ylabel=metric.name)
    if metric.is_log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1)
    expert_pictures.steps_along(axes)
    axes.legend(fontsize=8)


def _draw_rates(axes, config: Run, records: list[dict]) -> None:
    """Learning rate, and the norm of the gradient on a second axis."""
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
