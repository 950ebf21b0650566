"""What all task families share: the files of a task's subsets, and what a subset scores."""

import abc
import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import ClassVar

from moe_embed_jax.errors import UserError
from moe_embed_jax.safe_names import check_name

PLACE = "{subset}"  # in a path: the name of a subset
WHOLE = "default"  # the only subset of a task without a place in its path, MTEB's name for it

Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Subset:
    """A part of a task's data: its name, the language of its texts, and its path."""

    name: str
    language: str
    path: Path


@dataclasses.dataclass(frozen=True)
class SubsetScores:
    """Scores of a subset at each width; `languages` of its texts, queries before documents."""

    name: str
    languages: tuple[str, ...]
    scores: dict[int | None, Scores]


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """What the config of a suite lists; its keys are the fields of the family's class.

    languages: as of `find_subsets`. split: of the data, under which MTEB files the scores.
    """

    main_score: ClassVar[str]  # key of the scores that counts

    languages: object = dataclasses.field(default=None, kw_only=True)
    split: str = dataclasses.field(default="test", kw_only=True)

    def __post_init__(self):
        check_languages(self.languages)

    @abc.abstractmethod
    def files(self, root: Path) -> list[Path]:
        """All files it reads; `UserError` for what is missing."""

    @abc.abstractmethod
    def evaluate(self, root: Path, vectors, label: str) -> Iterator[SubsetScores]:
        """The scores of every subset; `vectors` is a `TextVectors`, `label` the task's name."""


def find_subsets(root: Path, path: str, languages) -> list[Subset]:
    """The subsets of a task.

    Args:
      path: under `root`; `{subset}` in it stands for the name of a subset.
      languages: a code: of all subsets. Codes in a list: a subset of each. {subset: code}. None:
        whatever is there, subsets are named by their language.

    Raises `UserError` where a subset is named that does not exist, or there is none.
    """
    if PLACE not in path:
        if not isinstance(languages, str):
            raise UserError(f"path {path!r} has no {PLACE}: languages must be one code, like 'en'")
        return [Subset(WHOLE, languages, _existing(root, path))]
    if languages is None or isinstance(languages, str):
        names = subset_names(root, path)
        return [Subset(n, languages or n, _existing(root, path.replace(PLACE, n))) for n in names]
    named = languages if hasattr(languages, "items") else {code: code for code in languages}
    return [
        Subset(name, language, _existing(root, path.replace(PLACE, name)))
        for name, language in dict(named).items()
    ]


def subset_names(root: Path, path: str) -> list[str]:
    """What stands in the place of `{subset}` in the paths that exist, sorted."""
    parts = PurePosixPath(path).as_posix().split(PLACE)
    first, *others = (re.escape(part).replace(r"\*", "[^/]*") for part in parts)
    pattern = re.compile(f"{first}(?P<subset>[^/]+){'(?P=subset)'.join(others)}")
    found = (p.relative_to(root).as_posix() for p in _matches(root, "*".join(parts)))
    names = sorted({match["subset"] for name in found if (match := pattern.fullmatch(name))})
    if not names:
        raise UserError(f"{root / path}: nothing there has such a name")
    return [check_name(name, f"{root / path}: the name of a subset") for name in names]


def expand(path: Path) -> list[Path]:
    """The files of a path that may have a `*`, in the order of their names and numbers."""
    if "*" not in str(path):
        return [path]
    root = next(parent for parent in path.parents if "*" not in str(parent))
    found = _matches(root, path.relative_to(root).as_posix())
    return sorted(found, key=_numbers_by_value)


def check_files(paths: Iterable[Path]) -> list[Path]:
    paths = list(paths)
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    return paths


def check_languages(languages) -> None:
    """Raises `UserError` unless it is what `find_subsets` takes."""
    codes: Sequence = ()
    if hasattr(languages, "items"):
        codes = [*languages.keys(), *languages.values()]
    elif isinstance(languages, (list, tuple)):
        codes = languages
    elif languages is not None and not isinstance(languages, str):
        raise UserError(f"languages={languages!r} must be a code, a list of codes, a dict or None")
    if bad := [code for code in codes if not isinstance(code, str)]:
        raise UserError(f"languages: {bad[0]!r} is not a code like 'en'")
    if languages is not None and not languages:
        raise UserError("languages is empty: leave it out to take all that are there")


def check_place(path: str, key: str = "path") -> None:
    """Raises `UserError` unless a path has a place for the name of a subset."""
    if PLACE not in path:
        raise UserError(f"{key} {path!r} has no {PLACE}, the language")


def _existing(root: Path, path: str) -> Path:
    if not [found for found in expand(root / path) if found.exists()]:
        what = "no file has such a name" if "*" in path else "no such file or folder"
        raise UserError(f"{root / path}: {what}")
    return root / path


def _matches(root: Path, pattern: str) -> list[Path]:
    """What is below `root` under names like `pattern`, hidden files and folders left out."""
    pattern = re.sub(r"\*+", "*", pattern.strip("/"))

    def is_hidden(path: Path) -> bool:
        names = zip(path.relative_to(root).parts, PurePosixPath(pattern).parts, strict=True)
        return any(name.startswith(".") and not wanted.startswith(".") for name, wanted in names)

    return [path for path in root.glob(pattern) if not is_hidden(path)]


def _numbers_by_value(path: Path) -> list:
    """docs-9 before docs-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]
