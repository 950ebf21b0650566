"""The keys of distillation, as configs state them. Imports no jax."""

import dataclasses
import math
import numbers

from moe_embed_jax.errors import UserError

MATCHES = ("projection", "slice")
SCORES_FROM = ("pairs", "teacher")


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """What a student learns from a teacher (losses/distillation.py); a weight of 0 is off.

    vectors: weight of 1 - cosine between the student's and the teacher's vectors.
    match: how vectors of two widths are compared. "projection": a learned matrix takes the
      student's to the teacher's width; a Matryoshka width has the first rows of it. "slice": the
      first components of both, as many as the shorter one has (for Matryoshka teachers, or equal
      widths).
    scores: weight of the divergence from the teacher's distribution over a query's own document
      and its hard negatives.
    scores_from: "pairs": what `data.pairs` has (launch/mine.py writes scores, and raw sources may
      bring them); "teacher": inner products of the vectors of `data.teacher`.
    batch_scores: weight of the divergence from the teacher's distribution over the own documents of
      the whole batch, by the vectors of `data.teacher`.
    teacher_temperature: of the teacher's softmax: some hundredths for cosines, 1 for the logits of
      a cross-encoder. The student's is `loss.temperature`.
    contrast: weight of the contrastive loss beside these; 0 learns from the teacher alone.
    """

    vectors: float = 0.0
    match: str = "projection"
    scores: float = 0.0
    scores_from: str = "pairs"
    batch_scores: float = 0.0
    teacher_temperature: float = 0.02
    contrast: float = 1.0

    def __post_init__(self):
        for name in ("vectors", "scores", "batch_scores", "contrast"):
            if not _is_number(getattr(self, name)):
                raise UserError(
                    f"loss.distillation.{name}={getattr(self, name)!r} must be 0 (off) or more"
                )
        for name, choices in (("match", MATCHES), ("scores_from", SCORES_FROM)):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"loss.distillation.{name}={getattr(self, name)!r}: choose from {choices}"
                )
        if not (_is_number(self.teacher_temperature) and self.teacher_temperature):
            raise UserError(
                f"loss.distillation.teacher_temperature={self.teacher_temperature!r} must be above "
                "0"
            )
        if not (self.is_on or self.contrast):
            raise UserError(
                "loss.distillation.contrast=0, and no other weight of loss.distillation is above "
                "0: nothing is learned"
            )

    @property
    def is_on(self) -> bool:
        return bool(self.vectors or self.scores or self.batch_scores)

    @property
    def has_projection(self) -> bool:
        """Whether there is a matrix to learn."""
        return bool(self.vectors) and self.match == "projection"

    @property
    def reads_vectors(self) -> bool:
        """Whether `data.teacher` is needed."""
        return self.takes_vectors or (bool(self.scores) and self.scores_from == "teacher")

    @property
    def takes_vectors(self) -> bool:
        """Whether the teacher's vectors come with each batch."""
        return bool(self.vectors or self.batch_scores)


def _is_number(value) -> bool:
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and 0 <= value < math.inf
