"""From runs to numbers: means with intervals, differences by seed, where a difference points.

`Runs` is {arm: {seed: what findings_runs.read_run gave}}. A difference is taken between runs of the
same seed, which saw the same pairs in the same order; its interval is over the seeds.
"""

import numpy as np
from seeded_runs import interval

Runs = dict[str, dict[int, dict]]
QUARTERS = 4
UNDECIDED = "no winner at this scale"


def quality(setting_width: int, narrow: int) -> dict[str, tuple[str, ...]]:
    """{column of the tables: keys of a run that lead to its number}; higher is better."""
    full, third = str(setting_width), str(narrow)
    return {
        "held-out at the start": ("start", "all"),
        "held-out": ("held_out", full, "all"),
        "held-out at equal wall time": ("equal_time",),
        "translations": ("held_out", full, "translations"),
        "descriptions": ("held_out", full, "descriptions"),
        f"held-out, {third} features": ("held_out", third, "all"),
        "XQuAD": ("xquad", full, "all"),
        f"XQuAD, {third} features": ("xquad", third, "all"),
    }


def value(run: dict, keys: tuple[str, ...]):
    """The number at the end of `keys`, or None."""
    for key in keys:
        if run is None or key not in run:
            return None
        run = run[key]
    return run


def of_arm(runs: Runs, arm: str, keys) -> list[float]:
    """Over the seeds; empty unless every run of the arm has it."""
    values = [value(run, keys) for run in runs.get(arm, {}).values()]
    return [] if None in values else values


def differences(runs: Runs, arm: str, other: str, keys) -> list[float]:
    """arm - other, for every seed that both have."""
    ours, theirs = runs.get(arm, {}), runs.get(other, {})
    pairs = [(value(ours[s], keys), value(theirs[s], keys)) for s in ours if s in theirs]
    return [] if any(None in pair for pair in pairs) else [a - b for a, b in pairs]


def judge_at_equal_time(runs: Runs) -> None:
    """Gives each run `equal_time`: its score when the fastest arm of its seed was done, taken from
    its evaluations on the way; steps of a run are taken as equally long. Only for seeds of which
    every arm is there with its time."""
    for seed in set().union(*(of_arm_ for of_arm_ in runs.values())):
        found = [of_arm_.get(seed) for of_arm_ in runs.values()]
        if not all(run and run["seconds"] for run in found):
            continue
        least = min(run["seconds"] for run in found)
        for run in found:
            steps = [int(step) for step in run["evaluations"]]
            reached = run["steps"] * least / run["seconds"]
            run["equal_time"] = float(np.interp(reached, steps, [*run["evaluations"].values()]))


def cell(values: list[float], signed: bool = False, digits: int = 3) -> str:
    """ "mean ± half of the interval", without an interval for a single seed."""
    if not values:
        return "not run"
    mean, half = interval(values)
    text = f"{mean:+.{digits}f}" if signed else f"{mean:.{digits}f}"
    return text if np.isnan(half) else f"{text} ± {half:.{digits}f}"


def verdict(arm: str, other: str, values: list[float], higher_is_better: bool = True) -> str:
    """What the differences arm - other say."""
    if not values:
        return "not run"
    mean, half = interval(values)
    said = cell(values, signed=True)
    if np.isnan(half):
        return f"{said} for {arm}: one seed, so no interval and no verdict"
    if abs(mean) <= half:
        return f"{said}: the interval includes 0, {UNDECIDED}"
    better = arm if (mean > 0) == higher_is_better else other
    return f"{said}: {better} is better, the interval excludes 0"


def quarter_means(losses: list[float]) -> np.ndarray:
    """[4]: mean over each quarter of the steps."""
    return np.array([part.mean() for part in np.array_split(np.asarray(losses), QUARTERS)])


def loss_differences(runs: Runs, arm: str, other: str) -> np.ndarray:
    """[seeds, 4]: quarter by quarter, arm - other; below 0 the arm is ahead."""
    ours, theirs = runs.get(arm, {}), runs.get(other, {})
    seeds = [seed for seed in ours if seed in theirs]
    found = [quarter_means(ours[s]["loss"]) - quarter_means(theirs[s]["loss"]) for s in seeds]
    return np.array(found).reshape(len(seeds), QUARTERS)


def trend(arm: str, other: str, difference_SQ: np.ndarray) -> str:
    """Where the difference of losses goes, from its second quarter (the first is warm-up) on."""
    if not len(difference_SQ):
        return "not run"
    change = (difference_SQ[:, -1] - difference_SQ[:, 1]).tolist()
    said = f"from the second quarter to the last {cell(change, signed=True)}"
    mean, half = interval(change)
    if np.isnan(half):
        return f"{said}: one seed, no verdict"
    if abs(mean) <= half:
        return f"{said}: the interval includes 0, no direction can be told"
    return f"{said}: more data moves it towards {arm if mean < 0 else other}"


def effective_experts(load_SME) -> tuple[float, float]:
    """(of the mean load over the last half of the steps, mean of those of single batches): the
    first says whether all experts are used, the second how many one language's batch uses. Means
    over layers."""
    from moe_embed_jax.routing.router import effective_experts as effective

    load_SME = np.asarray(load_SME)[len(load_SME) // 2 :]
    whole = effective(load_SME.mean(axis=0)).mean()
    return float(whole), float(effective(load_SME).mean())


def mutual_information(share_AME: np.ndarray) -> float:
    """Bits that the expert of an assignment tells about the language of its text, all languages
    equally frequent; mean over layers. `share_AME`: of the assignments of each language."""
    from moe_embed_jax.evaluation.expert_use import mutual_information as by_layer

    return float(by_layer(share_AME).mean())


def curve_differences(runs: Runs, arm: str, other: str) -> tuple[list[float], list[float]]:
    """Largest |difference| of the losses: (of the first step, of all), by seed."""
    ours, theirs = runs.get(arm, {}), runs.get(other, {})
    first, largest = [], []
    for seed in [seed for seed in ours if seed in theirs]:
        gaps = np.abs(np.subtract(ours[seed]["loss"], theirs[seed]["loss"]))
        first.append(float(gaps[0]))
        largest.append(float(gaps.max()))
    return first, largest
