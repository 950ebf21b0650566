"""Predicts memory, time and cost of a run on a TPU topology or on GPUs, without either.

    python launch/plan.py --config=configs/pretrain.py --topology=v5e:4x4 --set mesh.fsdp=4
    python launch/plan.py --config=configs/pretrain.py --topology=v5e:4x4 --search
    python launch/plan.py --config=configs/pretrain.py --topology=h100:8

Compiles the very step of training (or --step=encode, --step=knn) with the TPU compiler, which needs
no TPU (pip install -e .[plan]), or with XLA's for GPUs (pip install -e .[plan-gpu]), and reports
what it says: docs/planning.md. A step that does not
fit is a result, with advice, and exits with 0 as any other; scripts read `fits` of --output.
"""

import os
import sys

from moe_embed_jax import launching


def main():
    flags = launching.parser(__doc__)
    flags.add_argument("--topology", required=True, help="v5e:4x4, v6e:2x2, h100:8, l4:1")
    flags.add_argument("--step", default="train", help="train, encode or knn")
    flags.add_argument("--set", metavar="KEY=VALUE", help="as --config.KEY=VALUE; may be repeated")
    flags.add_argument("--output", help="write the plan as JSON")
    flags.add_argument("--picture", help="write memory and time as PNG")
    flags.add_argument("--table", help="write a row per topology (a,b,c) as Markdown")
    flags.add_argument("--search", action="store_true", help="find the fastest setting that fits")
    flags.add_argument("--cache", help="JSON file of finished candidates; resumes a search")

    os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler alone; never takes a TPU that is there
    from moe_embed_jax.planning.request import PLANNED_CONFIGS, Assumptions, topologies_of

    launching.add_flags(flags, Assumptions)
    argv = launching_arguments(sys.argv[1:])
    arguments, config = launching.parse_with_config(flags, PLANNED_CONFIGS, argv)
    topologies = topologies_of(arguments)
    assumed = launching.from_flags(Assumptions, arguments)
    from moe_embed_jax.planning.run import run

    run(config, topologies, assumed, arguments)


def launching_arguments(argv: list[str]) -> list[str]:
    """`--set key=value` -> `--config.key=value`, which every launcher understands."""
    result = []
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if flag == "--set" and rest:
            flag = f"--set={rest.pop(0)}"
        result.append(flag.replace("--set=", "--config.", 1) if flag.startswith("--set=") else flag)
    return result


if __name__ == "__main__":
    sys.exit(launching.run(main))
