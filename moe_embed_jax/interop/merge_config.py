"""How models are merged, as flags state it. Imports no jax."""

import dataclasses
import re

from moe_embed_jax.config import setting
from moe_embed_jax.errors import UserError

METHODS = ("average", "slerp")  # what they do: merge.py
_STEP = re.compile(r"(?P<folder>.+)@(?P<step>\d+)")


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    method: str = setting("average", flag="or slerp, of two models")
    weights: str = setting("", flag="a number for each model, by commas; default: equal")
    keep_expert_order: bool = False  # instead of the order that fits the first model's experts

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"--method={self.method}: choose from {', '.join(METHODS)}")

    def shares(self, models: int) -> list[float]:
        """The share of each model; they sum to 1. Raises `UserError` for other weights."""
        if models < 2:
            raise UserError("merging needs two or more models: repeat --source")
        if self.method == "slerp" and models != 2:
            raise UserError(f"--method=slerp merges two models, not {models}: use average")
        words = self.weights.split(",") if self.weights else ["1"] * models
        try:
            weights = [float(word) for word in words]
        except ValueError:
            weights = []
        if len(weights) != models or not all(0 < weight < 1e9 for weight in weights):
            raise UserError(
                f"--weights={self.weights}: give {models} numbers above 0, one for each --source"
            )
        return [weight / sum(weights) for weight in weights]


def split_step(source: str) -> tuple[str, int | None]:
    """(folder, step) of `FOLDER@STEP`, a checkpoint of a training run; without one (source, None).

    Names on the hub keep their @REVISION.
    """
    found = None if source.startswith("hf://") else _STEP.fullmatch(source)
    return (found["folder"], int(found["step"])) if found else (source, None)
