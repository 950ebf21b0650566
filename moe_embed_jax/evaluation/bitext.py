"""Bitext mining: is the nearest sentence of the other language the translation?"""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from moe_embed_jax.data.text_files import read_json, read_table, string_field
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.subsets import (
    PLACE,
    Scores,
    Subset,
    SubsetScores,
    Task,
    check_files,
    find_subsets,
)
from moe_embed_jax.evaluation.text_vectors import TextVectors, cut
from moe_embed_jax.safe_names import check_name
from moe_embed_jax.search.knn import top_k

LAYOUTS = ("table", "aligned", "columns", "records")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Sentences of two languages: the n-th of one translates the n-th of the other."""

    languages: tuple[str, str]
    first: list[str]
    second: list[str]

    @property
    def name(self) -> str:
        return "-".join(self.languages)


@dataclasses.dataclass(frozen=True)
class Bitext(Task):
    """Sentences of many languages and their translations into one; see docs/evaluation.md.

    layout:
      table    one table with the columns lang, sentence and one named like `pivot`
      aligned  a table per language, in which index_id names what translates each other
      columns  a table of two columns without a header per pair of languages, named like en-es
      records  one file of JSON lines with lang, id and `field`; equal ids translate each other
    languages: without the pivot; None: all that are there.
    unique: leave out a pair if one of its sides occurred before: which translation belongs to it
      cannot be told.
    first_pairs: the number of pairs of each two languages that are scored; None: all. `unique`
      comes first.
    """

    main_score = "f1"

    path: str
    layout: str
    pivot: str = ""
    field: str = "text"
    unique: bool = False
    first_pairs: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.first_pairs is not None and not (
            isinstance(self.first_pairs, int) and self.first_pairs > 0
        ):
            raise UserError(f"first_pairs={self.first_pairs!r} must be a number above 0 or None")
        if not isinstance(self.languages, (list, tuple, type(None))):
            raise UserError(f"languages={self.languages!r} must be a list of codes or None")
        if self.layout not in LAYOUTS:
            raise UserError(f"layout={self.layout!r}: choose one of {', '.join(LAYOUTS)}")
        if (PLACE in self.path) == (self.layout in ("table", "records")):
            wants = "one file, without" if PLACE in self.path else "a path with"
            raise UserError(f"layout {self.layout!r} takes {wants} {PLACE}: {self.path!r}")
        if bool(self.pivot) == (self.layout == "columns"):
            wants = "has no" if self.pivot else "needs a"
            raise UserError(f"layout {self.layout!r} {wants} pivot")

    def files(self, root: Path) -> list[Path]:
        return check_files(subset.path for subset in self._subsets(root))

    def evaluate(self, root: Path, vectors: TextVectors, label: str) -> Iterator[SubsetScores]:
        for pairs in self._pairs(self._subsets(root)):
            pairs = without_repeats(pairs) if self.unique else pairs
            texts = (side[: self.first_pairs] for side in (pairs.first, pairs.second))
            sides = zip(pairs.languages, texts, strict=True)
            x_BD, y_BD = (
                vectors.embed(texts, "symmetric", f"{label} {language}")
                for language, texts in sides
            )
            scores = {
                width: mining_scores(cut(x_BD, width), cut(y_BD, width), vectors.mesh)
                for width in vectors.widths
            }
            yield SubsetScores(pairs.name, pairs.languages, scores)

    def _subsets(self, root: Path) -> list[Subset]:
        if self.layout in ("table", "records"):
            return find_subsets(root, self.path, self.pivot)
        if self.layout == "columns":
            return find_subsets(root, self.path, self.languages)
        languages = self.languages
        if languages is not None and self.pivot not in languages:
            languages = [*languages, self.pivot]
        return find_subsets(root, self.path, languages)

    def _pairs(self, subsets: list[Subset]) -> Iterator[Pairs]:
        if self.layout == "table":
            yield from read_pairs_table(subsets[0].path, self.pivot, self.languages)
        elif self.layout == "records":
            texts = read_records_by_id(subsets[0].path, self.field)
            yield from aligned(texts, self.pivot, self.languages, subsets[0].path)
        elif self.layout == "columns":
            for subset in subsets:
                yield read_columns(subset.path, subset.name)
        else:
            paths = {subset.language: subset.path for subset in subsets}
            if self.pivot not in paths:
                raise UserError(f"{self.path}: no file of the pivot '{self.pivot}'")
            pivot = {self.pivot: dict(read_aligned(paths.pop(self.pivot)))}
            for language, path in paths.items():
                yield from aligned(
                    pivot | {language: dict(read_aligned(path))}, self.pivot, None, path
                )


def read_pairs_table(path: Path, pivot: str, languages) -> Iterator[Pairs]:
    """The languages of a `table` in their order there."""
    found: dict[str, Pairs] = {}
    for where, (language, sentence, other) in read_table(path, ("lang", "sentence", pivot)):
        check_name(language, f"{where}: column 'lang'")
        pairs = found.setdefault(language, Pairs((language, pivot), [], []))
        pairs.first.append(sentence)
        pairs.second.append(other)
    yield from (found[language] for language in _chosen(found, languages, path))


def read_columns(path: Path, name: str) -> Pairs:
    languages = tuple(name.split("-"))
    if len(languages) != 2:
        raise UserError(f"{path}: {name!r} must name two languages, like en-es")
    rows = [fields for _, fields in read_table(path, languages, header=False)]
    return Pairs(languages, [first for first, _ in rows], [second for _, second in rows])


def read_aligned(path: Path) -> Iterator[tuple[str, str]]:
    """(index_id, text) of an `aligned` file."""
    seen: dict[str, str] = {}
    for where, (identity, text) in read_table(path, ("index_id", "text")):
        if seen.setdefault(identity, text) != text:
            raise UserError(
                f"{where}: column 'index_id' repeats {identity!r:.40} with another text"
            )
    yield from seen.items()


def read_records_by_id(path: Path, field: str) -> dict[str, dict[str, str]]:
    """{language: {id: text}} of a `records` file; records without a text are left out."""
    texts: dict[str, dict[str, str]] = {}
    for where, record in read_json(path):
        language, identity = (string_field(record, key, where) for key in ("lang", "id"))
        check_name(language, f"{where}: field 'lang'")
        text = string_field(record, field, where).strip()
        if texts.setdefault(language, {}).setdefault(identity, text) != text:
            raise UserError(
                f"{where}: field 'id' repeats {identity!r:.60} of {language} with another text"
            )
    return {
        language: {identity: text for identity, text in found.items() if text}
        for language, found in texts.items()
    }


def aligned(texts: dict[str, dict[str, str]], pivot: str, languages, path) -> Iterator[Pairs]:
    """The pairs of every language with the pivot, in the pivot's order."""
    if pivot not in texts:
        raise UserError(f"{path}: nothing is in the pivot language '{pivot}'")
    others = {language: t for language, t in texts.items() if language != pivot}
    for language in _chosen(others, languages, path):
        common = [i for i in texts[pivot] if i in others[language]]
        if not common:
            raise UserError(f"{path}: {language} and {pivot} have no id in common")
        yield Pairs(
            (language, pivot),
            [others[language][i] for i in common],
            [texts[pivot][i] for i in common],
        )


def _chosen(found: Iterable[str], languages, path) -> list[str]:
    chosen = list(found) if languages is None else list(languages)
    if missing := [language for language in chosen if language not in found]:
        raise UserError(f"{path}: nothing is in language '{missing[0]}'")
    return chosen


def without_repeats(pairs: Pairs) -> Pairs:
    """Pairs both sides of which are new."""
    seen: tuple[set, set] = (set(), set())
    kept = []
    for pair in zip(pairs.first, pairs.second, strict=True):
        if not any(text in known for text, known in zip(pair, seen, strict=True)):
            kept.append(pair)
        for text, known in zip(pair, seen, strict=True):
            known.add(text)
    return Pairs(pairs.languages, [first for first, _ in kept], [second for _, second in kept])


def mining_scores(
    x_BD: np.ndarray, y_BD: np.ndarray, mesh: jax.sharding.Mesh | None = None
) -> Scores:
    """How often the nearest of `y_BD` (cosine, exact) to row b of `x_BD` is row b.

    As MTEB's BitextMining: the row found is a class, the right row the label; precision, recall
    and `f1` (the main score) are means over the B classes weighted by their labels, of which each
    has one; `accuracy` is the share of right rows. Of equally near rows the first is taken.
    """
    _, index_B1 = top_k(x_BD, y_BD, 1, mesh)
    found_B = index_B1[:, 0]
    count = len(found_B)
    is_right_B = found_B == np.arange(count)
    # Each class has one label, so its recall is 0 or 1, and its precision 1 / how often it was
    # found if one of these times was the right one.
    precision_B = is_right_B / np.maximum(np.bincount(found_B, minlength=count), 1)
    f1_B = 2 * precision_B / (1 + precision_B)
    return {
        "f1": float(f1_B.mean()),
        "accuracy": float(is_right_B.mean()),
        "precision": float(precision_B.mean()),
        "recall": float(is_right_B.mean()),
        "pairs": count,
    }
