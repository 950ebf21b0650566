"""Which pairs launch/filter.py keeps. Imports no jax."""

import dataclasses
import math

from moe_embed_jax.config import setting
from moe_embed_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ConsistencyRule:
    """A pair is kept unless `k` other documents score more than `margin` above its own.

    k: 2 in the paper. margin: of the score; 0 is the paper's rule (a document that scores the same
    as the own one does not count against it), more keeps more, less than 0 asks the own document
    to lead. chunk: most pairs whose documents compete; a group is cut into as few equal chunks as
    that allows, so that no small remainder is judged against a handful of documents, or lost.

    Duplicates of a document (`pairs.normal_form`) are one document: a copy of the own document
    is the own document, and copies of another take one place.
    """

    k: int = setting(2, flag="other documents that may not be nearer")
    chunk: int = setting(1_000_000, flag="most pairs that compete")
    margin: float = setting(0.0, flag="by how much they must be nearer")

    def __post_init__(self):
        if self.k < 1 or self.chunk < 1:
            raise UserError(f"k={self.k} and chunk={self.chunk} must be at least 1")
        if not math.isfinite(self.margin):
            raise UserError(f"margin={self.margin} must be a number")
