"""The held-out retrieval sets of the prepared data: `retrieval/<set>/<language>` BEIR folders."""

import dataclasses

from moe_embed_jax import storage
from moe_embed_jax.checksums import verify_checksums
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.beir import RetrievalSet, load_beir
from moe_embed_jax.evaluation.retrieval import evaluate_many


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a run is judged by: its key in evaluations.jsonl, and how a picture presents it."""

    key: str
    name: str
    subject: str  # what is measured: "retrieval"
    is_log: bool  # the axis of the picture


def load_heldout(data_dir, is_optional: bool = False) -> dict[str, RetrievalSet]:
    """{"<set>/<language>": set}, sorted by name.

    Raises `UserError` when `data_dir` holds none, unless `is_optional`, and for a folder that lacks
    one of its files, or was changed: a set does not vanish in silence.
    """
    root = storage.path(data_dir) / "retrieval"
    verify_checksums(root)
    folders = sorted(
        path for path in root.glob("[!.]*/[!.]*") if path.is_dir() or path.is_symlink()
    )
    if not folders and not is_optional:
        raise UserError(f"{root} holds no held-out sets: prepare the data again")
    return {folder.relative_to(root).as_posix(): load_beir(folder) for folder in folders}


def sample_languages(sets: dict[str, RetrievalSet], count: int) -> dict[str, RetrievalSet]:
    """Of every multilingual set `count` languages, evenly spaced by name: a cheap look in between.

    The same ones at every call; sets of a single language are left to the final evaluation.
    """
    names: dict[str, list[str]] = {}
    for name in sets:
        names.setdefault(name.split("/")[0], []).append(name)
    chosen = []
    for members in names.values():
        if len(members) > 1:
            step = max(len(members) / count, 1.0)
            chosen += [members[int(i * step)] for i in range(min(count, len(members)))]
    return {name: sets[name] for name in chosen}


def evaluate_heldout(embedder, sets: dict[str, RetrievalSet]) -> dict[str, dict]:
    """{name: metrics} of an `Embedder` on many sets, searched on its mesh."""
    return evaluate_many(
        lambda texts: embedder.encode(texts, prompt="query"),
        lambda texts: embedder.encode(texts, prompt="document"),
        sets,
        embedder.mesh,
    )
