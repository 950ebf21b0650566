"""What filtering and mining did, as report.json and report.md: counts per group, and examples."""

import abc
import dataclasses
import json
from pathlib import Path

from moe_embed_jax.config import save_json
from moe_embed_jax.markdown_table import markdown_table

JSON_FILE, MARKDOWN_FILE = "report.json", "report.md"
LONGEST_SHOWN = 160  # characters of a text in report.md; report.json has all of it


@dataclasses.dataclass(frozen=True)
class Example:
    """A pair with its score, and other documents with theirs, best first."""

    query: str
    document: str
    score: float
    others: list[tuple[str, float]]


class Report(abc.ABC):
    """Counts and examples per (source, language), in the order in which groups come.

    about: what was done to what. groups: {"source", "language", ..., "examples"}.
    """

    title: str
    counts: tuple[str, ...]  # of a group, summed in `total`
    heading: str  # of the examples
    others: str  # what an example's other documents are

    def __init__(self, about: dict):
        self.about = about
        self.groups: list[dict] = []

    def _group(self, source: str, language: str) -> dict:
        for group in self.groups:
            if (group["source"], group["language"]) == (source, language):
                return group
        group = {"source": source, "language": language}
        self.groups.append(group | dict.fromkeys(self.counts, 0) | {"examples": []})
        return self.groups[-1]

    def add(self, source: str, language: str, counts: dict[str, int], examples: list[dict]) -> None:
        """Adds to a group; examples: the fields of each `Example`."""
        group = self._group(source, language)
        for name in self.counts:
            group[name] += counts[name]
        group["examples"] += examples

    @property
    def total(self) -> dict[str, int]:
        return {name: sum(group[name] for group in self.groups) for name in self.counts}

    @abc.abstractmethod
    def _shares(self, counts: dict) -> dict[str, str]:
        """Further columns of report.md."""

    def as_dict(self) -> dict:
        return {"about": self.about, "total": self.total, "groups": self.groups}

    def table(self) -> str:
        """Markdown: a line per group, then the total."""
        rows = [
            [group["source"], group["language"], *self._cells(group)]
            for group in sorted(self.groups, key=lambda g: (g["source"], g["language"]))
        ]
        rows.append(["all", "", *self._cells(self.total)])
        names = ["source", "language", *self.counts, *self._shares(self.total)]
        return markdown_table(names, rows, "llr")

    def _cells(self, counts: dict) -> list[str]:
        return [*(f"{counts[name]:,}" for name in self.counts), *self._shares(counts).values()]

    def markdown(self) -> str:
        lines = [f"# {self.title}", "", "```", json.dumps(self.about, indent=1), "```", ""]
        lines += [self.table(), "", f"## {self.heading}", ""]
        for group in self.groups:
            if group["examples"]:
                lines += [f"### {group['source']} {group['language']}", ""]
            for example in group["examples"]:
                lines += [
                    f"* query: {_shown(example['query'])}",
                    f"  * {example['score']:.3f} own document: {_shown(example['document'])}",
                ]
                lines += [
                    f"  * {score:.3f} {self.others}: {_shown(text)}"
                    for text, score in example["others"]
                ]
            lines += [""] * bool(group["examples"])
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        save_json(folder / JSON_FILE, self.as_dict())
        (folder / MARKDOWN_FILE).write_text(self.markdown(), encoding="utf-8")


class FilterReport(Report):
    title = "Consistency filtering"
    counts = ("pairs", "kept", "dropped")
    heading = "Dropped pairs, and what ranked above their documents"
    others = "other document"

    def _shares(self, counts: dict) -> dict[str, str]:
        return {"kept, %": _percent(counts["kept"], counts["pairs"])}


class MiningReport(Report):
    title = "Hard negatives"
    # Queries are filled, short (with fewer negatives than wanted) or empty (with none).
    counts = ("pairs", "queries", "documents", "negatives", "filled", "short", "empty")
    heading = "Examples"
    others = "negative"

    def _shares(self, counts: dict) -> dict[str, str]:
        return {"filled, %": _percent(counts["filled"], counts["queries"])}


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


def _shown(text: str) -> str:
    """On one line, shortened, and without meaning to Markdown."""
    text = " ".join(text.split()).replace("`", "'")
    text = text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 1] + "…"
    return f"`{text}`"
