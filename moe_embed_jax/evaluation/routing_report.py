"""The folder that launch/inspect_routing.py writes: numbers, tables, pictures."""

import json
import pathlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_embed_jax import storage
from moe_embed_jax.evaluation.expert_use import LABELS, shares
from moe_embed_jax.evaluation.load_maps import Map, map_of_groups, map_of_layers
from moe_embed_jax.made_by import keep_command
from moe_embed_jax.markdown_table import markdown_table
from moe_embed_jax.new_folder import new_folder

JSON_FILE = "routing.json"
WIDTH = 13.0  # inches
INFORMATION_HEIGHT = 3.0
DIGITS = 6  # of the numbers in routing.json


def write_report(
    folder: str | pathlib.Path, report: dict, command: str | None = None
) -> list[pathlib.Path]:
    """Writes routing.json, routing.md, by_layer.png, and by_language.png and by_topic.png where
    `report` (of `inspect_routing`) has them; returns their paths. The folder appears whole, and
    takes the place of an earlier report.

    Args:
      command: as of `made_by`, to be kept in the folder.

    Raises:
      UserError: something else is at `folder`.
      OSError: it cannot be written.
    """
    folder = storage.path(folder)
    content = json.dumps(_rounded(report), indent=1, ensure_ascii=False) + "\n"
    files = {JSON_FILE: content.encode(), "routing.md": tables(report).encode()}
    drawn = pictures(report)
    with new_folder(folder, last=JSON_FILE, replace=(folder / JSON_FILE).is_file()) as partial:
        for name, data in files.items():
            (partial / name).write_bytes(data)
        for name, figure in drawn.items():
            figure.savefig(partial / name, format="png", dpi=110)
        if command:
            keep_command(partial, command)
    return [folder / name for name in (*files, *drawn)]


def pictures(report: dict) -> dict[str, Figure]:
    """{file name: figure}."""
    layers, experts = report["moe_layers"], report["experts"]
    drawn = {}
    for label in _labels(report):
        groups = report[label]["groups"]
        drawn[f"by_{label}.png"] = _figure(
            map_of_groups(
                f"Load of every expert by {label}",
                layers,
                experts,
                {name: shares(group) for name, group in groups.items()},
            )
        )
    information = Map(INFORMATION_HEIGHT, lambda figure: _draw_information(figure, report))
    loads = map_of_layers("Load of every expert, all texts", layers, shares(report))
    drawn["by_layer.png"] = _figure(loads, information)
    return drawn


def _figure(*maps: Map) -> Figure:
    heights = [each.height for each in maps]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(maps), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, each in zip(parts, maps, strict=True):
        each.draw(part)
    return figure


def _draw_information(figure, report: dict) -> None:
    """Bars of I(expert; label) by layer; a black line where shuffled labels lie on average."""
    axes = figure.subplots()
    labels = _labels(report)
    width = 0.8 / len(labels)
    place_Y = np.arange(len(report["moe_layers"]))
    for i, label in enumerate(labels):
        information = report[label]["information"]
        x_Y = place_Y + (i - (len(labels) - 1) / 2) * width
        axes.bar(x_Y, [layer["bits"] for layer in information], width * 0.9, label=label)
        shuffled = [layer["shuffled_mean"] for layer in information]
        name = "shuffled labels (mean)" if i == 0 else None
        axes.hlines(shuffled, x_Y - width / 2, x_Y + width / 2, color="black", label=name)
    axes.set_xticks(place_Y, [f"layer {layer}" for layer in report["moe_layers"]], fontsize=8)
    axes.set(title="What an assignment tells about its text", ylabel="I(expert; label), bits")
    axes.legend(fontsize=8)


def tables(report: dict) -> str:
    """routing.md."""
    layers = report["moe_layers"]
    lines = [
        "# Routing",
        "",
        f"{report['texts']:,} texts, {report['tokens']:,} tokens (prefix {report['prefix']!r} and "
        f"special tokens included), {report['experts']} experts, {report['experts_per_token']} per "
        "token. Load 1 is an equal share; layers are counted from 0.",
        "",
        "## By layer",
        "",
        markdown_table(
            ["layer", "effective experts", "highest load", "lowest load"],
            [
                [layer["layer"], *_numbers(layer, "effective_experts", "load_max", "load_min")]
                for layer in report["layers"]
            ],
            "l",
        ),
    ]
    for label in _labels(report):
        part = report[label]
        information = [(layer["layer"], "all", layer) for layer in part["information"]]
        information += [
            (layer["layer"], "first", layer["first_choice"]) for layer in part["information"]
        ]
        columns = "bits", "shuffled_mean", "shuffled_max", "above_shuffled", "most_bits"
        lines += [
            "",
            f"## By {label}",
            "",
            f"I(expert; {label}) in bits, of one assignment. Shuffled: the same after dealing the "
            f"{label}s out at random, {report['shuffles']} times. p: how often shuffled labels "
            "reach as many bits.",
            "",
            markdown_table(
                ["layer", "choices", *(name.replace("_", " ") for name in columns), "p"],
                [
                    [layer, choices, *_numbers(each, *columns, digits=4), f"{each['p']:.3f}"]
                    for layer, choices, each in information
                ],
                "l",
            ),
            "",
            f"Of each {label} and layer: effective experts, the busiest expert and its load.",
            "",
            markdown_table(
                [label, "texts", "tokens", *(f"layer {layer}" for layer in layers)],
                [
                    [name, f"{group['texts']:,}", f"{group['tokens']:,}"]
                    + [_busiest(layer) for layer in group["layers"]]
                    for name, group in part["groups"].items()
                ],
                "l",
            ),
        ]
    return "\n".join(lines) + "\n"


def _labels(report: dict) -> list[str]:
    return [label for label in LABELS if label in report]


def _numbers(values: dict, *keys: str, digits: int = 2) -> list[str]:
    return [f"{values[key]:.{digits}f}" for key in keys]


def _busiest(layer: dict) -> str:
    expert = int(np.argmax(layer["share"]))
    return f"{layer['effective_experts']:.2f}; expert {expert}: {layer['load_max']:.2f}"


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, DIGITS) if isinstance(value, float) else value
