"""Draws docs/pictures/architecture.svg, the picture of the README.

python docs/pictures/architecture.py
"""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

INK, SOFT, GRID = "#1f2933", "#5b6773", "#c7ced6"
STAGE, TOOL, PANEL = "#dbe7f6", "#eef1f4", "#f7f9fb"
TEXTS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2")
EXPERT, CHOSEN = "#e9edf1", "#f2b134"
WIDTH, HEIGHT = 100, 63


def box(axes, x, y, width, height, text="", face=TOOL, size=9.5, edge=GRID, weight="normal"):
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.8",
            facecolor=face,
            edgecolor=edge,
            linewidth=1,
        )
    )
    label(axes, x + width / 2, y + height / 2, text, size, weight=weight)


def label(axes, x, y, text, size=9.5, colour=INK, at="center", weight="normal", top="center"):
    axes.text(x, y, text, size=size, color=colour, ha=at, va=top, weight=weight, linespacing=1.25)


def arrow(axes, start, end):
    style = dict(arrowstyle="-|>", color=SOFT, linewidth=1.3, shrinkA=0, shrinkB=0)
    axes.annotate("", end, start, arrowprops=style)


def draw_stages(axes):
    """The pipeline, left to right."""
    label(axes, 0, 61.5, "The pipeline", 11.5, at="left", weight="bold")
    steps = [
        ("prepare", "raw files to pairs,\nno duplicates", TOOL),
        ("stage 1", "masked language\nmodelling, dense", STAGE),
        ("filter", "keeps documents\nnear their query", TOOL),
        ("stage 2", "contrastive;\nexperts upcycled", STAGE),
        ("mine", "hard negatives\nby a teacher", TOOL),
        ("stage 3", "fine-tuning;\nMatryoshka widths", STAGE),
        ("evaluate, export", "BEIR folders;\nPyTorch folder", TOOL),
    ]
    width, gap = 12.6, 1.97
    for i, (name, text, face) in enumerate(steps):
        x = i * (width + gap)
        box(axes, x, 50.5, width, 8.6, face=face)
        label(axes, x + width / 2, 57.2, name, 9.5, weight="bold")
        label(axes, x + width / 2, 53.4, text, 8.4, SOFT)
        if i:
            arrow(axes, (x - gap + 0.1, 54.8), (x - 0.1, 54.8))


def draw_texts(axes):
    label(axes, 8, 42.6, "texts with prefixes", 9.5, weight="bold")
    texts = [
        "search_query: …",
        "search_query: …",
        "search_query: …",
        "search_document: …",
        "search_document: …",
        "search_document: …",
    ]
    for i, text in enumerate(texts):
        y = 36.4 - 4.6 * i
        box(axes, 0, y, 16, 3.6, face="white", edge=TEXTS[i])
        axes.add_patch(Rectangle((0.5, y + 0.5), 0.9, 2.6, color=TEXTS[i]))
        label(axes, 2.2, y + 1.8, text, 8.4, at="left")
    label(axes, 8, 8.6, "one source and\nlanguage per batch", 8.6, SOFT)


def draw_rows(axes):
    label(axes, 27, 42.6, "packed rows", 9.5, weight="bold")
    cells, size = 13, 1.06
    rows = [(0, 3, 3, 9), (4, 7, 1, 5), (5, 9, 2, 3)]
    for i, (first, length, second, other) in enumerate(rows):
        y = 33 - 5.5 * i
        for cell in range(cells):
            text = first if cell < length else second if cell < length + other else None
            colour = "white" if text is None else TEXTS[text]
            axes.add_patch(
                Rectangle(
                    (20.1 + cell * size, y), size, 3.4, facecolor=colour, edgecolor=GRID, lw=0.8
                )
            )
    label(axes, 27, 16.2, "attention, positions and\npooling stay inside a text", 8.6, SOFT)
    label(axes, 27, 8.6, "0.94 of the slots are tokens\n(quickstart)", 8.6, SOFT)


def draw_encoder(axes):
    label(axes, 50, 42.6, "encoder", 9.5, weight="bold")
    box(axes, 38, 6, 24, 34.6, face=PANEL)
    box(axes, 40, 36, 20, 3.4, "token embeddings", "white", 8.5)
    box(axes, 40, 31, 20, 3.6, "attention, rotary", STAGE, 8.5)
    box(axes, 40, 26.8, 20, 3.6, "feed-forward", STAGE, 8.5)
    box(axes, 40, 21.8, 20, 3.6, "attention, rotary", STAGE, 8.5)
    box(axes, 40, 8, 20, 13.2, face="#fff6df", edge=CHOSEN)
    label(axes, 50, 19.4, "router (float32), top 2 of 8", 8.3)
    for expert in range(8):
        chosen = expert in (2, 5)
        x = 41.2 + 2.24 * expert
        box(axes, x, 11.6, 1.9, 4, "", CHOSEN if chosen else EXPERT, edge=SOFT if chosen else GRID)
        if chosen:
            arrow(axes, (50, 18.3), (x + 0.95, 15.8))
    label(axes, 50, 9.9, "8 expert feed-forwards", 8.3)
    for x, y in ((50, 36), (50, 26.8)):
        arrow(axes, (x, y), (x, y - 1.4))
    axes.plot([60.5, 61.2, 61.2, 60.5], [34.6, 34.6, 8, 8], color=SOFT, linewidth=1)
    label(axes, 62.6, 21.3, "× 6", 10, weight="bold", at="left")
    label(axes, 50, 3.4, "experts in every second layer", 8.6, SOFT)


def draw_pooling(axes):
    label(axes, 71.5, 42.6, "one vector per text", 9.5, weight="bold")
    for i, colour in enumerate(TEXTS):
        y = 37 - 4.6 * i
        axes.add_patch(Rectangle((67.2, y), 8.6, 2.4, facecolor=colour, edgecolor="none"))
        axes.add_patch(Rectangle((67.2, y), 3.0, 2.4, facecolor="none", edgecolor=INK, lw=1.1))
    label(axes, 71.5, 8.6, "mean, unit norm; stage 3:\nits first part works alone", 8.6, SOFT)


def draw_loss(axes):
    label(axes, 90, 42.6, "InfoNCE, global batch", 9.5, weight="bold")
    n, size, left, bottom = 8, 2.3, 80.8, 20.6
    for row in range(n):
        for column in range(n):
            colour = "#e6edf6"
            if row == column:
                colour = "#59a14f"
            elif (row, column) in ((1, 6), (6, 1), (4, 2)):
                colour = "#9aa4af"
            axes.add_patch(
                Rectangle(
                    (left + column * size, bottom + (n - 1 - row) * size),
                    size,
                    size,
                    facecolor=colour,
                    edgecolor="white",
                    lw=1,
                )
            )
    side, end = n * size, left + n * size
    # Two devices; their queries meet all documents.
    axes.plot([left, end], [bottom + side / 2] * 2, color=INK, lw=1, linestyle=":")
    axes.plot([left + side / 2] * 2, [bottom, bottom + side], color=INK, lw=1, linestyle=":")
    label(axes, (left + end) / 2, 40.3, "documents", 8.6, SOFT)
    axes.text(
        left - 1.2, bottom + side / 2, "queries", size=8.6, color=SOFT, rotation=90, va="center"
    )
    for i, (colour, text) in enumerate(
        [
            ("#59a14f", "own document"),
            ("#e6edf6", "negative, on any device"),
            ("#9aa4af", "same content: masked"),
        ]
    ):
        y = 16.6 - 2.9 * i
        axes.add_patch(Rectangle((80.8, y), 1.7, 1.7, facecolor=colour, edgecolor=GRID, lw=0.6))
        label(axes, 83.3, y + 0.85, text, 8.4, SOFT, at="left")
    label(
        axes,
        90,
        5.9,
        "streamed: the scores never\nexist as a whole;\nplus the balance loss",
        8.6,
        SOFT,
    )


def main():
    matplotlib.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "architecture"})
    figure = plt.figure(figsize=(11, 11 * HEIGHT / WIDTH), facecolor="white")
    axes = figure.add_axes((0.01, 0.0, 0.98, 1.0))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    draw_stages(axes)
    label(axes, 0, 46.6, "A contrastive step", 11.5, at="left", weight="bold")
    for draw in (draw_texts, draw_rows, draw_encoder, draw_pooling, draw_loss):
        draw(axes)
    for start, end in ((16.5, 19.6), (34.3, 37.6), (64.0, 66.8), (76.3, 78.8)):
        arrow(axes, (start, 25.6), (end, 25.6))
    target = pathlib.Path(__file__).with_suffix(".svg")
    figure.savefig(target, metadata={"Date": None})
    print(target)


if __name__ == "__main__":
    main()
