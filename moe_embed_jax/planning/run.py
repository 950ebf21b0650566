"""One planning run: from flags to reports, JSON, picture and table."""

import dataclasses
import importlib.metadata

from rich.console import Console

from moe_embed_jax import storage
from moe_embed_jax.config import save_json
from moe_embed_jax.errors import UserError
from moe_embed_jax.planning import error_bars, search
from moe_embed_jax.planning.aot import Plan, compile_plan
from moe_embed_jax.planning.report import print_plan, to_json, to_markdown
from moe_embed_jax.planning.request import Assumptions
from moe_embed_jax.planning.topology import parse_topology, topology_devices
from moe_embed_jax.training.run_config import Run


def run(config: Run, topologies: list[str], assumed: Assumptions, arguments) -> None:
    """`arguments`: the flags of launch/plan.py; `request` made the rest of them."""
    console = Console(width=110, soft_wrap=True, highlight=False)
    plans = []
    for topology in topologies:
        plans.append(_plan(config, topology, assumed, arguments, console))
        if arguments.table:  # after every row: the next one takes minutes
            storage.write(storage.path(arguments.table), to_markdown(plans))
    if arguments.output:
        save_json(arguments.output, to_json(plans[0]))
    if arguments.picture:
        from moe_embed_jax.planning.picture import save_picture

        save_picture(plans[0], arguments.picture)


def _plan(config: Run, topology: str, assumed: Assumptions, arguments, console: Console) -> Plan:
    """The plan for one topology, printed; with --search, that of the fastest setting."""
    chip, devices = topology_devices(topology)

    def plan_of(candidate: Run) -> Plan:
        return compile_plan(candidate, topology, chip, devices, arguments.step, assumed)

    plan = None
    if arguments.search:
        parsed = parse_topology(topology)
        compiler = "jax-cuda12-pjrt" if parsed.is_gpu else "libtpu"
        identity = {
            "topology": topology,
            "assumed": dataclasses.asdict(assumed),
            "versions": [importlib.metadata.version(name) for name in ("jax", compiler)],
        }
        chips = len(devices) // parsed.slices
        config, plan = search.search(config, chips, plan_of, identity, arguments.cache, console)
        console.print(f"error bars  {error_bars.describe(arguments.step, parsed.is_gpu)}")
        if config is None:
            raise UserError(
                f"no candidate fits {topology}: take more chips, a smaller batch_size or model"
            )
        console.print(f"fastest     {search.describe(config)}\n")
    plan = plan or plan_of(config)
    print_plan(plan, console)
    return plan
