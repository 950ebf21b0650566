"""languages.png: what each language scores in each task."""

import math

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_embed_jax import storage
from moe_embed_jax.evaluation.language_tags import language_tag
from moe_embed_jax.evaluation.suite import TaskResult

ROWS_PER_PANEL = 40
CELL = (0.46, 0.2)  # inches
DPI = 110


def scores_by_language(
    results: list[TaskResult], width: int | None
) -> tuple[list[str], np.ndarray]:
    """Language tags, sorted, and their main scores in percent [languages, tasks], NaN for none.

    A subset belongs to its first language: that of the queries, or of the sentence whose
    translation is sought. Several subsets of a language are averaged.
    """
    found: dict[str, list[list[float]]] = {}
    for task, result in enumerate(results):
        for subset in result.subsets:
            row = found.setdefault(language_tag(subset.languages[0], merged=True), [])
            row += [[] for _ in range(len(results) - len(row))]
            row[task].append(100 * result.score(subset, width))
    tags = sorted(found)
    cells = [[np.mean(c) if c else math.nan for c in found[tag]] for tag in tags]
    return tags, np.array(cells).reshape(len(tags), len(results))


def save_picture(path, results: list[TaskResult], width: int | None, title: str) -> None:
    """Writes a PNG: languages x tasks, beside each other in panels where there are many.

    Tasks of one language are left out where others have several: table.md has them.
    """
    several = [r for r in results if len({subset.languages[0] for subset in r.subsets}) > 1]
    results = several or results
    tags, score_LT = scores_by_language(results, width)
    panels = -(-len(tags) // ROWS_PER_PANEL)
    rows = -(-len(tags) // panels)
    size = panels * (len(results) * CELL[0] + 1.1) + 0.6, rows * CELL[1] + 2.2
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axes in enumerate(figure.subplots(1, panels, squeeze=False)[0]):
        part = slice(panel * rows, (panel + 1) * rows)
        _draw(axes, score_LT[part], tags[part], [result.name for result in results], rows)
    figure.suptitle(title, fontsize=9)
    with storage.written_whole(storage.path(path)) as file:
        figure.savefig(file, format="png", dpi=DPI)


def _draw(axes, score_LT: np.ndarray, tags: list[str], tasks: list[str], rows: int) -> None:
    axes.imshow(score_LT, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=7)
    axes.set_yticks(range(len(tags)), tags, fontsize=6.5, family="monospace")
    axes.set_ylim(rows - 0.5, -0.5)  # the last panel may have fewer languages
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for (language, task), score in np.ndenumerate(score_LT):
        if not math.isnan(score):
            colour = "black" if score > 60 else "white"
            axes.text(task, language, f"{score:.1f}", ha="center", va="center", size=6, c=colour)
