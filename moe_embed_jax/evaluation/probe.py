"""Topic classification by a linear probe on frozen embeddings, and its transfer to languages."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_embed_jax.data.text_files import read_table
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.subsets import (
    PLACE,
    Scores,
    SubsetScores,
    Task,
    check_files,
    check_place,
    find_subsets,
)
from moe_embed_jax.evaluation.text_vectors import TextVectors, cut

if TYPE_CHECKING:  # a suite without classification does without it, and without pandas
    from sklearn.linear_model import LogisticRegression

MAX_ITERATIONS = 1000  # of L-BFGS: it converges well before


@dataclasses.dataclass(frozen=True)
class LabelledTexts:
    """n texts, their labels and the split each belongs to."""

    texts: list[str]
    labels: np.ndarray
    splits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Probe(Task):
    """A table per language with the columns split, category and text; see docs/evaluation.md.

    train: language whose split `train_split` the classifier of all languages is trained on.
    """

    main_score = "accuracy"

    path: str
    train: str
    train_split: str = "train"

    def __post_init__(self):
        super().__post_init__()
        check_place(self.path)

    def files(self, root: Path) -> list[Path]:
        return check_files(s.path for s in [self._train(root), *self._subsets(root)])

    def evaluate(self, root: Path, vectors: TextVectors, label: str) -> Iterator[SubsetScores]:
        source = read_labelled(self._train(root).path)
        source_ND = vectors.embed(source.texts, "symmetric", f"{label} {self.train}")
        transferred = {
            width: self._fit(source, cut(source_ND, width), self.train) for width in vectors.widths
        }
        for subset in self._subsets(root):
            target = read_labelled(subset.path)
            x_ND = vectors.embed(target.texts, "symmetric", f"{label} {subset.name}")
            is_test = target.splits == self.split
            if not is_test.any():
                raise UserError(f"{subset.path}: nothing is in split '{self.split}'")
            scores = {}
            for width in vectors.widths:
                narrow_ND = cut(x_ND, width)
                own = self._fit(target, narrow_ND, subset.name)
                test = narrow_ND[is_test], target.labels[is_test]
                scores[width] = {
                    **probe_scores(transferred[width], *test),
                    "accuracy_in_language": probe_scores(own, *test)["accuracy"],
                    "texts": int(is_test.sum()),
                }
            yield SubsetScores(subset.name, (subset.language,), scores)

    def _train(self, root: Path):
        return find_subsets(root, self.path, [self.train])[0]

    def _subsets(self, root: Path):
        return find_subsets(root, self.path, self.languages)

    def _fit(self, data: LabelledTexts, x_ND: np.ndarray, name: str) -> "LogisticRegression":
        is_train = data.splits == self.train_split
        if len(set(data.labels[is_train])) < 2:
            raise UserError(
                f"{self.path.replace(PLACE, name)}: split '{self.train_split}' must have two "
                f"categories at least, has {len(set(data.labels[is_train]))}"
            )
        return fit_probe(x_ND[is_train], data.labels[is_train])


def read_labelled(path: Path) -> LabelledTexts:
    rows = [fields for _, fields in read_table(path, ("text", "category", "split"))]
    texts, labels, splits = zip(*rows, strict=True)
    return LabelledTexts(list(texts), np.array(labels), np.array(splits))


def fit_probe(x_ND: np.ndarray, label_N: np.ndarray) -> "LogisticRegression":
    """Multinomial logistic regression as MTEB's classification tasks set it up (scikit-learn's
    defaults: L2 with C = 1), but on all texts, where MTEB draws 8 per class ten times."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=MAX_ITERATIONS).fit(x_ND.astype(np.float64), label_N)


def probe_scores(probe: "LogisticRegression", x_ND: np.ndarray, label_N: np.ndarray) -> Scores:
    """`accuracy` (the main score) and `f1`, the plain mean over the classes."""
    from sklearn.metrics import accuracy_score, f1_score

    found_N = probe.predict(x_ND.astype(np.float64))
    return {
        "accuracy": float(accuracy_score(label_N, found_N)),
        "f1": float(f1_score(label_N, found_N, average="macro", zero_division=0)),
    }
