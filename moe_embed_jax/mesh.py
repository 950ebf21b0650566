"""The device mesh: axes `slice`, `data`, `fsdp` and `expert`; the batch is sharded over all four.

Chips of a TPU slice have links of their own; slices exchange arrays over the network of the data
centre, which is slower by far. So parameters and moments are whole in every slice, and nothing goes
along `slice` but gradients, the documents of the loss, and sums for metrics.
"""

import collections
import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_embed_jax.compute_capability import capability_of_name
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh_config import MeshConfig

AXES = ("slice", "data", "fsdp", "expert")
IN_SLICE = AXES[1:]
BATCH_SPEC = PartitionSpec(AXES)  # leading axis of arrays per pair
ROWS_SPEC = PartitionSpec(
    None, AXES
)  # [chunks, rows, ...]: every device has its rows of each chunk

# The compute capability from which on NVIDIA GPUs take Triton's kernels, and compute in bfloat16.
TRITON = (8, 0)


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """A mesh over `devices` (default: all of the run).

    Raises `UserError` when the axis sizes do not multiply to the number of devices, and when
    `config` wants other slices than there are.
    """
    slices = _slices(config, jax.devices() if devices is None else devices)
    count = len(slices[0])
    others = config.fsdp * config.expert
    data = count // others if config.data == -1 and others > 0 else config.data
    shape = (data, config.fsdp, config.expert)
    if min(shape) < 1 or data * others != count:
        in_each = f" of each of {len(slices)} slices" if len(slices) > 1 else ""
        raise UserError(
            f"mesh data={config.data} fsdp={config.fsdp} expert={config.expert} does not fit "
            f"{count} devices{in_each}: the product of the axes must be {count}"
        )
    # Devices of a slice lie as in a run on this slice alone.
    auto = (AxisType.Auto,)
    parts = [jax.make_mesh(shape, IN_SLICE, auto * 3, devices=part).devices for part in slices]
    return jax.sharding.Mesh(np.stack(parts), AXES, axis_types=auto * 4)


def _slices(config: MeshConfig, devices) -> list[list]:
    """The devices of each slice. Where they know of one slice only (CPUs), `config.slice` parts of
    them stand for slices."""
    by_index = collections.defaultdict(list)
    for device in devices:
        by_index[getattr(device, "slice_index", 0)].append(device)
    slices = [by_index[index] for index in sorted(by_index)]
    wanted = len(slices) if config.slice == -1 else config.slice
    if len(slices) == 1 and wanted > 0 and len(devices) % wanted == 0:
        size = len(devices) // wanted
        return [slices[0][first : first + size] for first in range(0, len(devices), size)]
    if wanted != len(slices) or len({len(part) for part in slices}) > 1:
        sizes = " + ".join(str(len(part)) for part in slices)
        raise UserError(
            f"mesh slice={config.slice} does not fit {sizes} devices of {len(slices)} slice(s): "
            "leave mesh.slice out, and take slices of one size"
        )
    return slices


def single_device_mesh() -> jax.sharding.Mesh:
    """A mesh of size 1 on the first local device: what an application embeds with."""
    return make_mesh(MeshConfig(data=1), jax.local_devices()[:1])


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of an array whose leading axis is the batch (or the packed rows)."""
    return NamedSharding(mesh, BATCH_SPEC)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def local_device_positions(mesh: jax.sharding.Mesh) -> list[int]:
    """Positions in the flattened mesh (= order of batch shards) owned by this process."""
    here = jax.process_index()
    return [i for i, d in enumerate(np.asarray(mesh.devices).flat) if d.process_index == here]


def device_in_context():
    """A device of the mesh in context, else of this process. Those of a mesh that a program is
    compiled for may be elsewhere: all that is known of them is `platform` and `device_kind`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.local_devices()[0] if device is None else device


def platform() -> str:
    """ "cpu", "tpu", "gpu": of the devices in context."""
    return device_in_context().platform


def compute_capability() -> tuple[int, int] | None:
    """(major, minor) of the NVIDIA GPUs in context, (8, 0) for an A100; None for other devices."""
    kind = device_in_context().device_kind
    here = [device for device in jax.local_devices() if device.device_kind == kind]
    number = str(getattr(here[0], "compute_capability", "")) if here else ""
    if re.fullmatch(r"\d+\.\d+", number):
        major, minor = number.split(".")
        return int(major), int(minor)
    return capability_of_name(kind)


def has_triton() -> bool:
    """Whether the devices in context are GPUs that take Triton's kernels."""
    capability = compute_capability()
    return capability is not None and capability >= TRITON


def check_dtype(dtype: str, mesh: jax.sharding.Mesh) -> None:
    """Raises `UserError` where the devices of the mesh cannot compute in `model.dtype`."""
    with jax.set_mesh(mesh):
        kind, capability = device_in_context().device_kind, compute_capability()
    if dtype == "bfloat16" and capability is not None and capability < TRITON:
        raise UserError(
            "model.dtype='bfloat16' needs GPUs of compute capability 8.0 or more (A100, L4, H100), "
            f"and {kind} has {capability[0]}.{capability[1]}: set model.dtype='float32', or take "
            "the CPU (JAX_PLATFORMS=cpu)"
        )


def vmem_limit_bytes() -> int:
    """The VMEM (on-chip memory) that a kernel may use on the TPUs of the mesh in context."""
    small = device_in_context().device_kind in ("TPU v2", "TPU v3", "TPU v4")
    return (12 if small else 48) * 2**20  # of 16; of 64 (v5p) or 128 (v5e, v6e)


def describe(mesh: jax.sharding.Mesh) -> str:
    sizes = {name: size for name, size in mesh.shape.items() if size > 1 or name != "slice"}
    axes = " x ".join(f"{name}={size}" for name, size in sizes.items())
    kind = np.asarray(mesh.devices).flat[0].device_kind
    processes = jax.process_count()
    return f"{axes} on {mesh.size} {kind} device(s), {processes} process(es)"
