"""Which documents launch/mine.py takes for hard negatives. Imports no jax."""

import dataclasses

import numpy as np

from moe_embed_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which candidates become negatives.

    A query's candidates are ranked by score; its own documents (of all pairs with this query), and
    a document that is the query itself, are taken out first. Of the ranks `skip` to `search` - 1
    the best `count` are taken whose score is below both limits, where s is the lowest score of the
    query's own documents:

    * `s - (1 - relative) |s|`, that is `relative` x s where s is positive;
    * `s - absolute`.

    relative=1 and absolute=0 ask for a lower score than the positive; None leaves that limit out.
    Texts with the same `data.normal_form` are one query and one document.
    """

    count: int = 10
    relative: float | None = 0.95
    absolute: float | None = None
    skip: int = 0
    search: int = 1000

    def __post_init__(self):
        if self.count < 1 or not 0 <= self.skip < self.search:
            raise UserError(
                f"count={self.count}, skip={self.skip}, search={self.search}: expected count > 0 "
                "and 0 <= skip < search"
            )
        for name in ("relative", "absolute"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value):
                raise UserError(f"{name}={value} must be a number or none")

    def limit(self, positive_B: np.ndarray) -> np.ndarray:
        """float64 [B]: negatives score below it. Float32 scores are compared exactly."""
        positive_B = positive_B.astype(np.float64)
        limit_B = np.full(len(positive_B), np.inf)
        if self.relative is not None:
            limit_B = positive_B - (1 - self.relative) * np.abs(positive_B)
        if self.absolute is not None:
            limit_B = np.minimum(limit_B, positive_B - self.absolute)
        return limit_B
