"""What the planner is asked: the run, and the flags of launch/plan.py. Imports no jax."""

import dataclasses

from moe_embed_jax.config import setting
from moe_embed_jax.errors import UserError
from moe_embed_jax.planning.topology import parse_topology
from moe_embed_jax.training.run_config import RUN_CONFIGS, Run

NOT_NEEDED = "not needed to plan"
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


def _planned(cls: type[Run]) -> type[Run]:
    made = type(f"Planned{cls.__name__}", (_Planned, cls), {})
    return dataclasses.dataclass(frozen=True)(made)


PLANNED_CONFIGS = {objective: _planned(cls) for objective, cls in RUN_CONFIGS.items()}


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a config does not say. Tokens are means over web-like texts, specials included."""

    mean_query_tokens: float = setting(12.0, flag="where no data are prepared")
    mean_document_tokens: float = setting(90.0, flag="where no data are prepared")
    documents: int = setting(1_000_000, flag="that the kNN step searches, over all chips")
    neighbours: int = setting(100, flag="of the kNN step")

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value <= 0:
                raise UserError(f"{name}={value} must be above 0")


def topologies_of(arguments) -> list[str]:
    """From the flags of launch/plan.py; raises `UserError` for flags that do not go together."""
    topologies = arguments.topology.split(",")
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
    return topologies
