"""The part of report.png about experts: how many are in use, and who gets which load.

Loads are relative to an equal share: 1 if all experts get the same, E / K if one gets every token.
Layers are counted from 0, and only those with experts are shown.
"""

import dataclasses
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import MaxNLocator

from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.training.health import effective_experts, moe_layers
from moe_embed_jax.training.run_config import Run

MOST_COLUMNS = 400  # of steps: longer runs show means over equal stretches
MOST_NAMED = 64  # experts of all layers together that get a number each; else their layers alone
MOST_INCHES = 10.0


@dataclasses.dataclass(frozen=True)
class Map:
    """A picture of loads; `draw(figure)`."""

    height: float  # inches
    draw: Callable


def maps(
    model: EncoderConfig, records: list[dict], share_by_language: dict[str, np.ndarray]
) -> list[Map]:
    """Load over the steps, and by language where that is known."""
    layers, experts = moe_layers(model), model.num_experts
    drawn = [_over_steps(layers, experts, records)]
    if share_by_language:
        drawn.append(_by_language(layers, experts, share_by_language))
    return drawn


def _over_steps(layers: list[int], experts: int, records: list[dict]) -> Map:
    load_SME = _stretches(records)
    image_ES = load_SME.reshape(len(load_SME), -1).T
    first, last = records[0]["step"], records[-1]["step"]
    extent = (first - 0.5, last + 0.5, len(image_ES) - 0.5, -0.5)

    def draw(figure):
        axes = figure.subplots()
        _show(figure, axes, image_ES, extent=extent)
        _name_experts(axes.yaxis, axes.axhline, layers, experts)
        axes.set_title("Load of every expert over the run")
        steps_along(axes)

    return Map(min(1.4 + 0.115 * len(image_ES), MOST_INCHES), draw)


def _by_language(layers: list[int], experts: int, shares: dict[str, np.ndarray]) -> Map:
    languages = sorted(shares)
    load_AE = np.array([shares[language].reshape(-1) for language in languages]) * experts

    def draw(figure):
        axes = figure.subplots()
        _show(figure, axes, load_AE)
        axes.set_yticks(range(len(languages)), languages, fontsize=7)
        _name_experts(axes.xaxis, axes.axvline, layers, experts)
        axes.set(title="Load of every expert by language, on held-out documents, at the end")

    return Map(min(1.4 + 0.16 * len(languages), 2 * MOST_INCHES), draw)


def _show(figure, axes, load, **place) -> None:
    """Red above an equal share, blue below; borders between experts stay sharp."""
    norm = TwoSlopeNorm(1.0, 0.0, max(np.nanmax(load, initial=0.0), 1.1))
    colours = dict(norm=norm, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    image = axes.imshow(load, **colours, **place)
    figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01, label="load (1 = equal share)")


def steps_along(axes) -> None:
    """The x axis counts steps."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _stretches(records: list[dict]) -> np.ndarray:
    """Loads [S, M, E] of at most `MOST_COLUMNS` stretches of steps of equal length."""
    share_SME = np.array([record["expert_load"] for record in records], np.float32)
    load_SME = share_SME * share_SME.shape[-1]
    length = -(-len(load_SME) // MOST_COLUMNS)
    parts = [load_SME[i : i + length].mean(axis=0) for i in range(0, len(load_SME), length)]
    return np.stack(parts)


def _name_experts(axis, line, layers: list[int], experts: int) -> None:
    """Numbers of experts along `axis`, layer by layer; `line` draws the border of two layers."""
    count = len(layers) * experts
    is_numbered = count <= MOST_NAMED
    axis.remove_overlapping_locs = False  # the middle of a layer may be an expert
    axis.set_ticks(range(count) if is_numbered else [])
    axis.set_ticklabels([str(i % experts) for i in range(count)] if is_numbered else [], fontsize=6)
    middles = [experts * i + (experts - 1) / 2 for i in range(len(layers))]
    axis.set_ticks(middles, [f"layer {layer}" for layer in layers], minor=True, fontsize=8)
    axis.set_tick_params(which="minor", length=0, pad=15 if is_numbered else 3)
    if axis.axis_name == "y":
        for label in axis.get_ticklabels(minor=True):
            label.set(rotation=90, verticalalignment="center")
    axis.set_label_text("expert" if is_numbered else f"{experts} experts of each layer, in order")
    for i in range(1, len(layers)):
        line(experts * i - 0.5, color="black", linewidth=1)


def draw_use(axes, config: Run, records: list[dict]) -> None:
    """Effective number of experts of each layer, as training/health.py judges it; balance loss."""
    model, health = config.model, config.health
    step = [record["step"] for record in records]
    load_SME = _trailing_mean([record["expert_load"] for record in records], health.window)
    used_SM = effective_experts(load_SME)
    layers = moe_layers(model)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for used_S, layer, colour in zip(used_SM.T, layers, colours, strict=True):
        axes.plot(step, used_S, color=colour, label=f"layer {layer}", linewidth=1.2)
    if health.stop_on_collapse and model.num_experts > model.experts_per_token:
        lowest = model.experts_per_token + health.least_spread * (
            model.num_experts - model.experts_per_token
        )
        axes.axhline(lowest, color="red", linewidth=0.8, linestyle="--", label="collapsed below")
    axes.set_ylim(0, model.num_experts * 1.05)
    axes.set_title(f"Experts in use (load of the last {health.window} steps)")
    axes.set_ylabel("effective number of experts")
    steps_along(axes)
    axes.legend(fontsize=7, loc="center right", ncols=1 + len(layers) // 6)
    twin = axes.twinx()
    twin.plot(step, [record["balance"] for record in records], color="0.6", linewidth=0.8)
    twin.set_ylabel("balance loss (grey; 1 = perfect)", color="0.4")
    twin.set_ylim(bottom=min(1.0, twin.get_ylim()[0]))
    axes.set_zorder(twin.get_zorder() + 1)
    axes.patch.set_visible(False)


def _trailing_mean(values, window: int) -> np.ndarray:
    """Mean of every entry and up to `window` - 1 before it, along the first axis."""
    sums = np.cumsum(np.array(values, np.float64), axis=0)
    sums = np.concatenate([np.zeros_like(sums[:1]), sums])
    stop = np.arange(1, len(sums))
    start = np.maximum(stop - window, 0)
    count = (stop - start).reshape(-1, *(1,) * (sums.ndim - 1))
    return (sums[stop] - sums[start]) / count
