"""What a program that is compiled for GPUs does: `cost.py`'s walk, with what XLA writes for them.

A program is a list of kernels: fusions, Triton kernels (also ours, from Pallas), cuDNN's attention.
The compiler gives no cycles for them.
"""

import collections
import dataclasses
import math
import re

from moe_embed_jax.planning.collectives import kind_of
from moe_embed_jax.planning.cost import (
    FREE,
    Cost,
    Kernel,
    Unestimated,
    Walk,
    comparisons,
    unestimated,
)
from moe_embed_jax.planning.hlo import Computation, Instruction, Module, Shape
from moe_embed_jax.planning.matmul import precision

TRITON = "__gpu$xla.gpu.triton"
CUDNN_ATTENTION = "__cudnn$fmha"
CUBLAS = "__cublas$"
# Products with [L, L] scores per head, of cuDNN's kernels and of kernels/triton_attention.py.
# Backward they compute the scores again.
ATTENTION_PRODUCTS = {
    "cudnn_attention_forward": 2,
    "cudnn_attention_backward": 5,
    "attention": 2,
    "attention_query_gradient": 3,
    "attention_key_gradient": 4,
}
SLICES = ("dynamic-slice", "slice", "gather")
PASSES = ("bitcast", "copy", "convert", "reshape")


def gpu_module_cost(module: Module, mesh, unknown_trips: int = 1) -> Cost:
    """As `cost.module_cost`, of a program for GPUs."""
    return _GpuWalk(module, mesh, unknown_trips).computation(module.entry, timed=True)


def target_of(it: Instruction) -> str:
    """Of a custom call; "" for other instructions."""
    found = re.search(r'custom_call_target="([^"]+)"', it.rest)
    return found[1] if found and it.opcode == "custom-call" else ""


class _GpuWalk(Walk):
    def instruction(self, parent: Computation, it: Instruction, timed, communicates) -> Cost:
        target = target_of(it)
        if target == TRITON or target.startswith(CUDNN_ATTENTION):
            cost = Cost()
            operands = [shapes[0] for shapes in parent.operand_shapes(it) if shapes]
            cost.kernels[_kernel(it, target, operands)] += 1
            return cost
        cost = super().instruction(parent, it, timed, communicates)
        if kind_of(it.opcode):
            (found,) = cost.collectives
            overlaps = _overlaps(parent, it)
            cost.collectives = collections.Counter([dataclasses.replace(found, is_async=overlaps)])
        return cost

    def time(self, parent: Computation, it: Instruction, cost: Cost) -> None:
        if target_of(it).startswith(CUBLAS):
            (lhs, *_), *_ = parent.operand_shapes(it)
            kind = precision(it, lhs)
            if kind == "default" and "HIGH" in it.rest:
                kind = "highest"
            cost.products[kind] += _cublas_flops(it, lhs)
        super().time(parent, it, cost)

    def roofline_work(self, parent: Computation, it: Instruction, products) -> Unestimated:
        operands = [shapes[0] for shapes in parent.operand_shapes(it) if shapes]
        label, work = it.opcode, 0.0
        if label == "fusion":
            inner = self.module.computations[it.called["calls"][0]]
            moved = _fusion_bytes(inner)
            label = inner.root.opcode
            if label in ("sort", "tuple"):
                for sort in inner.instructions.values():
                    if sort.opcode == "sort":
                        inputs = [shapes[0] for shapes in inner.operand_shapes(sort)]
                        work += comparisons("sort", sort, inputs)
        else:
            moved = sum(shape.bytes for shape in (*operands, *it.shapes))
            work = comparisons(label, it, operands)
        return unestimated(label, moved, products, work)


def _overlaps(parent: Computation, it: Instruction) -> bool:
    """Whether something that takes time stands between a collective's start and its end in the
    schedule, which is the order of the text."""
    if not it.opcode.endswith("-start"):
        return False
    is_after = False
    for other in parent.instructions.values():
        if other is it:
            is_after = True
        elif is_after and it.name in other.operands and other.opcode.endswith("-done"):
            return False
        elif (
            is_after and other.opcode not in FREE and not other.opcode.endswith(("-start", "-done"))
        ):
            return True
    return False


def _kernel(it: Instruction, target: str, operands: list[Shape]) -> Kernel:
    """By its shapes: neither XLA nor Pallas says what a kernel for GPUs costs."""
    moved = float(sum(shape.bytes for shape in (*operands, *it.shapes)))
    name = _pallas_name(it)
    if target.startswith(CUDNN_ATTENTION):
        name = f"cudnn_attention_{'backward' if target.endswith('Backward') else 'forward'}"
    states = [shape for shape in operands if shape.dtype in ("bf16", "f16", "f32")]
    kind = "bfloat16" if states and states[0].dtype != "f32" else "default"
    if name in ATTENTION_PRODUCTS:
        # As if every block of scores were computed: ours leave out blocks of other texts.
        rows, length, heads, head = next(shape.dims for shape in states if len(shape.dims) == 4)
        scores = float(rows * heads * length * length)
        flops = 2 * ATTENTION_PRODUCTS[name] * scores * head
        return Kernel(name, flops, moved, scores, kind)
    return Kernel(name, _expert_flops(name, [*operands, *it.shapes]), moved, 0.0, kind)


def _cublas_flops(it: Instruction, lhs: Shape) -> float:
    dimensions = it.backend_config["gemm_backend_config"]["dot_dimension_numbers"]
    contracted = dimensions["lhs_contracting_dimensions"]
    return 2.0 * it.shapes[0].size * math.prod(lhs.dims[int(d)] for d in contracted)


def _pallas_name(it: Instruction) -> str:
    """`jit(step)/transpose(jvp(expert_product))/pallas_call` -> `expert_product`."""
    found = re.search(r'op_name="[^"]*?([\w.]+)\)*/pallas_call"', it.rest)
    return found[1] if found else it.name.split(".")[0]


def _expert_flops(name: str, arrays: list[Shape]) -> float | None:
    """Of a product of rows [S, K] and the experts' matrices [E, K, N], whichever of the three is
    the result. Rows that fill up an expert's last tile count; tiles that are not in use do, too."""
    matrices = [shape for shape in arrays if len(shape.dims) == 3]
    rows = [shape for shape in arrays if len(shape.dims) == 2]
    if not name.startswith("expert_") or not matrices or not rows:
        return None
    _, k, n = matrices[0].dims
    return 2.0 * rows[0].dims[0] * k * n


def _fusion_bytes(inner: Computation) -> int:
    """What a fusion reads and writes: of a parameter that is only sliced, the slices; of a result
    that is updated in place, the update."""
    users: dict[str, list[Instruction]] = {}
    for it in inner.instructions.values():
        for name in it.operands:
            users.setdefault(name, []).append(it)
    roots = [inner.root]
    if inner.root.opcode == "tuple":
        roots = [inner.instructions[name] for name in inner.root.operands]
    updated = {}  # a parameter that is updated in place -> bytes of the updates
    written = 0
    for root in roots:
        root = _through(inner, root)
        if root.opcode == "dynamic-update-slice":
            array, update = (inner.instructions[name] for name in root.operands[:2])
            changed = sum(shape.bytes for shape in update.shapes)
            written += changed
            updated[_through(inner, array).name] = 0
        elif root.opcode == "scatter":
            count = len(root.shapes)
            changed = sum(
                shape.bytes
                for name in root.operands[-count:]
                for shape in inner.instructions[name].shapes
            )
            written += changed
            updated |= {
                _through(inner, inner.instructions[name]).name: changed // count
                for name in root.operands[:count]
            }
        else:
            written += sum(shape.bytes for shape in root.shapes)
    read = 0
    for it in inner.instructions.values():
        if it.opcode == "parameter":
            whole = sum(shape.bytes for shape in it.shapes)
            read += min(whole, updated.get(it.name, _read(inner, it, users)))
    return written + read


def _through(inner: Computation, it: Instruction) -> Instruction:
    while it.opcode in PASSES:
        it = inner.instructions[it.operands[0]]
    return it


def _read(inner: Computation, it: Instruction, users) -> int:
    """Bytes of array `it` that the fusion reads."""
    total = 0
    for user in users.get(it.name, ()):
        if user.opcode in SLICES and user.operands[0] == it.name:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode in ("bitcast", "reshape"):
            total += _read(inner, user, users)
        else:
            return sum(shape.bytes for shape in it.shapes)
    return total
