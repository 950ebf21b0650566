"""Results of a suite on disk: MTEB's JSON files, a Markdown table and a picture.

    results/<model>/<revision>/model_meta.json, <task>.json          all features
    results/<model>/<revision>/experiments/embed_dim_256/...         the first 256
    table.md, languages.png

Layout and fields follow mteb 2 (`mteb.results.TaskResult`, `mteb.cache.ResultCache`).
"""

import dataclasses
from pathlib import Path

from moe_embed_jax.config import save_json
from moe_embed_jax.data.text_files import written_whole
from moe_embed_jax.evaluation.cross_lingual import CrossLingual
from moe_embed_jax.evaluation.language_tags import language_tag
from moe_embed_jax.evaluation.picture import save_picture
from moe_embed_jax.evaluation.published import MEASURES
from moe_embed_jax.evaluation.subsets import WHOLE
from moe_embed_jax.evaluation.suite import KINDS, TaskResult
from moe_embed_jax.markdown_table import markdown_table

RESULTS, TABLE, PICTURE = "results", "table.md", "languages.png"
COUNTS = ("queries", "documents", "pairs", "texts")
DIGITS = 6  # of scores in JSON, as MTEB rounds them


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """Who was evaluated.

    name: organisation/model. revision: of its weights. width: all features. prompts: side ->
    prefix. framework: what ran it, in MTEB's words. parameters: None where unknown.
    """

    name: str
    revision: str
    width: int
    max_tokens: int
    prompts: dict[str, str]
    framework: tuple[str, ...] = ("JAX",)
    parameters: int | None = None

    def folder(self, output: Path, width: int | None = None) -> Path:
        """Where the results of a width are; None: of all features."""
        folder = output / RESULTS / self.name.replace("/", "__").replace(" ", "_") / self.revision
        return folder if width is None else folder / "experiments" / f"embed_dim_{width}"


def write_task(output: Path, card: ModelCard, result: TaskResult) -> None:
    """The JSON of a task at every width, and who was evaluated beside it."""
    for width in result.subsets[0].scores:
        folder = card.folder(output, width)
        save_json(folder / f"{result.name}.json", task_json(result, width))
        save_json(folder / "model_meta.json", model_json(card, width))


def task_json(result: TaskResult, width: int | None) -> dict:
    """A `TaskResult` of mteb. No version of mteb: it has not scored this."""
    subsets = [
        {
            **{k: round(v, DIGITS) if isinstance(v, float) else v for k, v in scores.items()},
            "main_score": round(scores[result.main_score], DIGITS),
            "hf_subset": subset.name,
            "languages": list(dict.fromkeys(map(language_tag, subset.languages))),
        }
        for subset in result.subsets
        for scores in (subset.scores[width],)
    ]
    return {
        "task_name": result.name,
        "dataset_revision": result.revision,
        "mteb_version": None,
        "scores": {result.split: subsets},
        "evaluation_time": round(result.seconds, 3),
        "kg_co2_emissions": None,
    }


def model_json(card: ModelCard, width: int | None) -> dict:
    """The fields of mteb's `ModelMeta`; what is unknown is null."""
    unknown = ("release_date", "languages", "memory_usage_mb", "license", "open_weights")
    unknown += ("public_training_code", "public_training_data", "training_datasets", "reference")
    return {
        **dict.fromkeys(unknown),
        "loader": None,
        "name": card.name,
        "revision": card.revision,
        "n_parameters": card.parameters,
        "max_tokens": card.max_tokens,
        "embed_dim": width or card.width,
        "framework": list(card.framework),
        "similarity_fn_name": "cosine",
        "use_instructions": any(card.prompts.values()),
        "experiment_kwargs": None if width is None else {"embed_dim": width},
    }


def write_summary(output: Path, card: ModelCard, results: list[TaskResult]) -> None:
    with written_whole(output / TABLE) as file:
        file.write(markdown(card, results).encode())
    width = next(iter(results[0].subsets[0].scores))
    title = f"{card.name}: main scores in percent, {width or card.width} dimensions"
    save_picture(output / PICTURE, results, width, title)


def markdown(card: ModelCard, results: list[TaskResult]) -> str:
    """All scores as a page; in percent."""
    widths = list(results[0].subsets[0].scores)
    prompts = ", ".join(f"{side} `{prefix}`" for side, prefix in card.prompts.items())
    lines = [f"# {card.name}", "", f"Revision {card.revision}. Prefixes: {prompts}.", ""]
    lines += ["Scores are percent; of several subsets the plain mean.", ""]
    lines += _table(
        ["task", "kind", "score", "subsets", *(f"{w or card.width} dim" for w in widths)],
        [
            [r.name, r.kind, r.main_score, len(r.subsets), *(100 * r.mean(w) for w in widths)]
            for r in results
        ],
    )
    lines += _published(card, results, widths)
    for result in results:
        if len(result.subsets) > 1 or result.subsets[0].name != WHOLE:
            lines += ["", f"## {result.name}", ""]
            if KINDS[result.kind] is CrossLingual:
                lines += _matrix(result, widths[0])
            lines += _subsets(card, result, widths)
    return "\n".join(lines) + "\n"


def _published(card: ModelCard, results: list[TaskResult], widths) -> list[str]:
    """Our score and the published ones of every measure that the results have in full."""
    rows = []
    for measure in MEASURES:
        own = {width: measure.own(results, width) for width in widths}
        if None in own.values():
            continue
        rows += [[measure.name, card.name, w or card.width, own[w], "measured here"] for w in own]
        for row in measure.rows:
            doubt = "" if row.is_primary else ", not checked against the original"
            note = f"published: {row.source}{doubt}"
            rows.append([measure.name, row.model, row.width, row.percent, note])
    if not rows:
        return []
    own_rows = list({tuple(map(str, row)): row for row in rows}.values())  # measures share parts
    head = ["", "## Beside published scores", "", "nDCG@10 on the same documents.", ""]
    return head + _table(["measure", "model", "dim", "score", "origin"], own_rows)


def _matrix(result: TaskResult, width: int | None) -> list[str]:
    """Languages of queries x languages of documents."""
    score = {subset.languages: 100 * result.score(subset, width) for subset in result.subsets}
    asked = list(dict.fromkeys(query for query, _ in score))
    read = list(dict.fromkeys(document for _, document in score))
    rows = [[query, *(score[query, document] for document in read)] for query in asked]
    return [*_table(["queries \\ documents", *read], rows), ""]


def _subsets(card: ModelCard, result: TaskResult, widths) -> list[str]:
    """All metrics at the first width, and the main score at the others."""
    keys = list(result.subsets[0].scores[widths[0]])
    others = [f"{result.main_score}, {width or card.width} dim" for width in widths[1:]]
    rows = []
    for subset in result.subsets:
        scores = subset.scores[widths[0]]
        cells = [scores[k] if k in COUNTS else 100 * scores[k] for k in keys]
        rows.append([subset.name, *cells, *(100 * result.score(subset, w) for w in widths[1:])])
    return _table(["subset", *keys, *others], rows)


def _table(head: list[str], rows: list[list]) -> list[str]:
    """Numbers on the right, those with a fraction with two decimals."""

    def text(cell) -> str:
        return f"{cell:.2f}" if isinstance(cell, float) else str(cell)

    numbers = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(head))]
    sides = "".join("r" if is_number else "l" for is_number in numbers)
    return markdown_table(head, [map(text, row) for row in rows], sides).splitlines()
