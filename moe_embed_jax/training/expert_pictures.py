"""The part of report.png about experts: how many are in use, and who gets which load.

Loads are relative to an equal share: 1 if all experts get the same, E / K if one gets every token.
Layers are counted from 0, and only those with experts are shown.
"""

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from moe_embed_jax.evaluation.load_maps import (
    MOST_INCHES,
    Map,
    map_of_groups,
    name_experts,
    show_load,
)
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.routing.router import effective_experts
from moe_embed_jax.training.run_config import Run

MOST_COLUMNS = 400  # of steps: longer runs show means over equal stretches


def maps(
    model: EncoderConfig, records: list[dict], share_by_language: dict[str, np.ndarray]
) -> list[Map]:
    """Load over the steps, and by language where that is known."""
    layers, experts = model.moe_layers, model.num_experts
    drawn = [_over_steps(layers, experts, records)]
    if share_by_language:
        title = "Load of every expert by language, on held-out documents, at the end"
        shares = dict(sorted(share_by_language.items()))
        drawn.append(map_of_groups(title, layers, experts, shares))
    return drawn


def _over_steps(layers: list[int], experts: int, records: list[dict]) -> Map:
    load_SYE = _stretches(records)
    image_ES = load_SYE.reshape(len(load_SYE), -1).T
    first, last = records[0]["step"], records[-1]["step"]
    extent = (first - 0.5, last + 0.5, len(image_ES) - 0.5, -0.5)

    def draw(figure):
        axes = figure.subplots()
        show_load(figure, axes, image_ES, extent=extent)
        name_experts(axes.yaxis, axes.axhline, layers, experts)
        axes.set_title("Load of every expert over the run")
        steps_along(axes)

    return Map(min(1.4 + 0.115 * len(image_ES), MOST_INCHES), draw)


def steps_along(axes) -> None:
    """The x axis counts steps."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _stretches(records: list[dict]) -> np.ndarray:
    """Loads [S, Y, E] of at most `MOST_COLUMNS` stretches of steps of equal length."""
    share_SYE = np.array([record["expert_load"] for record in records], np.float32)
    load_SYE = share_SYE * share_SYE.shape[-1]
    length = -(-len(load_SYE) // MOST_COLUMNS)
    parts = [load_SYE[i : i + length].mean(axis=0) for i in range(0, len(load_SYE), length)]
    return np.stack(parts)


def draw_use(axes, config: Run, records: list[dict]) -> None:
    """Effective number of experts of each layer, as training/health.py judges it; balance loss."""
    model, health = config.model, config.health
    step = [record["step"] for record in records]
    load_SYE = _trailing_mean([record["expert_load"] for record in records], health.window)
    used_SY = effective_experts(load_SYE)
    layers = model.moe_layers
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for used_S, layer, colour in zip(used_SY.T, layers, colours, strict=True):
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
