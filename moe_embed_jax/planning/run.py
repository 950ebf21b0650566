"""One planning run: from flags to reports, JSON, picture and table."""

import dataclasses
import importlib.metadata
import pathlib

from rich.console import Console

from moe_embed_jax.config import save_json
from moe_embed_jax.errors import UserError
from moe_embed_jax.planning import search
from moe_embed_jax.planning.aot import Plan, compile_plan
from moe_embed_jax.planning.picture import save_picture
from moe_embed_jax.planning.report import print_plan, to_json, to_markdown
from moe_embed_jax.planning.steps import STEPS, Assumptions
from moe_embed_jax.planning.topology import parse_topology, topology_devices
from moe_embed_jax.planning.workload import MEAN_DOCUMENT_TOKENS, MEAN_QUERY_TOKENS
from moe_embed_jax.training.run_config import RunConfig


def run(config: RunConfig, arguments) -> None:
    """`arguments`: the flags of launch/plan.py."""
    topologies = arguments.topology.split(",")
    assumed = _assumptions(arguments)
    _check(arguments, topologies)
    console = Console(width=110, soft_wrap=True, highlight=False)
    plans = []
    for topology in topologies:
        plans.append(_plan(config, topology, assumed, arguments, console))
        if arguments.table:  # after every row: the next one takes minutes
            pathlib.Path(arguments.table).write_text(to_markdown(plans))
    if arguments.output:
        save_json(arguments.output, to_json(plans[0]))
    if arguments.picture:
        save_picture(plans[0], arguments.picture)


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


def _plan(
    config: RunConfig, topology: str, assumed: Assumptions, arguments, console: Console
) -> Plan:
    """The plan for one topology, printed; with --search, that of the fastest setting."""
    chip, devices = topology_devices(topology)

    def plan_of(candidate: RunConfig) -> Plan:
        return compile_plan(candidate, topology, chip, devices, arguments.step, assumed)

    plan = None
    if arguments.search:
        identity = {
            "topology": topology,
            "assumed": dataclasses.asdict(assumed),
            "versions": [importlib.metadata.version(name) for name in ("jax", "libtpu")],
        }
        config, plan = search.search(
            config, len(devices), plan_of, identity, arguments.cache, console
        )
        if config is None:
            raise UserError(
                f"no candidate fits {topology}: take more chips, a smaller batch_size or model"
            )
        console.print(f"fastest     {search.describe(config)}\n")
    plan = plan or plan_of(config)
    print_plan(plan, console)
    return plan
