"""report.png: loss, held-out quality, and which experts each language uses."""

import pathlib

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display on a TPU VM
import matplotlib.pyplot as plt

from moe_embed_jax.training.journal import main_loss

QUALITIES = {"ndcg_at_10": "nDCG@10", "perplexity": "pseudo-perplexity"}


def draw_report(
    path: pathlib.Path,
    records: list[dict],
    evaluations: list[dict],
    share_by_language: dict[str, np.ndarray],
) -> None:
    """Draws the run.

    Args:
      records: lines of metrics.jsonl.
      evaluations: lines of evaluations.jsonl.
      share_by_language: language -> share of assignments [M, E] (M MoE layers).
    """
    languages = len(share_by_language)
    figure = plt.figure(figsize=(13, 4.6 + 0.16 * languages), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[4.2, max(0.16 * languages, 0.1)])
    _draw_loss(figure.add_subplot(grid[0, 0]), records)
    _draw_quality(figure.add_subplot(grid[0, 1]), evaluations)
    if share_by_language:
        _draw_routing(figure, figure.add_subplot(grid[1, :]), share_by_language)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_loss(axes, records: list[dict]) -> None:
    by_source: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        source = record["group"].split("/")[0]
        by_source.setdefault(source, []).append((record["step"], main_loss(record)))
    for source, points in by_source.items():
        step, loss = np.array(points).T
        axes.plot(step, loss, ".", markersize=3, label=source)
    if records and "balance" in records[0]:
        twin = axes.twinx()
        steps = [record["step"] for record in records]
        twin.plot(steps, [r["balance"] for r in records], color="0.6", linewidth=0.8)
        twin.set_ylabel("balance loss (grey; 1 = perfect)")
    axes.set(title="Training loss per source", xlabel="step", ylabel="loss (nats)")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _draw_quality(axes, evaluations: list[dict]) -> None:
    """Mean of the metric over the languages that every evaluation contains."""
    metrics = [metrics for evaluation in evaluations for metrics in evaluation["sets"].values()]
    metric = next((m for m in QUALITIES if metrics and m in metrics[0]), "ndcg_at_10")
    names = [set(evaluation["sets"]) for evaluation in evaluations]
    common = set.intersection(*names) if names else set()
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
    axes.set(title="Held-out quality (languages of every evaluation)", xlabel="step")
    axes.set_ylabel(QUALITIES[metric])
    if metric == "ndcg_at_10":
        axes.set_ylim(0, 1)
    else:
        axes.set_yscale("log")
    if curves:
        axes.legend(fontsize=8)


def _draw_routing(figure, axes, share_by_language: dict[str, np.ndarray]) -> None:
    languages = sorted(share_by_language)
    share = np.stack([share_by_language[language] for language in languages])  # [languages, M, E]
    layers, experts = share.shape[1:]
    image = axes.imshow(
        share.reshape(len(languages), layers * experts), aspect="auto", vmin=0, cmap="viridis"
    )
    axes.set_yticks(range(len(languages)), languages, fontsize=7)
    ticks = [f"{layer + 1}:{expert}" for layer in range(layers) for expert in range(experts)]
    axes.set_xticks(range(layers * experts), ticks, fontsize=7)
    for layer in range(1, layers):
        axes.axvline(layer * experts - 0.5, color="white", linewidth=2)
    axes.set(
        title="Share of token assignments per expert (columns, MoE layer:expert) and language",
        xlabel="MoE layer : expert",
    )
    figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01)
