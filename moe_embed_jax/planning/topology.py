"""Topologies to compile for: TPU slices and GPUs of a host, without either."""

import dataclasses
import importlib.util
import math
import os
import re

from moe_embed_jax.errors import UserError
from moe_embed_jax.planning.cards import CARDS, Card
from moe_embed_jax.planning.chips import CHIPS, Chip
from moe_embed_jax.planning.gpu_target import gpu_devices

EXAMPLES = (
    ", ".join(chip.example for chip in CHIPS.values())
    + ", 2xv5e:16x16 (two slices); GPUs: "
    + ", ".join(card.example for card in CARDS.values())
)
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
    """`slices` slices, each with `sizes` chips along the dimensions of its torus; or `sizes` GPUs
    of one host."""

    slices: int
    chip: Chip | Card
    sizes: tuple[int, ...]

    @property
    def is_gpu(self) -> bool:
        return isinstance(self.chip, Card)

    @property
    def slice_name(self) -> str:
        """What libtpu calls one of the slices."""
        return f"{self.chip.name}:{'x'.join(map(str, self.sizes))}"


def parse_topology(name: str) -> Topology:
    """`v5e:4x4`, `2xv5e:4x4` for two slices, or `h100:8` for eight GPUs."""
    parts = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name, re.ASCII)
    if parts is None or parts[2] not in CHIPS | CARDS:
        raise UserError(f"--topology={name} is no topology; examples: {EXAMPLES}")
    sizes = tuple(map(int, parts[3].split("x")))
    if parts[2] in CARDS:
        card = CARDS[parts[2]]
        if parts[1] or len(sizes) > 1 or sizes[0] > card.most_cards:
            raise UserError(
                f"--topology={name}: GPUs are planned on one host, {card.name}:1 to "
                f"{card.name}:{card.most_cards}"
            )
        return Topology(1, card, sizes)
    chip = CHIPS[parts[2]]
    if len(sizes) != chip.torus_dims:
        raise UserError(
            f"--topology={name}: {chip.name} has {chip.torus_dims} dimensions, as {chip.example}"
        )
    return Topology(int(parts[1] or 1), chip, sizes)


def topology_devices(name: str) -> tuple[Chip | Card, list]:
    """The chip and the devices of a topology, for `make_mesh` and ahead-of-time compilation.

    Must be called before anything else touches libtpu. Raises `UserError` for a name that the
    compiler does not know, and where a compiler is missing or libtpu held by another process.
    """
    parsed = parse_topology(name)
    if parsed.is_gpu:
        return parsed.chip, gpu_devices(parsed.chip, *parsed.sizes)
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
