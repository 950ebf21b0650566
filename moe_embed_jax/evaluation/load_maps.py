"""Pictures of expert loads: one cell per expert, red above an equal share and blue below.

Loads are relative to an equal share: 1 if all experts get the same, E / K if one gets every token.
Layers are counted from 0, and only those with experts are shown.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.colors import TwoSlopeNorm

MOST_NAMED = 64  # experts of all layers together that get a number each; else their layers alone
MOST_INCHES = 10.0


@dataclasses.dataclass(frozen=True)
class Map:
    """A picture of loads; `draw(figure)`."""

    height: float  # inches
    draw: Callable


def map_of_groups(
    title: str, layers: list[int], experts: int, share_by_group: Mapping[str, np.ndarray]
) -> Map:
    """A row for each group of texts, in the order of the mapping, and a column for each expert.

    `share_by_group`: name -> share of the assignments [layers with experts, E].
    """
    names = list(share_by_group)
    load_AE = np.array([np.reshape(share, -1) for share in share_by_group.values()]) * experts

    def draw(figure):
        axes = figure.subplots()
        show_load(figure, axes, load_AE)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        name_experts(axes.xaxis, axes.axvline, layers, experts)
        axes.set(title=title)

    return Map(min(1.4 + 0.16 * len(names), 2 * MOST_INCHES), draw)


def map_of_layers(title: str, layers: list[int], share_YE: np.ndarray) -> Map:
    """A row for each layer with experts, a column for each expert, and the load in the cell."""
    load_YE = np.asarray(share_YE) * share_YE.shape[1]
    experts = load_YE.shape[1]

    def draw(figure):
        axes = figure.subplots()
        norm = show_load(figure, axes, load_YE)
        axes.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers], fontsize=8)
        if experts <= MOST_NAMED:
            axes.set_xticks(range(experts))
        if experts <= 16:  # more numbers would not fit into their cells
            for (row, column), load in np.ndenumerate(load_YE):
                colour = "white" if abs(norm(load) - 0.5) > 0.35 else "black"
                place = dict(ha="center", va="center", fontsize=8)
                axes.text(column, row, f"{load:.2f}", color=colour, **place)
        axes.set(title=title, xlabel="expert")

    return Map(min(1.4 + 0.35 * len(layers), MOST_INCHES), draw)


def show_load(figure, axes, load, **place) -> TwoSlopeNorm:
    """Red above an equal share, blue below; borders between experts stay sharp. Returns what maps
    loads to colours: 0.5 for an equal share."""
    # Full red from twice the share on: nearly equal loads are pale, in all pictures alike.
    norm = TwoSlopeNorm(1.0, 0.0, max(np.nanmax(load, initial=0.0), 2.0))
    colours = dict(norm=norm, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    image = axes.imshow(load, **colours, **place)
    figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01, label="load (1 = equal share)")
    return norm


def name_experts(axis, line, layers: list[int], experts: int) -> None:
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
