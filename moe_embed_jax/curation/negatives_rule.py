"""Which documents launch/mine.py takes for hard negatives. Imports no jax."""

import dataclasses
import math

from moe_embed_jax.config import setting
from moe_embed_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class NegativesRule:
    """Which candidates become negatives.

    A query's candidates are ranked by score; its own documents (of all pairs with this query), and
    a document that is the query itself, are taken out first. Of the ranks `skip` to `search` - 1
    the best `count` are taken whose score is below both limits, where s is the lowest score of the
    query's own documents:

    * `s - (1 - relative) |s|`, that is `relative` x s where s is positive;
    * `s - absolute`.

    relative=1 and absolute=0 ask for a lower score than the positive; None leaves that limit out.
    Texts with the same `pairs.normal_form` are one query and one document.
    """

    count: int = setting(10, flag="negatives of a query")
    relative: float | None = setting(0.95, flag="of the own score, or none")
    absolute: float | None = setting(None, flag="below the own score, or none")
    skip: int = setting(0, flag="best ranks that are left out")
    search: int = setting(1000, flag="ranks that are looked at")

    def __post_init__(self):
        if self.count < 1 or not 0 <= self.skip < self.search:
            raise UserError(
                f"count={self.count}, skip={self.skip}, search={self.search}: expected count > 0 "
                "and 0 <= skip < search"
            )
        for name in ("relative", "absolute"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"{name}={value} must be a number or none")
