"""The pages of findings.py: one Markdown file, pictures and one JSON file per finding, an index.

What won is said by the numbers, see findings_numbers.verdict.
"""

import datetime
import json
import os
import pathlib

import findings_pictures
import numpy as np
from findings_arms import ARMS, FINDINGS, SETTINGS, Finding
from findings_numbers import (
    Runs,
    cell,
    curve_differences,
    differences,
    effective_experts,
    judge_at_equal_time,
    loss_differences,
    mutual_information,
    of_arm,
    quality,
    trend,
    verdict,
)
from findings_runs import Place, read_run
from seeded_runs import markdown

TOLERANCE = 0.01  # of the loss, in nats: what counts as the same curve
HOW_TO_READ = (
    "nDCG@10, mean over languages, then over sets, as mean ± 95 % confidence interval over the "
    "seeds (Student's t). Differences are taken seed by seed (a seed decides the first "
    "parameters and the order of the pairs). No text of these sets was trained on. XQuAD is "
    "from a different domain, and its paragraphs are cut at 64 tokens, as documents are in "
    "training. Many differences are compared: without any effect, one interval in 20 excludes 0 "
    "by chance."
)


def command(key: str, seeds: list[int], place: Place) -> str:
    """What regenerates a finding."""
    steps = "".join(f" --{name}_steps={count}" for name, count in sorted(place.steps.items()))
    joined = ",".join(map(str, seeds))
    return (
        "python benchmarks/findings.py --work=runs/findings --data_dir=runs/data --xquad=XQUAD \\\n"
        f"    --e5=E5 --findings={key} --seeds={joined}{steps} --report=docs/results"
    )


def write(folder: pathlib.Path, place: Place, keys: list[str], seeds: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key in keys:
        finding = FINDINGS[key]
        runs: Runs = {}
        for arm in finding.arms:
            found = {seed: read_run(place, arm, seed) for seed in seeds}
            runs[arm] = {seed: run for seed, run in found.items() if run}
        if key == "g":
            judge_at_equal_time(runs)
        write_json(folder / f"{finding.name}.json", runs)
        pictures = findings_pictures.draw(folder, key, finding, runs)
        text = page(key, finding, runs, seeds, place, pictures)
        (folder / f"{finding.name}.md").write_text(text)
    write_index(folder)


def read(folder: str, keys: list[str]) -> dict[tuple[str, int], dict]:
    """{(arm, seed): numbers} of what `write` has left there before."""
    runs = {}
    for key in keys:
        path = pathlib.Path(folder) / f"{FINDINGS[key].name}.json"
        for run in json.loads(path.read_text()) if path.is_file() else ():
            steps = {int(step): score for step, score in run["evaluations"].items()}
            runs[run.pop("arm"), run["seed"]] = run | {"evaluations": steps}
    return runs


def write_json(path: pathlib.Path, runs: Runs) -> None:
    """Numbers to five digits; loads of single steps are left out, routing by language is in."""

    def short(tree):
        if isinstance(tree, dict):
            return {str(key): short(each) for key, each in tree.items() if key != "load"}
        if isinstance(tree, list):
            return [short(each) for each in tree]
        return float(f"{tree:.5g}") if isinstance(tree, float) else tree

    lines = []
    for arm, of_arm_ in runs.items():
        for run in of_arm_.values():
            lines.append(json.dumps({"arm": arm} | short(run), ensure_ascii=False))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def write_index(folder: pathlib.Path) -> None:
    lines = [
        "# Findings",
        "",
        "What `benchmarks/findings.py` found. Each run takes minutes. "
        f"Report of {datetime.date.today():%B %Y}, on {os.cpu_count()} CPU cores.",
        "",
    ]
    for key, finding in FINDINGS.items():
        there = (folder / f"{finding.name}.md").exists()
        where = f"[{finding.title}]({finding.name}.md)" if there else f"{finding.title}: not run"
        lines.append(f"* ({key}) {where}")
    lines += ["", HOW_TO_READ, ""]
    (folder / "README.md").write_text("\n".join(lines))


def page(key, finding: Finding, runs: Runs, seeds, place: Place, pictures: list[str]) -> str:
    parts = [f"# {finding.title}", "```\n" + command(key, seeds, place) + "\n```"]
    if finding.notes:
        parts.append(finding.notes)
    missing = [
        f"{arm} (seeds {', '.join(map(str, absent))})"
        for arm in finding.arms
        if (absent := [seed for seed in seeds if seed not in runs[arm]])
    ]
    if missing:
        parts.append(f"**Not run:** {'; '.join(missing)}.")
    if key == "f":
        body = [curves(finding, runs)]
    else:
        body = [quality_tables(finding, runs), *([loads(finding, runs)] if key == "c" else [])]
        if key != "e":  # its losses are not of the same widths
            body.append(trends(finding, runs))
    parts += ["## The arms", arms_table(finding, runs), *body]
    parts += [f"![{name}]({name})" for name in pictures]
    if key != "f":
        parts += ["## How to read this", HOW_TO_READ]
    return "\n\n".join(parts) + "\n"


def arms_table(finding: Finding, runs: Runs) -> str:
    head = ["arm", "what", "seeds", "parameters", "active", "active, without embeddings"]
    lines = [[*head, "steps", "pairs seen", "minutes"]]
    for arm in finding.arms:
        found = list(runs[arm].values())
        if not found:
            lines.append([arm, ARMS[arm].text, "not run", *[""] * 6])
            continue
        run = found[0]
        seconds = [each["seconds"] for each in found if each["seconds"]]
        numbers = [run["total"], run["active"], run["active"] - run["embeddings"]]
        numbers += [run["steps"], run["steps"] * run["batch_size"]]
        minutes = f"{np.mean(seconds) / 60:.1f}" if seconds else "unknown"
        lines.append([arm, ARMS[arm].text, str(len(found)), *(f"{n:,}" for n in numbers), minutes])
    return markdown(lines) + (
        "\n\nActive: parameters that one token uses, word table included. Minutes: training and "
        "held-out evaluations, while other runs used the same machine."
    )


def by_setting(finding: Finding) -> dict[str, list[str]]:
    """{setting: its arms}, in order."""
    groups: dict[str, list[str]] = {}
    for arm in finding.arms:
        groups.setdefault(ARMS[arm].setting, []).append(arm)
    return groups


def quality_tables(finding: Finding, runs: Runs) -> str:
    parts = []
    for name, arms in by_setting(finding).items():
        setting = SETTINGS[name]
        columns = {
            column: keys
            for column, keys in quality(setting.width, setting.narrow).items()
            if any(of_arm(runs, arm, keys) for arm in arms)
        }
        if not columns:
            continue
        parts.append(f"## Quality ({name})")
        rows = [[arm, *(cell(of_arm(runs, arm, k)) for k in columns.values())] for arm in arms]
        parts.append(markdown([["arm", *columns], *rows]))
        rows, verdicts = [], []
        for arm, other, what in finding.comparisons:
            if arm not in arms:
                continue
            found = {c: differences(runs, arm, other, keys) for c, keys in columns.items()}
            rows.append([f"{arm} - {other} ({what})", *(cell(d, True) for d in found.values())])
            pair = f"{arm} against {other} ({what})"
            if not any(found.values()):
                verdicts.append(f"* {pair}: not run.")
                continue
            for column in filter(finding.judges, columns):
                verdicts.append(f"* {pair}, {column}: {verdict(arm, other, found[column])}.")
        parts.append(markdown([["difference", *columns], *rows]))
        parts.append("\n".join(verdicts))
    return "\n\n".join(parts)


def trends(finding: Finding, runs: Runs) -> str:
    """Differences of the training loss, quarter by quarter."""
    head = ["arm - other", *(f"{25 * q}-{25 * (q + 1)} %" for q in range(4))]
    lines, said = [head], []
    for arm, other, what in finding.comparisons:
        difference_SQ = loss_differences(runs, arm, other)
        cells = [cell(column.tolist(), signed=True) for column in difference_SQ.T]
        lines.append([f"{arm} - {other}", *cells])
        said.append(f"* {arm} - {other} ({what}): {trend(arm, other, difference_SQ)}.")
    return "\n\n".join(
        (
            "## Where the trend points",
            "Difference of the contrastive training loss (nats; below 0: the first arm is ahead) "
            "over the quarters of the run. Both arms see the same batches, each of them new to the "
            "model when its loss is taken.",
            markdown(lines),
            "\n".join(said),
        )
    )


def loads(finding: Finding, runs: Runs) -> str:
    """How many experts are used, and by which language."""
    head = ["arm", "effective experts", "in one batch", "highest load", "expert tells of language"]
    lines, tables = [head], []
    for arm in finding.arms:
        found = list(runs[arm].values())
        if not found:
            lines.append([arm, *["not run"] * 4])
            continue
        used = [effective_experts(run["load"]) for run in found]
        shares = [np.array(list(run["routing"].values())) for run in found]
        experts = shares[0].shape[-1]
        columns = (
            [each[0] for each in used],
            [each[1] for each in used],
            [float((share.mean(axis=0) * experts).max()) for share in shares],
        )
        told = [mutual_information(share) for share in shares]
        lines.append([arm, *(cell(c, digits=2) for c in columns), cell(told) + " bits"])
        tables.append(load_table(arm, found[0]))
    return "\n\n".join(
        (
            "## Load of the experts",
            "Effective experts: exp of the entropy of the load, 8 at balance, over the last half "
            "of the steps together and in the mean batch of one language. Highest load: of an "
            "expert over all languages (1 is an equal share). The last column is the mutual "
            "information of expert and language. Both are measured on held-out translations at the "
            "end.",
            markdown(lines),
            *tables,
        )
    )


def load_table(arm: str, run: dict) -> str:
    """Load per expert and language of one run."""
    share = {language: np.array(of) for language, of in run["routing"].items()}
    layers, experts = next(iter(share.values())).shape
    head = ["language", *(f"{m}.{e}" for m in range(layers) for e in range(experts))]
    rows = [
        [language, *(f"{load:.1f}" for load in (of * experts).reshape(-1))]
        for language, of in share.items()
    ]
    return f"{arm}, seed {run['seed']} (expert layer.expert):\n\n{markdown([head, *rows])}"


def curves(finding: Finding, runs: Runs) -> str:
    """Whether the losses of two arms are the same."""
    lines = [["arms", "largest difference, first step", "largest difference, all steps"]]
    said = []
    for arm, other, _ in finding.comparisons:
        first, largest = curve_differences(runs, arm, other)
        if not first:
            lines.append([f"{arm} - {other}", "not run", "not run"])
            continue
        lines.append([f"{arm} - {other}", f"{max(first):.2e}", f"{max(largest):.2e}"])
        same = "the same" if max(largest) <= TOLERANCE else "NOT the same"
        said.append(f"* {arm} and {other}: {same} within {TOLERANCE} nats.")
    base = [run["loss"] for run in runs[finding.arms[0]].values()]
    if len(base) > 1:
        gaps = np.abs(np.subtract(base[0], base[1])).max()
        said.append(f"* As a yardstick: two seeds of {finding.arms[0]} differ by up to {gaps:.2f}.")
    use = [f"{arm} {of[0]:.0%}" for arm in runs if (of := of_arm(runs, arm, ("utilisation",)))]
    said += [f"* Share of the token slots that hold a token: {', '.join(use)}."] if use else []
    return "\n\n".join(("## Losses (nats, over all seeds)", markdown(lines), "\n".join(said)))
