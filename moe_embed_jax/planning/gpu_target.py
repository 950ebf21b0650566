"""GPUs to compile for, without a GPU.

The wheels of [plan-gpu] are jax's plugin for CUDA, which compiles, and ptxas. A process that has
them installed loads the plugin with jax's first device, whatever it does.
"""

import importlib.util

from moe_embed_jax.errors import UserError
from moe_embed_jax.planning.cards import Card

MISSING = (
    "the compiler for GPUs (jax-cuda12-pjrt, jax-cuda12-plugin, nvidia-cuda-nvcc-cu12) is not "
    "installed: pip install -e .[plan-gpu] (Linux on x86-64)"
)


def cuda_folder() -> str | None:
    """Of the wheel with ptxas and libdevice; None where a wheel of [plan-gpu] is missing."""
    needed = ("jax_plugins.xla_cuda12", "jax_cuda12_plugin", "nvidia.cuda_nvcc")
    try:
        specs = [importlib.util.find_spec(name) for name in needed]
    except ModuleNotFoundError:  # of the parent
        return None
    if None in specs:
        return None
    return next(iter(specs[-1].submodule_search_locations))


def gpu_devices(card: Card, count: int) -> list:
    """`count` cards of one host. Raises `UserError` where the wheels are missing."""
    if cuda_folder() is None:
        raise UserError(MISSING)
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        card.name, "cuda", topology=f"1x1x{count}", target_config=card.target_config
    )
    return list(topology.devices)


def compiler_options() -> dict:
    """Of `Lowered.compile`: where ptxas is, and no measuring of candidates, which takes a GPU."""
    return {"xla_gpu_cuda_data_dir": cuda_folder(), "xla_gpu_autotune_level": 0}
