"""The keys of distillation, as configs state them. Imports no jax."""

import dataclasses
import math
import numbers

from moe_embed_jax.errors import UserError

MATCHES = ("projection", "slice")


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """What a student learns from a teacher's vectors of the same texts (losses/distillation.py).

    vectors: weight of 1 - cosine between the student's and the teacher's vectors; 0: off.
    match: how vectors of two widths are compared. "projection": a learned matrix takes the
      student's to the teacher's width; a Matryoshka width has the first rows of it. "slice": the
      first components of both, as many as the shorter one has (for Matryoshka teachers, or equal
      widths).
    contrast: weight of the contrastive loss beside it; 0 learns from the teacher alone.
    """

    vectors: float = 0.0
    match: str = "projection"
    contrast: float = 1.0

    def __post_init__(self):
        for name in ("vectors", "contrast"):
            value = getattr(self, name)
            if not (isinstance(value, numbers.Real) and 0 <= value < math.inf):
                raise UserError(f"loss.distillation.{name}={value!r} must be 0 (off) or more")
        if self.match not in MATCHES:
            raise UserError(f"loss.distillation.match={self.match!r}: choose from {MATCHES}")
        if not (self.vectors or self.contrast):
            raise UserError(
                "loss.distillation.contrast=0, and no other weight of loss.distillation is above "
                "0: nothing is learned"
            )

    @property
    def has_projection(self) -> bool:
        """Whether there is a matrix to learn."""
        return bool(self.vectors) and self.match == "projection"
