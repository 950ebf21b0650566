"""What benchmarks of training share: runs that are started once per arm and seed, and statistics
over the seeds.

A run is a process of launch/train.py in its own folder. A finished one (it has results.json)
is not repeated, an interrupted one continues.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_embed_jax.errors import UserError  # noqa: E402
from moe_embed_jax.markdown_table import markdown_table  # noqa: E402


def launch(script: str, flags: list[str], where: str, **process) -> None:
    """Runs launch/SCRIPT; raises `UserError` if it fails. `process`: of subprocess.run."""
    command = [sys.executable, f"launch/{script}", *flags]
    if subprocess.run(command, check=False, cwd=ROOT, **process).returncode:
        log = process.get("stdout")
        raise UserError(f"{where} failed; its message stands {log.name if log else 'above'}")


def train(workdir: pathlib.Path, page: str, overrides: dict, **process) -> None:
    """The run of `page` (a config file, with :variant) with `overrides` of its keys."""
    if not (workdir / "results.json").exists():
        flags = [f"--config={page}", f"--workdir={workdir}"]
        flags += [f"--config.{key}={value}" for key, value in overrides.items()]
        launch("train.py", flags, f"training in {workdir}", **process)


def held_out_scores(workdir: pathlib.Path, column: str = "trained") -> dict[str, float]:
    """{set: nDCG@10, mean over its languages, and "all": mean over sets} of a finished run."""
    from moe_embed_jax.evaluation.retrieval import mean_over_languages

    means = mean_over_languages(json.loads((workdir / "results.json").read_text())[column])
    found = {name: mean["ndcg_at_10"] for name, mean in means.items()}
    return found | {"all": sum(found.values()) / len(found)}


def link(source: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_symlink() and not target.exists():
        target.symlink_to(source.resolve())


def link_sets(data_dir: pathlib.Path, work: pathlib.Path, names) -> pathlib.Path:
    """A data folder `work`/data that holds only these held-out sets."""
    for name in names:
        source = data_dir / "retrieval" / name
        if not source.is_dir():
            raise UserError(f"there is no held-out set {source}: prepare the default data first")
        link(source, work / "data" / "retrieval" / name)
    return work / "data"


def interval(values) -> tuple[float, float]:
    """(mean, half of the 95 % confidence interval by Student's t)."""
    from scipy import stats

    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    error = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * error)


def over_seeds(seeds: str, arms, run) -> dict[str, list]:
    """{arm: what `run(arm, seed)` gave, one per seed}; all arms of a seed before the next one.

    seeds: of the command line, separated by commas.
    """
    results = {arm: [] for arm in arms}
    for seed in seeds_of(seeds):
        for arm in arms:
            results[arm].append(run(arm, seed))
    return results


def seeds_of(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds={text}: {error}") from error


def save(path: str | None, arguments, scores: dict) -> None:
    """A JSON file with the arguments of the command and its scores, where a path is given."""
    if path:
        content = {"arguments": vars(arguments), "scores": scores}
        pathlib.Path(path).write_text(json.dumps(content, indent=2) + "\n")


def markdown(lines: list[list[str]]) -> str:
    """A table; the first line is its head."""
    head, *rows = lines
    return markdown_table(head, rows, "lr")
