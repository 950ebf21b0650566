"""A suite of evaluation tasks: the config that lists them, and the run over all of them."""

import dataclasses
import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moe_embed_jax import config as config_files
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.bitext import Bitext
from moe_embed_jax.evaluation.cross_lingual import CrossLingual
from moe_embed_jax.evaluation.miracl import Miracl
from moe_embed_jax.evaluation.probe import Probe
from moe_embed_jax.evaluation.similarity import Similarity
from moe_embed_jax.evaluation.streamed_retrieval import Retrieval
from moe_embed_jax.evaluation.subsets import SubsetScores, Task
from moe_embed_jax.evaluation.text_vectors import TextVectors

KINDS = {
    "retrieval": Retrieval,
    "miracl": Miracl,
    "cross_lingual": CrossLingual,
    "sts": Similarity,
    "bitext": Bitext,
    "classification": Probe,
}
READ_AT_ONCE = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """What `get_config` of a suite's config file gives: name -> {"kind": ..., keys of the kind}."""

    tasks: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Scores of a task.

    revision: SHA-256 of the names and contents of its files, 40 hex digits. seconds: it took.
    """

    name: str
    kind: str
    split: str
    main_score: str
    revision: str
    subsets: tuple[SubsetScores, ...]
    seconds: float

    def score(self, subset: SubsetScores, width: int | None) -> float:
        return subset.scores[width][self.main_score]

    def mean(self, width: int | None) -> float:
        """The plain mean of the subsets' main scores, as in MTEB."""
        return float(np.mean([self.score(subset, width) for subset in self.subsets]))


def load_suite(spec: str, values: dict | None = None) -> dict[str, Task]:
    """The tasks of a config, in its order.

    Args:
      spec: `path/to/suite.py` or `path/to/suite.py:variant`, see configs/evaluation.py.
      values: what `config.read_config_file` gave for it; None: it is read now.

    Raises `UserError` that names the task and the key.
    """
    if values is None:
        _, values = config_files.read_config_file(SuiteConfig, spec)
    config = config_files.fill(SuiteConfig, values, {})
    if not config.tasks:
        raise UserError(f"{spec} lists no tasks")
    tasks = {}
    for name, entry in config.tasks.items():
        where = f"tasks.{name}"
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{spec}: {where}: the name is that of a file; use letters and digits")
        if not hasattr(entry, "items"):
            raise UserError(f"{spec}: {where} must be a section with keys, got {entry!r:.40}")
        values = dict(entry)
        kind = values.pop("kind", None)
        if kind not in KINDS:
            raise UserError(f"{spec}: {where}.kind={kind!r}: choose one of {', '.join(KINDS)}")
        try:
            tasks[name] = config_files.build(KINDS[kind], values, where)
        except UserError as error:
            text = str(error)
            raise UserError(f"{spec}: {text if where in text else f'{where}: {text}'}") from None
    return tasks


def check_files(tasks: dict[str, Task], root: Path) -> None:
    """Raises `UserError` for the first task that misses a file, before any work is done."""
    for name, task in tasks.items():
        try:
            task.files(root)
        except UserError as error:
            raise UserError(f"task {name}: {error}") from None


def run_tasks(tasks: dict[str, Task], root: Path, vectors: TextVectors) -> Iterator[TaskResult]:
    """The results one by one, as they are finished; what is embedded already is not again."""
    kinds = {cls: kind for kind, cls in KINDS.items()}
    for name, task in tasks.items():
        start = time.monotonic()
        yield TaskResult(
            name,
            kinds[type(task)],
            task.split,
            task.main_score,
            content_hash(task.files(root), root),
            tuple(task.evaluate(root, vectors, name)),
            time.monotonic() - start,
        )


def content_hash(files: list[Path], root: Path) -> str:
    sha256 = hashlib.sha256()
    for path in sorted(set(files)):
        sha256.update(f"{path.relative_to(root).as_posix()}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while data := file.read(READ_AT_ONCE):
                sha256.update(data)
    return sha256.hexdigest()[:40]
