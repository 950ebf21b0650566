"""What the planner is asked: the run, and the flags of launch/plan.py. Imports no jax."""

import dataclasses

from moe_embed_jax.errors import UserError
from moe_embed_jax.planning.topology import parse_topology
from moe_embed_jax.training.run_config import PAGES, Run

NOT_NEEDED = "not needed to plan"
MEAN_QUERY_TOKENS, MEAN_DOCUMENT_TOKENS = 12, 90  # of web-like text pairs, specials included
STEPS = ("train", "encode", "knn")  # the keys of steps.STEPS


class _Planned:
    """A run of which nothing but shapes matters: its vocabulary, its pairs and the model that it
    starts from need not exist. The architecture is the config's."""

    def __post_init__(self):
        data, vocabulary = self.data, self.data.vocabulary
        if vocabulary.kind == "file" and not vocabulary.path and not self.init.source:
            data = dataclasses.replace(
                data, vocabulary=dataclasses.replace(vocabulary, path=NOT_NEEDED)
            )
        if getattr(data, "negatives", 0) > 0 and not data.pairs:  # runs need pairs that have some
            data = dataclasses.replace(data, pairs=NOT_NEEDED)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "init", dataclasses.replace(self.init, required=False))
        super().__post_init__()


def _planned(page: type[Run]) -> type[Run]:
    made = type(f"Planned{page.__name__}", (_Planned, page), {})
    return dataclasses.dataclass(frozen=True)(made)


PLANNED_PAGES = {objective: _planned(page) for objective, page in PAGES.items()}


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a config does not say. Token counts are means over texts."""

    query_tokens: float
    document_tokens: float
    documents: int  # searched by the kNN step, over all chips
    neighbours: int


def check_flags(arguments) -> tuple[list[str], Assumptions]:
    """(topologies, assumptions) from the flags of launch/plan.py. Raises `UserError`."""
    topologies = arguments.topology.split(",")
    assumed = _assumptions(arguments)
    _check(arguments, topologies)
    return topologies, assumed


def _assumptions(arguments) -> Assumptions:
    assumed = Assumptions(
        MEAN_QUERY_TOKENS if arguments.mean_query_tokens is None else arguments.mean_query_tokens,
        MEAN_DOCUMENT_TOKENS
        if arguments.mean_document_tokens is None
        else arguments.mean_document_tokens,
        arguments.documents,
        arguments.neighbours,
    )
    for name, value in dataclasses.asdict(assumed).items():
        if value <= 0:
            raise UserError(f"{name}={value} must be above 0")
    return assumed


def _check(arguments, topologies: list[str]) -> None:
    for topology in topologies:
        parse_topology(topology)
    if arguments.step not in STEPS:
        raise UserError(f"--step={arguments.step}: choose from {', '.join(STEPS)}")
    if arguments.cache and not arguments.search:
        raise UserError("--cache keeps the candidates of a search: give --search too")
    if arguments.search and arguments.step != "train":
        raise UserError(f"--search varies the training step; leave out --step={arguments.step}")
    if len(topologies) > 1 and (arguments.output or arguments.picture):
        raise UserError("--output and --picture take one --topology; --table takes several")
