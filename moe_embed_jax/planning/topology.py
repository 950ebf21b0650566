"""TPU topologies to compile for, without a TPU."""

import dataclasses
import importlib.util
import math
import os
import re

from moe_embed_jax.errors import UserError
from moe_embed_jax.planning.chips import CHIPS, Chip

EXAMPLES = ", ".join(chip.example for chip in CHIPS.values()) + ", 2xv5e:16x16 (two slices)"
# libtpu asks the metadata server of a TPU VM, which is not there, what it runs on, and takes a lock
# on the TPU, which is not there either.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` slices, each with `sizes` chips along the dimensions of its torus."""

    slices: int
    chip: Chip
    sizes: tuple[int, ...]

    @property
    def slice_name(self) -> str:
        """What libtpu calls one of the slices."""
        return f"{self.chip.name}:{'x'.join(map(str, self.sizes))}"


def parse_topology(name: str) -> Topology:
    """`v5e:4x4`, or `2xv5e:4x4` for two slices."""
    parts = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name, re.ASCII)
    if parts is None or parts[2] not in CHIPS:
        raise UserError(f"--topology={name} is no TPU topology; examples: {EXAMPLES}")
    chip, sizes = CHIPS[parts[2]], tuple(map(int, parts[3].split("x")))
    if len(sizes) != chip.torus_dims:
        raise UserError(
            f"--topology={name}: {chip.name} has {chip.torus_dims} dimensions, as {chip.example}"
        )
    return Topology(int(parts[1] or 1), chip, sizes)


def topology_devices(name: str) -> tuple[Chip, list]:
    """The chip and the devices of a topology, for `make_mesh` and ahead-of-time compilation.

    Must be called before anything else touches libtpu. Raises `UserError` for a name that the
    compiler does not know, and where libtpu is missing or held by another process.
    """
    parsed = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler (libtpu) is not installed: pip install -e .[plan] (Linux on x86-64)"
        )
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    options = {}
    if math.prod(parsed.sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if parsed.chip.name == "v4":  # the default counts its two cores as two devices
        options["chip_config_name"] = "megacore"
    if parsed.slices > 1:
        options["num_slices"] = parsed.slices
    try:
        topology = topologies.get_topology_desc(parsed.slice_name, "tpu", **options)
    except Exception as error:
        message = str(error).splitlines()[0]
        if "lock" in message.lower() or "already in use" in message.lower():
            raise UserError(
                "another process holds libtpu (its lock is /tmp/libtpu_lockfile): wait for it to "
                f"end, or remove the file if there is none ({message})"
            ) from error
        raise UserError(f"--topology={name}: {message}; examples: {EXAMPLES}") from error
    return parsed.chip, list(topology.devices)
