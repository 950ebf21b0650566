"""Plans by the compiler for GPUs, each program compiled once, in a process of their own.

Its wheels are in the environment or, as `make test-gpu-plans` puts them, in a folder of it that no
other process looks into.
"""

import importlib.util
import json
import pathlib
import sys

import pytest

WHEELS = pathlib.Path(sys.prefix) / "plan-gpu"
TOPOLOGIES = ("h100:1", "a100:1", "l4:1")
# One layer without experts and one with; all others of these configs are alike.
STEPS = {
    "quickstart": ("configs/quickstart.py", {"model.num_layers": "2"}),
    "pretrain": ("configs/pretrain.py", {"model.num_layers": "2", "batch_size": "1024"}),
}
gpu_aot = [
    pytest.mark.gpu_aot,
    pytest.mark.skipif(
        not (WHEELS.is_dir() or importlib.util.find_spec("jax_cuda12_plugin")),
        reason="the compiler for GPUs is not installed: make test-gpu-plans",
    ),
]


def compile_all(output) -> dict[str, dict]:
    """{"quickstart h100:1": the plan's JSON, ...} of every step and card."""
    from conftest import ROOT, run_python

    paths = [str(path) for path in (ROOT, ROOT / "tests", WHEELS)]
    result = run_python([__file__, output], timeout=1800, XLA_FLAGS="", PYTHONPATH=":".join(paths))
    assert result.returncode == 0, result.stderr
    return json.loads(pathlib.Path(output).read_text())


def main(output: str) -> None:
    from moe_embed_jax import config as config_files
    from moe_embed_jax.planning.aot import compile_plan
    from moe_embed_jax.planning.report import to_json
    from moe_embed_jax.planning.request import PLANNED_CONFIGS, Assumptions
    from moe_embed_jax.planning.topology import topology_devices

    plans = {}
    for topology in TOPOLOGIES:
        card, devices = topology_devices(topology)
        for name, (page, changes) in STEPS.items():
            config = config_files.load(PLANNED_CONFIGS, page, {"data.dir": "none", **changes})
            plan = compile_plan(config, topology, card, devices, "train", Assumptions())
            plans[f"{name} {topology}"] = to_json(plan)
    pathlib.Path(output).write_text(json.dumps(plans))


if __name__ == "__main__":
    main(sys.argv[1])
