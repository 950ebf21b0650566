"""The pictures of findings.py: small PNG files, named after their finding."""

import pathlib

import matplotlib
import numpy as np
from findings_arms import ARMS, Finding
from findings_numbers import QUARTERS, Runs, loss_differences
from matplotlib.figure import Figure
from seeded_runs import interval

DPI = 80


def draw(folder: pathlib.Path, key: str, finding: Finding, runs: Runs) -> list[str]:
    """Draws what there is to draw; returns the names of the files."""
    drawn = {}
    if key not in ("e", "f"):
        drawn["trend"] = _trend(finding, runs)
    if key != "f":
        drawn["ndcg"] = _evaluations(finding, runs)
    if key == "f":
        drawn["losses"] = _losses(finding, runs)
    if key == "c":
        drawn["load"] = _load_by_language(finding, runs)
    names = []
    for what, figure in drawn.items():
        if figure is not None:
            names.append(f"{finding.name}_{what}.png")
            figure.savefig(folder / names[-1], dpi=DPI, metadata={"Software": None})
    return names


def _intervals(values_SX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(means, halves of intervals) over the seeds; a half of 0 where there is no interval."""
    pairs = np.array([interval(column) for column in np.asarray(values_SX).T])
    return pairs[:, 0], np.nan_to_num(pairs[:, 1])


def _trend(finding: Finding, runs: Runs) -> Figure | None:
    """Difference of the losses against pairs seen."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes, empty = figure.subplots(), True
    for place, (arm, other, _) in enumerate(finding.comparisons):
        difference_SQ = loss_differences(runs, arm, other)
        if not len(difference_SQ):
            continue
        empty = False
        mean, half = _intervals(difference_SQ)
        share = (np.arange(QUARTERS) + 0.5) / QUARTERS * 100 + 0.6 * place
        axes.errorbar(share, mean, half, label=f"{arm} - {other}", capsize=3, marker="o")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="% of the run's pairs seen", ylabel="difference of the loss (nats)")
    axes.set_title("Below 0: the first arm is ahead (mean of a quarter, 95 % interval)")
    if empty:
        return None
    axes.legend(fontsize=8)
    return figure


def _evaluations(finding: Finding, runs: Runs) -> Figure | None:
    """nDCG@10 over the held-out sets against pairs seen, a panel per setting."""
    settings = list(dict.fromkeys(ARMS[arm].setting for arm in finding.arms if runs[arm]))
    if not settings:
        return None
    figure = Figure(figsize=(5.5 * len(settings), 4), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for axes, setting in zip(panels, settings, strict=True):
        for arm in [arm for arm in finding.arms if ARMS[arm].setting == setting and runs[arm]]:
            found = list(runs[arm].values())
            steps = sorted(found[0]["evaluations"])
            mean, half = _intervals([[run["evaluations"][s] for s in steps] for run in found])
            pairs = np.array(steps) * found[0]["batch_size"]
            axes.errorbar(pairs, mean, half, label=arm, capsize=3, marker="o")
        axes.set(xlabel="pairs seen", ylabel="nDCG@10, held-out", title=setting)
        axes.legend(fontsize=8)
    return figure


def _losses(finding: Finding, runs: Runs) -> Figure | None:
    """The curves of the first seed, one over the other."""
    found = {arm: next(iter(of.values())) for arm, of in runs.items() if of}
    if not found:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for width, (arm, run) in zip((6, 3.5, 1.2), found.items(), strict=False):
        axes.plot(np.arange(len(run["loss"])) + 1, run["loss"], label=arm, linewidth=width)
    axes.set(xlabel="step", ylabel="contrastive loss (nats)")
    axes.legend()
    return figure


def _load_by_language(finding: Finding, runs: Runs) -> Figure | None:
    """A map per arm, of its first seed: the experts of two seeds are not the same ones."""
    found = {arm: next(iter(of.values())) for arm, of in runs.items() if of}
    if not found:
        return None
    figure = Figure(figsize=(3.2 * len(found), 4.2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    norm = matplotlib.colors.TwoSlopeNorm(1.0, 0.0, 4.0)
    for axes, (arm, run) in zip(panels, found.items(), strict=True):
        share_AME = np.array(list(run["routing"].values()))
        _, layers, experts = share_AME.shape
        load = share_AME.reshape(len(share_AME), -1) * experts
        image = axes.imshow(load, norm=norm, cmap="RdBu_r", aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(load)), list(run["routing"]), fontsize=7)
        for layer in range(1, layers):
            axes.axvline(layer * experts - 0.5, color="black", linewidth=1)
        axes.set(title=f"{arm}, seed {run['seed']}", xlabel="expert, layer by layer")
    figure.colorbar(image, ax=panels, fraction=0.02, label="load (1 = equal share)")
    return figure
