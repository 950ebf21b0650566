"""How far predictions were from what others measured: the one place that holds it.

STEPS is the outcome of benchmarks/planner_validation.py, whose table is
docs/measured/planner_validation.md; a test holds the two together.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Band:
    """Measured seconds of whole training steps over predicted ones, the least and the most, rounded
    outwards to hundredths. `steps`: how many. `chips`: which. `made_by`: the run."""

    low: float
    high: float
    steps: int
    chips: str
    made_by: str


STEPS = Band(
    low=0.39,
    high=0.88,
    steps=3,
    chips="v5e and v6e",
    made_by="benchmarks/planner_validation.py, 2026-11-30, jax 0.10.2, libtpu 0.0.42.1",
)


def describe(step_name: str, is_gpu: bool) -> str:
    """The sentence that every prediction carries."""
    if is_gpu:
        return "no prediction for GPUs was compared with a measurement"
    others = "" if step_name == "train" else f"; no {step_name} step was among them"
    return (
        f"{STEPS.steps} training steps that others measured, on {STEPS.chips}, took {STEPS.low:g} "
        f"to {STEPS.high:g} times the prediction{others} ({STEPS.made_by})"
    )


def bounds(seconds: float) -> tuple[float, float]:
    """Seconds between which a step predicted to take `seconds` should lie, as far as is known."""
    return STEPS.low * seconds, STEPS.high * seconds
