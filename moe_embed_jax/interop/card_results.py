"""Scores for the hub's model index: of MTEB's JSON files, or of a run's results.json."""

import pathlib
import statistics

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.json_file import read_object, read_optional

RUN_RESULTS = "results.json"  # of a finished run: {column: {set/language: metrics}}
TRAINED = "trained"  # its column
NDCG = "ndcg_at_10"


def run_scores(folder: pathlib.Path) -> list[dict]:
    """nDCG@10 of a run's held-out sets, each the mean of its languages; []: there is none.

    {"task_type", "dataset_type", "dataset_name", "metric_type", "metric_value"}, as
    huggingface_hub's `EvalResult` takes them.
    """
    columns = read_optional(folder / RUN_RESULTS)
    sets: dict[str, list[float]] = {}
    for name, metrics in (columns.get(TRAINED) or {}).items():
        if NDCG in metrics:
            sets.setdefault(name.partition("/")[0], []).append(metrics[NDCG])
    return [
        {
            "task_type": "information-retrieval",
            "dataset_type": f"held-out/{name}",
            "dataset_name": f"{name}, held out{_mean_of(scores, 'languages')}",
            "metric_type": NDCG,
            "metric_value": round(statistics.fmean(scores), 4),
        }
        for name, scores in sets.items()
    ]


def mteb_scores(folder: str) -> list[dict]:
    """Main scores of the tasks below `folder`, all features; entries as of `run_scores`.

    Raises `UserError`: no results there.
    """
    root = storage.path(folder)
    scores = []
    for path in sorted(root.rglob("*.json")) if root.is_dir() else []:
        content = read_object(path)
        if "experiments" in path.parts or not {"task_name", "scores"} <= content.keys():
            continue
        for split, subsets in content["scores"].items():
            scores.append(
                {
                    "task_type": "sentence-similarity",
                    "dataset_type": f"mteb/{content['task_name']}",
                    "dataset_name": f"MTEB {content['task_name']}{_mean_of(subsets, 'subsets')}",
                    "dataset_split": split,
                    "dataset_revision": content.get("dataset_revision"),
                    "metric_type": "main_score",
                    "metric_value": round(statistics.fmean(s["main_score"] for s in subsets), 4),
                }
            )
    if not scores:
        raise UserError(f"--evaluation={folder} holds no results as launch/evaluate.py writes them")
    return scores


def _mean_of(scores: list, kind: str) -> str:
    return f", mean of {len(scores)} {kind}" if len(scores) > 1 else ""
