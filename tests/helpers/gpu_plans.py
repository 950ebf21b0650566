"""Plans by the compiler for GPUs, each program compiled once, in a process of their own.

Its wheels are in the environment or, as `make test-gpu-plans` puts them, in a folder of it that no
other process looks into.
"""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

WHEELS = pathlib.Path(sys.prefix) / "plan-gpu"
TOPOLOGIES = ("h100:1", "a100:1", "l4:1")
TARGETS = {"h100:1": "sm_90a", "a100:1": "sm_80", "l4:1": "sm_89"}
# One layer without experts and one with; all others of these configs are alike.
STEPS = {
    "quickstart": ("configs/quickstart.py", {}),
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
    """{"quickstart h100:1": the plan's JSON, ...} of every step and card.

    Each plan also has `spilled`: {kernel of the experts: bytes of a thread that have no register}.
    """
    from conftest import ROOT, run_python

    paths = [str(path) for path in (ROOT, ROOT / "tests", WHEELS)]
    flags = f"--xla_dump_to={output.parent / 'dump'} --xla_dump_hlo_pass_re="
    result = run_python(
        [__file__, output], timeout=800, XLA_FLAGS=flags, PYTHONPATH=":".join(paths)
    )
    assert result.returncode == 0, result.stderr
    return json.loads(pathlib.Path(output).read_text())


def spilled_bytes(dump: pathlib.Path, target: str) -> dict[str, int]:
    """Of the programs that were compiled since the last call; removes them."""
    from moe_embed_jax.planning.gpu_target import cuda_folder

    found = {}
    for path in dump.glob("*.ptx"):
        command = [f"{cuda_folder()}/bin/ptxas", "-v", f"--gpu-name={target}", "-o", "/dev/null"]
        said = subprocess.run([*command, path], capture_output=True, text=True, check=True).stderr
        for part in said.split("Compiling entry function '")[1:]:
            if part.startswith("expert_"):
                name = re.match(r"(\w+?)(__\d+)?'", part)[1]
                spilled = int(re.search(r"(\d+) bytes spill stores", part)[1])
                found[name] = max(found.get(name, 0), spilled)
        path.unlink()
    return found


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
            spilled = spilled_bytes(pathlib.Path(output).parent / "dump", TARGETS[topology])
            plans[f"{name} {topology}"] = to_json(plan) | {"spilled": spilled}
    pathlib.Path(output).write_text(json.dumps(plans))


if __name__ == "__main__":
    main(sys.argv[1])
