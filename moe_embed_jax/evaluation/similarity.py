"""Semantic textual similarity: do cosines order pairs of sentences as people do?"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moe_embed_jax.data.text_files import read_table
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.subsets import (
    Scores,
    SubsetScores,
    Task,
    check_files,
    expand,
    find_subsets,
)
from moe_embed_jax.evaluation.text_vectors import TextVectors, cut


@dataclasses.dataclass(frozen=True)
class Similarity(Task):
    """Tables with the columns score, sentence1 and sentence2; see docs/evaluation.md.

    path: may have a `*`: the pairs of all those files are one subset, as MTEB pools SemEval's.
    """

    main_score = "cosine_spearman"

    path: str

    def files(self, root: Path) -> list[Path]:
        subsets = find_subsets(root, self.path, self.languages)
        return check_files(path for subset in subsets for path in expand(subset.path))

    def evaluate(self, root: Path, vectors: TextVectors, label: str) -> Iterator[SubsetScores]:
        for subset in find_subsets(root, self.path, self.languages):
            first, second, gold = read_pairs(expand(subset.path))
            x_ND = vectors.embed([*first, *second], "symmetric", f"{label} {subset.name}")
            scores = {}
            for width in vectors.widths:
                narrow_ND = cut(x_ND, width)
                scores[width] = correlations(narrow_ND[: len(gold)], narrow_ND[len(gold) :], gold)
            yield SubsetScores(subset.name, (subset.language,), scores)


def read_pairs(paths: list[Path]) -> tuple[list[str], list[str], np.ndarray]:
    """Sentences and the scores people gave (float64) of all the files."""
    first, second, gold = [], [], []
    for path in paths:
        for where, (score, sentence1, sentence2) in read_table(
            path, ("score", "sentence1", "sentence2")
        ):
            try:
                value = float(score)
            except ValueError:
                value = float("nan")
            if not np.isfinite(value):
                raise UserError(f"{where}: column 'score' must be a number, got {score!r:.40}")
            gold.append(value)
            first.append(sentence1)
            second.append(sentence2)
    if len(set(gold)) < 2:
        raise UserError(f"{paths[0]}: all pairs have the same score, there is no order to find")
    return first, second, np.array(gold)


def correlations(x_BD: np.ndarray, y_BD: np.ndarray, gold_B: np.ndarray) -> Scores:
    """Spearman's and Pearson's correlation of the cosines of B pairs of unit vectors with `gold_B`.

    As MTEB's: `cosine_spearman` is the main score. A model that gives all pairs one cosine has 0:
    it orders nothing.
    """
    import scipy.stats  # here: a suite may have no such task

    cosine_B = np.einsum("bd,bd->b", x_BD.astype(np.float64), y_BD.astype(np.float64))
    if np.ptp(cosine_B) == 0:
        spearman = pearson = 0.0
    else:
        spearman = float(scipy.stats.spearmanr(cosine_B, gold_B).statistic)
        pearson = float(scipy.stats.pearsonr(cosine_B, gold_B).statistic)
    return {"cosine_spearman": spearman, "cosine_pearson": pearson, "pairs": len(gold_B)}
