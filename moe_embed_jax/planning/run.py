"""One planning run: from flags to report, JSON and picture."""

import dataclasses
import importlib.metadata

from rich.console import Console

from moe_embed_jax.config import save_json
from moe_embed_jax.errors import UserError
from moe_embed_jax.planning import search
from moe_embed_jax.planning.aot import compile_plan
from moe_embed_jax.planning.picture import save_picture
from moe_embed_jax.planning.report import print_plan, to_json
from moe_embed_jax.planning.steps import STEPS, Assumptions
from moe_embed_jax.planning.topology import topology_devices
from moe_embed_jax.planning.workload import MEAN_DOCUMENT_TOKENS, MEAN_QUERY_TOKENS
from moe_embed_jax.training.run_config import RunConfig


def run(config: RunConfig, arguments) -> None:
    """`arguments`: the flags of launch/plan.py."""
    if arguments.step not in STEPS:
        raise UserError(f"--step={arguments.step}: choose from {', '.join(STEPS)}")
    if arguments.cache and not arguments.search:
        raise UserError("--cache keeps the candidates of a search: give --search too")
    assumed = Assumptions(
        arguments.mean_query_tokens or MEAN_QUERY_TOKENS,
        arguments.mean_document_tokens or MEAN_DOCUMENT_TOKENS,
        arguments.documents,
        arguments.neighbours,
    )
    if min(assumed.query_tokens, assumed.document_tokens) <= 0:
        raise UserError("--mean_query_tokens and --mean_document_tokens must be above 0")
    if min(assumed.documents, assumed.neighbours) < 1:
        raise UserError("--documents and --neighbours must be at least 1")
    chip, devices = topology_devices(arguments.topology)
    console = Console(width=110, soft_wrap=True, highlight=False)

    def plan_of(candidate: RunConfig):
        return compile_plan(candidate, arguments.topology, chip, devices, arguments.step, assumed)

    plan = None
    if arguments.search:
        identity = {
            "topology": arguments.topology,
            "step": arguments.step,
            "assumed": dataclasses.asdict(assumed),
            "versions": [importlib.metadata.version(name) for name in ("jax", "libtpu")],
        }
        config, plan = search.search(
            config, len(devices), plan_of, identity, arguments.cache, console
        )
        if config is None:
            raise UserError(
                "no candidate fits: take more chips, a smaller batch_size or a smaller model"
            )
    plan = plan or plan_of(config)
    print_plan(plan, console)
    if arguments.output:
        save_json(arguments.output, to_json(plan))
    if arguments.picture:
        save_picture(plan, arguments.picture)
