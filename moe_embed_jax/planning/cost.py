"""What a compiled program does per step and device, loops multiplied out.

One walk over the call graph. Instructions of the entry, of loop bodies and of branches run one
after the other and take time; those inside a fusion only add FLOPs to it.
"""

import collections
import dataclasses
import math

from moe_embed_jax.planning import collectives, slices
from moe_embed_jax.planning.hlo import Computation, Instruction, Module, Shape
from moe_embed_jax.planning.loops import trip_count
from moe_embed_jax.planning.matmul import matmul_flops, precision

# Take no time of their own: names, or work that is counted elsewhere.
FREE = frozenset(
    [
        "parameter",
        "constant",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "reshape",
        "after-all",
        "partition-id",
        "replica-id",
        "copy-done",
        "slice-done",
        "async-done",
        "async-update",
        "optimization-barrier",
        "add-dependency",
        "send",
        "recv",
    ]
)
FREE_CUSTOM_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding")
PREFETCHES = ("copy-start", "slice-start", "async-start", "dynamic-slice-start")
# Touch what they move, not all of the array they move it out of or into.
GATHERS = ("gather", "dynamic-slice", "slice")
# Products with [L, L] scores per head in JAX's flash attention (kernels/long_attention.py), which
# declares no cost of its backward kernels, and of the forward one half the lanes that it uses.
FLASH_PRODUCTS = {"flash_attention": 2, "flash_mha_bwd_dkv": 4, "flash_mha_bwd_dq": 3}
LANES = 128
SCATTERS = ("scatter", "dynamic-update-slice")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel call, by its own cost estimate; None: it declares none.

    flops: of matrix units. transcendentals: exponentials and the like, each with the arithmetic
    around it (a softmax, an activation). precision: of its products, `matmul.precision`.
    """

    name: str
    flops: float | None
    bytes: float | None
    transcendentals: float | None
    precision: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Unestimated:
    """An instruction that the compiler gives no cycles for: bytes of HBM, FLOPs of matrix products
    and their `matmul.precision`, operations of the vector unit (of sorts; what else there is, is
    taken to be memory-bound)."""

    opcode: str
    bytes: int
    flops: float
    vector_operations: float
    precision: str = "bfloat16"


@dataclasses.dataclass
class Cost:
    """Totals; Counters hold how often each thing happens.

    products: FLOPs of dots and convolutions, by `matmul.precision`. cycles: the compiler's
    estimates, also by the place in the program. prefetches: bytes of asynchronous copies between
    HBM and on-chip memory. unknown_loops: loops whose trip count only the data decide.
    waits_for_slices: how often the program sends something to other slices and then waits for what
    they send; what is sent before one wait travels together. slice_loops: transfers between slices
    that stand in a loop, by its place.
    """

    cycles: float = 0.0
    waits_for_slices: int = 0
    cycles_by_source: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    products: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unestimated: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    prefetches: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unknown_loops: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    slice_loops: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Cost", times: int = 1) -> None:
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, collections.Counter):
                for key, count in theirs.items():
                    mine[key] += count * times
            else:
                setattr(self, field.name, mine + theirs * times)

    @property
    def matmul_flops(self) -> float:
        return sum(self.products.values())

    @property
    def kernel_flops(self) -> float:
        return sum((kernel.flops or 0.0) * count for kernel, count in self.kernels.items())

    @property
    def flops(self) -> float:
        """Matrix products and Pallas kernels; element-wise work is left out."""
        return self.matmul_flops + self.kernel_flops


def module_cost(module: Module, mesh, unknown_trips: int = 1) -> Cost:
    """`mesh`: over whose devices the program is partitioned (names the axes of collectives).
    `unknown_trips`: how often loops are taken to run whose bounds only the data decide."""
    return Walk(module, mesh, unknown_trips).computation(module.entry, timed=True)


def _kernel(it: Instruction, operands: list[Shape]) -> Kernel:
    name = it.name.split(".")[0]
    for prefix, products in FLASH_PRODUCTS.items():
        if name.startswith(prefix):
            rows, heads, length, head = operands[0].dims
            scores = float(rows * heads * length * length)
            moved = sum(shape.bytes for shape in (*operands, *it.shapes))
            return Kernel(name, 2 * products * scores * max(head, LANES), float(moved), scores)
    estimate = it.backend_config.get("custom_call_config", {}).get("cost_estimate")
    counts = (
        None if estimate is None else float(estimate.get(key, 0))
        for key in ("flops", "bytes_accessed", "transcendentals")
    )
    return Kernel(name, *counts)


class Walk:
    """Over a program for TPUs; `gpu_cost` has the one for GPUs."""

    def __init__(self, module: Module, mesh, unknown_trips: int):
        self.module = module
        self.mesh = mesh
        self.unknown_trips = unknown_trips
        self.known: dict[tuple, Cost] = {}

    def computation(self, name: str, timed: bool, communicates: str = "sync") -> Cost:
        """`communicates`: "sync" or "async" collectives, or "continued": counted elsewhere."""
        key = (name, timed, communicates)
        if key not in self.known:
            total = Cost()
            computation = self.module.computations[name]
            is_sent = False
            for instruction in computation.instructions.values():
                total.add(self.instruction(computation, instruction, timed, communicates))
                is_sent |= instruction.opcode == "send"
                if is_sent and slices.ends_transfer(instruction):
                    total.waits_for_slices += 1
                    is_sent = False
            self.known[key] = total
        return self.known[key]

    def instruction(self, parent: Computation, it: Instruction, timed, communicates) -> Cost:
        opcode = it.opcode
        if opcode == "while":
            return self.loop(parent, it, timed)
        if opcode == "conditional":
            return self.branches(it, timed)
        if opcode == "call":
            return self.computation(it.called["to_apply"][0], timed)
        if collectives.kind_of(opcode):
            cost = Cost()
            if communicates != "continued":
                scatters = opcode == "all-reduce" and parent.name.startswith("all-reduce-scatter")
                is_async = communicates == "async"
                found = collectives.describe(parent, it, self.mesh, is_async, scatters)
                cost.collectives[found] += 1
            return cost
        cost = Cost()
        if between := slices.transfer(parent, it, self.mesh):
            cost.collectives[between] += 1
            return cost
        if opcode == "fusion":
            (inner,) = it.called["calls"]
            cost.add(self.computation(inner, False, _communication(it, inner, communicates)))
            if cost.kernels:  # a kernel that writes into a slice of a larger array: its time is all
                return cost
        elif opcode in ("dot", "convolution"):
            lhs, rhs = (shapes[0] for shapes in parent.operand_shapes(it)[:2])
            cost.products[precision(it, lhs)] += matmul_flops(it, lhs, rhs)
        elif opcode == "custom-call" and "tpu_custom_call" in it.rest:
            operands = [shapes[0] for shapes in parent.operand_shapes(it) if shapes]
            cost.kernels[_kernel(it, operands)] += 1
            return cost
        if timed:
            self.time(parent, it, cost)
        return cost

    def time(self, parent: Computation, it: Instruction, cost: Cost) -> None:
        """Adds what instruction `it` takes: cycles, or bytes and FLOPs for a roofline."""
        opcode = it.opcode
        if opcode in FREE or opcode.endswith("-done") or cost.collectives:
            return
        if it.name.startswith("async-collective-"):  # its two ends: the collective has the time
            return
        if opcode == "custom-call" and any(name in it.rest for name in FREE_CUSTOM_CALLS):
            return
        if opcode in PREFETCHES:
            cost.prefetches[it.shapes[0].bytes if len(it.shapes) < 2 else it.shapes[1].bytes] += 1
            return
        cycles = it.backend_config.get("window_config", {}).get("estimated_cycles")
        if cycles is not None:
            cost.cycles += float(cycles)
            cost.cycles_by_source[_source(it)] += int(cycles)
            return
        cost.unestimated[self.roofline_work(parent, it, cost.products)] += 1

    def roofline_work(self, parent: Computation, it: Instruction, products) -> Unestimated:
        """The work of an instruction without an estimate; `products`: as `Cost.products`."""
        operands = [shapes[0] for shapes in parent.operand_shapes(it) if shapes]
        label = it.opcode
        if label == "fusion":
            inside = self.opcodes(it.called["calls"][0])
            label = next((kind for kind in (*SCATTERS, *GATHERS) if kind in inside), label)
        elif "TopK" in it.rest:
            label = "top-k"
        result = _hbm(it.shapes)
        if label in GATHERS:
            moved = result + min(sum(shape.bytes for shape in it.shapes), _hbm(operands))
        elif label in SCATTERS and operands:  # the first operand is updated in place
            updates = operands[1:]
            changed = 0 if operands[0].fast else 2 * sum(shape.bytes for shape in updates)
            moved = changed + _hbm(updates)
        else:
            moved = result + _hbm(operands)
        return unestimated(label, moved, products, comparisons(label, it, operands))

    def opcodes(self, name: str) -> set[str]:
        found = set()
        for it in self.module.computations[name].instructions.values():
            found.add(it.opcode)
            for inner in it.called.get("calls", ()):
                found |= self.opcodes(inner)
        return found

    def loop(self, parent: Computation, it: Instruction, timed: bool) -> Cost:
        trips = trip_count(self.module, parent, it)
        cost = Cost()
        times = self.unknown_trips if trips is None else trips
        body = self.computation(it.called["body"][0], timed)
        cost.add(body, times)
        crossing = sum(count for found, count in body.collectives.items() if found.between_slices)
        if crossing:
            cost.slice_loops[_source(it)] += crossing * times
        if trips is None:
            cost.unknown_loops[self.module.place(it) or _source(it)] += 1
        return cost

    def branches(self, it: Instruction, timed: bool) -> Cost:
        """The dearest branch."""
        names = it.called.get("branch_computations") or [
            name
            for kind in ("true_computation", "false_computation")
            if (name := (it.attribute(kind) or "").lstrip("%"))
        ]
        costs = [self.computation(name, timed) for name in names]
        return max(costs, key=lambda cost: (cost.cycles, cost.flops))


def _communication(it: Instruction, inner: str, communicates: str) -> str:
    """How collectives inside a fusion are to be counted.

    TPUs weave an asynchronous collective into several fusions: `async-collective-start`, matmuls
    that carry it on, `async-collective-done`. It is one collective.
    """
    if it.name.startswith("async-collective-start"):
        return "async"
    if it.name.startswith("async-collective-done") or inner.startswith("async_collective_fusion"):
        return "continued"
    return communicates


def unestimated(label: str, moved: int, products, vector_operations: float) -> Unestimated:
    """A fusion has one product, or several of one precision."""
    kind = max(products, key=products.get, default="bfloat16")
    return Unestimated(label, moved, float(sum(products.values())), vector_operations, kind)


def comparisons(label: str, it: Instruction, operands: list[Shape]) -> float:
    """Operations of a bitonic sort (Batcher 1968) along the sorted axis, or of its part that finds
    the k largest: log(log + 1) / 2 stages, each of which compares, and selects, every array."""
    if label == "sort":
        axis = it.numbers("dimensions")[0]
        length = operands[0].dims[axis]
    elif label == "top-k":
        length = it.shapes[0].dims[-1]
    else:
        return 0.0
    levels = math.ceil(math.log2(max(length, 2)))
    return operands[0].size * levels * (levels + 1) / 2 * (1 + len(it.shapes))


def _hbm(shapes: list[Shape] | tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes if not shape.fast)


def _source(it: Instruction) -> str:
    """Where the program says the loop comes from."""
    start = it.rest.find('op_name="')
    name = it.rest[start + 9 :].split('"')[0] if start >= 0 else it.name
    parts = [p for p in name.split("/") if p not in ("while", "body", "closed_call", "checkpoint")]
    return "/".join(parts[-3:])
