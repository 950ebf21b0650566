"""What fills the memory of a chip, and what to do when it is too much."""

import dataclasses
import re

import jax

from moe_embed_jax.sharding import path_of
from moe_embed_jax.stages.registry import STAGES

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)B?"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip. `arguments`: by kind (parameters, optimiser state, batch)."""

    arguments: dict[str, int]
    temporaries: int
    outputs: int  # that do not reuse the memory of an argument
    program: int

    @property
    def total(self) -> int:
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, int]:
        return self.arguments | {
            "temporaries": self.temporaries,
            "outputs": self.outputs,
            "program": self.program,
        }


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """What the compiler said: `space` is "hbm", or a kernel's on-chip memory: "vmem" (TPU) or
    "shared memory" (GPU); bytes None where it did not say;
    `largest` the allocations it names, or the kernel."""

    space: str
    needed: int | None
    available: int | None
    largest: tuple[str, ...]
    message: str


def memory_of(compiled, arguments: dict[str, object]) -> Memory:
    """`arguments`: kind -> tree of ShapeDtypeStructs with shardings, as in the lowering."""
    stats = compiled.memory_analysis()
    by_kind = {
        kind: sum(map(bytes_per_device, jax.tree.leaves(t))) for kind, t in arguments.items()
    }
    # Tiles that are not full, and what belongs to no kind.
    by_kind["layout padding"] = max(stats.argument_size_in_bytes - sum(by_kind.values()), 0)
    return Memory(
        arguments=by_kind,
        temporaries=stats.temp_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        program=stats.generated_code_size_in_bytes,
    )


def bytes_per_device(leaf) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize
    for length in shape:
        size *= length
    return size


def largest_arguments(arguments: dict[str, object], count: int = 5) -> list[tuple[str, int]]:
    """(path, bytes per device) of the largest arrays that the step is given."""
    leaves = [
        (f"{kind} {path_of(path)}".strip(), bytes_per_device(leaf))
        for kind, tree in arguments.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return sorted(leaves, key=lambda item: -item[1])[:count]


def parse_exhausted(message: str) -> OutOfMemory | None:
    """The compiler's RESOURCE_EXHAUSTED, understood; None if it is another error."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    space = "vmem" if "vmem" in message.lower() and "HBM" not in message else "hbm"
    if "Shared memory size limit" in message:
        space = "shared memory"
    needed, available = _sizes(message)
    lines = []
    for block in re.split(r"\n\s*\d+\. (?=Size: )", message)[1:6]:
        fields = re.findall(r"(?:Size|Operator|Shape): ([^\n]*)", block)
        lines.append("; ".join(field.strip() for field in fields[:3]))
    # Of a kernel's fast memory: which kernel, by its place in the program.
    kernel = re.search(r'while allocating on stack for .*?op_name="([^"]+)"', message)
    if kernel:
        lines.append(f"kernel {kernel[1]}")
    return OutOfMemory(space, needed, available, tuple(lines), message.splitlines()[0])


def _sizes(message: str) -> tuple[int | None, int | None]:
    """(needed, available) bytes, in any of the wordings of the compilers."""
    patterns = (
        rf"Used {_SIZE} of {_SIZE}",
        rf"\({_SIZE}\) exceeds available \w+ \({_SIZE}\)",
        r"size=(\d+)(B?)\) would exceed memory \(size=(\d+)(B?)\)",
        rf"size {_SIZE} and limit {_SIZE}",
        r"requested (\d+)(), available: (\d+)()",
    )
    for pattern in patterns:
        match = re.search(pattern, message)
        if match:
            number, unit, limit, limit_unit = match.groups()
            return int(float(number) * _UNITS[unit]), int(float(limit) * _UNITS[limit_unit])
    return None, None


def advice(config, step: str, space: str, dominant: str | None) -> list[str]:
    """What could make `step` fit, most promising first; `dominant`: the largest kind of memory."""
    if space != "hbm":
        return [
            "a kernel's tiles are too large for on-chip memory: change model.width, "
            "model.ffn_width or data.row_length to multiples of 128, or model.expert_backend"
        ]
    if step == "knn":
        return ["more chips: each holds its share of the documents", "fewer documents at a time"]
    sharding = []
    if config.mesh.fsdp == 1:
        sharding.append("mesh.fsdp=2 or more: parameters and optimiser state are divided by it")
    if config.mesh.expert == 1 and config.model.num_moe_layers:
        sharding.append("mesh.expert=2 or more: each chip holds a part of the experts")
    if step == "encode":
        return [*sharding, "a shorter data.document_length"]
    activations = []
    rows = config.model.remat_rows
    if rows != 1:
        smaller = f"model.remat_rows={rows // 2 or 64}"
        activations.append(f"{smaller}: activations of fewer rows at a time, the same numbers")
    chunk_rows = config.data.chunk_rows // 2 or 4 * (rows // 2 or 64)
    activations += STAGES[config.objective].memory_advice(config, chunk_rows)
    more = ["more chips, or a smaller batch_size"]
    if dominant in ("parameters", "optimiser state"):
        return sharding + activations + more
    return activations + sharding + more
