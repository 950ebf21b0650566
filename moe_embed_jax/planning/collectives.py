"""Communication in a compiled program: which devices talk, over which mesh axes, for how long."""

import dataclasses
import re

import numpy as np

from moe_embed_jax.planning.cards import Card
from moe_embed_jax.planning.chips import CHIPS, DEVICE_KINDS, HOP_SECONDS, Chip
from moe_embed_jax.planning.hlo import Computation, Instruction

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_ROUNDS = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0}  # ring passes of the array


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program (hashable, so that repetitions are counted).

    bytes: the full array of a device: the result of all-gather, the operand of the others.
    axes: names of the mesh axes that its groups span.
    links: inter-chip links, one way, that a device can use.
    is_async: the compiler split it so that it overlaps with other work.
    """

    kind: str
    bytes: int
    axes: tuple[str, ...]
    group_size: int
    links: int
    is_async: bool

    @property
    def between_slices(self) -> bool:
        return "slice" in self.axes

    def seconds(self, chip: Chip | Card) -> float:
        """Time on idle links: bandwidth of a ring (Chan et al. 2007) plus a latency per step.

        A collective-permute moves to a neighbour; an all-to-all crosses a quarter of the ring, or,
        between GPUs, the switch that all of them share. Between slices it is the bandwidth alone:
        see `Cost.waits_for_slices`.
        """
        n = self.group_size
        if n < 2:
            return 0.0
        if isinstance(chip, Card):
            return self._switched_seconds(chip)
        if self.between_slices:
            passes = _ROUNDS[self.kind] * (n - 1) / n if self.kind in _ROUNDS else 1.0
            return passes * self.bytes / chip.dcn_bandwidth
        bandwidth = chip.link_bandwidth * self.links
        if self.kind in _ROUNDS:
            rounds = _ROUNDS[self.kind]
            return rounds * (self.bytes * (n - 1) / n / bandwidth + HOP_SECONDS * (n - 1))
        if self.kind in ("all-to-all", "ragged-all-to-all"):
            return self.bytes * max(n / 4, 1.0) / bandwidth + HOP_SECONDS * n / 2
        return self.bytes / chip.link_bandwidth + HOP_SECONDS

    def _switched_seconds(self, card: Card) -> float:
        n, steps, moved = self.group_size, 1.0, float(self.bytes)
        if self.kind in _ROUNDS:
            steps = _ROUNDS[self.kind] * (n - 1)
            moved *= steps / n
        elif self.kind in ("all-to-all", "ragged-all-to-all"):
            moved *= (n - 1) / n
        return moved / card.link_bandwidth + steps * card.link_seconds


def kind_of(opcode: str) -> str | None:
    """`all-gather-start` -> `all-gather`; None for what is no collective, or its end (-done)."""
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def describe(
    computation: Computation, instruction: Instruction, mesh, is_async: bool, scatters: bool
) -> Collective:
    """`mesh`: whose devices, flattened, are the partitions of the program. `scatters`: an
    all-reduce of which every device keeps its slice only, which TPUs fuse to a reduce-scatter."""
    kind = "reduce-scatter" if scatters else kind_of(instruction.opcode)
    operand = sum(s.bytes for shapes in computation.operand_shapes(instruction) for s in shapes)
    groups = device_groups(instruction.rest, mesh.size)
    size = groups.shape[1]
    return Collective(
        kind=kind,
        bytes=operand * size if kind == "all-gather" else operand,
        axes=spanned_axes(groups, mesh),
        group_size=mesh.size if kind == "collective-permute" and size > 1 else size,
        links=_links(groups, mesh),
        is_async=is_async or instruction.opcode.endswith("-start"),
    )


def device_groups(text: str, devices: int) -> np.ndarray:
    """Groups of partition numbers, [groups, members], from the attributes of a collective.

    replica_groups={{0,1},{2,3}}, [2,2]<=[2,2]T(1,0), or mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0))
    {'a'} (every group varies over the listed axes); source_target_pairs={{0,1},{1,0}}: the pairs.
    """
    explicit = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{}]*)\}\}", text)
    if explicit:
        return np.array([list(map(int, g.split(","))) for g in explicit.group(1).split("},{")])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota:
        return _iota(iota.group(2)).reshape(_integers(iota.group(1)))
    if "source_target_pairs={}" in text:  # the part of it in one slice, where nobody talks
        return np.zeros((1, 1), int)
    axes = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\](?:T\([\d,]+\))?)\))?"
        r" \{([^}]*)\}",
        text,
    )
    if axes:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes.group(1)))
        chosen = re.findall(r"'([^']+)'", axes.group(3))
        order = _iota(axes.group(2)) if axes.group(2) else np.arange(devices)
        positions = order.reshape([int(size) for size in sizes.values()])
        places = [list(sizes).index(name) for name in chosen]
        moved = np.moveaxis(positions, places, range(-len(places), 0))
        return moved.reshape(-1, np.prod([positions.shape[p] for p in places], dtype=int))
    return np.arange(devices)[None]  # replica_groups={}: everybody


def _integers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
    """`[4,4]T(1,0)`: 0, 1, 2, ... in that shape, transposed, flattened."""
    shape, _, order = text.partition("T")
    numbers = np.arange(np.prod(_integers(shape))).reshape(_integers(shape))
    return (numbers.transpose(_integers(order)) if order else numbers).reshape(-1)


def spanned_axes(groups: np.ndarray, mesh) -> tuple[str, ...]:
    """Axes of the mesh along which the members of a group differ."""
    names = mesh.axis_names
    coordinates = np.stack(np.unravel_index(groups, mesh.devices.shape), -1)
    differ = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
    return tuple(name for name, is_spanned in zip(names, differ, strict=True) if is_spanned)


def _links(groups: np.ndarray, mesh) -> int:
    """One per torus dimension that the groups spread over, two where it is closed to a ring."""
    devices = mesh.devices.reshape(-1)
    if getattr(devices[0], "platform", "") != "tpu":  # fake CPU devices, GPUs: no torus
        return 1
    chip = CHIPS[DEVICE_KINDS[devices[0].device_kind]]
    coords = np.array([d.coords for d in devices])
    sizes = coords.max(axis=0) + 1
    members = coords[groups]
    spread = (members != members[:, :1]).any(axis=(0, 1))
    closed = [size % chip.wraps_at == 0 for size in sizes]
    links = sum(1 + is_ring for used, is_ring in zip(spread, closed, strict=True) if used)
    return max(links, 1)
