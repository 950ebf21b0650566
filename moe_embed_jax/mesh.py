"""The device mesh: axes `data`, `fsdp` and `expert`; the batch is sharded over all three."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh_config import MeshConfig

AXES = ("data", "fsdp", "expert")
BATCH_SPEC = PartitionSpec(AXES)  # leading axis of arrays per pair
ROWS_SPEC = PartitionSpec(
    None, AXES
)  # [chunks, rows, ...]: every device has its rows of each chunk


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """A mesh over `devices` (default: all of the run).

    Raises `UserError` when the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    others = config.fsdp * config.expert
    data = count // others if config.data == -1 and others > 0 else config.data
    shape = (data, config.fsdp, config.expert)
    if min(shape) < 1 or data * others != count:
        raise UserError(
            f"mesh data={config.data} fsdp={config.fsdp} expert={config.expert} does not fit "
            f"{count} devices: the product of the axes must be {count}"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def single_device_mesh() -> jax.sharding.Mesh:
    """A 1x1x1 mesh on the first local device: what an application embeds with."""
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


def platform() -> str:
    """ "cpu", "tpu", ...: of the mesh in context, else of this process's devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def vmem_limit_bytes() -> int:
    """The VMEM (on-chip memory) that a kernel may use on the TPUs of the mesh in context."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    small = device is not None and device.device_kind in ("TPU v2", "TPU v3", "TPU v4")
    return (12 if small else 48) * 2**20  # of 16; of 64 (v5p) or 128 (v5e, v6e)


def describe(mesh: jax.sharding.Mesh) -> str:
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    kind = np.asarray(mesh.devices).flat[0].device_kind
    processes = jax.process_count()
    return f"{axes} on {mesh.size} {kind} device(s), {processes} process(es)"
