"""What a recipe reads and does not make: looked for before the first step, not hours later."""

import dataclasses
from collections.abc import Callable

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.beir import find_files
from moe_embed_jax.evaluation.retrieval import mean_over_languages
from moe_embed_jax.json_file import read_object
from moe_embed_jax.pairs.manifest import read_manifest
from moe_embed_jax.recipe.config import MERGED, Recipe

WHOLE = "all"  # dimensions


@dataclasses.dataclass(frozen=True)
class Input:
    """A folder that a field of the recipe names. look: raises `UserError` if it is none."""

    key: str
    name: str
    look: Callable

    def check(self) -> None:
        try:
            self.look(storage.path(self.name))
        except UserError as error:
            raise UserError(f"{self.key}={self.name}: {error}") from None


def inputs_of(recipe: Recipe) -> dict[str, list[Input]]:
    """{step: what it reads beside other steps' output}. Teachers are looked for by the config."""
    texts = recipe.stage1.set.get("data", {}).get("texts", "")
    sets = [folder for folder in recipe.evaluate.beir.split(",") if folder]
    return {
        "stage1": _folders("stage1.set.data.texts", [texts], read_manifest),
        "mine": _folders("mine.pairs", [recipe.mine.pairs], read_manifest),
        "evaluate": _folders("evaluate.beir", sets, find_files),
    }


def _folders(key: str, names: list[str], look: Callable) -> list[Input]:
    return [Input(key, name, look) for name in names if name]


def last_scores(beside: str) -> tuple[str, dict]:
    """(folder of the last model of a finished recipe, its scores: dimensions -> set -> metrics).

    beside: that recipe's work directory, `evaluate.beside`.
    """
    workdir = storage.path(beside)
    for model in ("stage4", MERGED, "stage3"):
        path = workdir / "evaluation" / f"{model}.json"
        if storage.has_entry(path):
            return f"{workdir}/{model}", means_of(read_object(path), WHOLE)
    raise UserError(f"evaluate.beside={workdir}: no finished recipe with evaluations is there")


def means_of(content: dict, dim: str) -> dict:
    """dimensions -> set -> metrics of results of launch/evaluate.py; "256 int8" is one of these.
    `dim`: of results that have one alone."""
    has_dims = all(isinstance(x, dict) for values in content.values() for x in values.values())
    by_dim = content if has_dims else {dim: content}
    return {dim: mean_over_languages(sets) for dim, sets in by_dim.items()}
