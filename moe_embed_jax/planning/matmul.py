"""FLOPs of the matrix products in HLO: `dot`, and `convolution`, which TPUs turn them into."""

import math
import re

import numpy as np

from moe_embed_jax.planning.hlo import Instruction, Shape


def matmul_flops(instruction: Instruction, lhs: Shape, rhs: Shape) -> float:
    """2 x multiply-adds of a `dot` or `convolution` instruction."""
    if instruction.opcode == "dot":
        contracted = instruction.numbers("lhs_contracting_dims")
        return 2.0 * instruction.shapes[0].size * math.prod(lhs.dims[d] for d in contracted)
    return _convolution_flops(instruction, lhs, rhs)


def precision(instruction: Instruction, lhs: Shape) -> str:
    """ "bfloat16" (float16 too); of float32 "default", which GPUs round to TF32, or "highest"."""
    if lhs.dtype in ("bf16", "f16"):
        return "bfloat16"
    chosen = instruction.attribute("operand_precision") or ""
    return "highest" if "high" in chosen else "default"


def _convolution_flops(instruction: Instruction, lhs: Shape, rhs: Shape) -> float:
    """Products that fall into padding or between dilated values are not counted.

    That matters: a batched dot is written as a convolution over its batch axis, with a window as
    long as the axis of which every output sees one position.
    """
    labels = instruction.attribute("dim_labels")
    lhs_labels, rhs_labels, out_labels = re.split(r"_|->", labels)
    out = instruction.shapes[0]
    window = _window(instruction.attribute("window") or "")
    # "i" of the kernel is already per group.
    multiplies = rhs.dims[rhs_labels.index("i")]
    multiplies *= out.dims[out_labels.index("f")] * out.dims[out_labels.index("b")]
    spatial = sorted(label for label in lhs_labels if label.isdecimal())
    for position, label in enumerate(spatial):
        multiplies *= _valid_products(
            lhs.dims[lhs_labels.index(label)],
            rhs.dims[rhs_labels.index(label)],
            out.dims[out_labels.index(label)],
            **{name: values[position] for name, values in window.items()},
        )
    return 2.0 * multiplies


def _window(text: str) -> dict[str, list]:
    """`size=3x2 stride=1x2 pad=0_0x1_1` -> {"stride": [1, 2], "pad": [(0, 0), (1, 1)]}."""
    names = ("stride", "pad", "lhs_dilate", "rhs_dilate")
    fields = dict(field.split("=") for field in text.split())
    return {
        name: [
            tuple(map(int, part.split("_"))) if name == "pad" else int(part)
            for part in fields[name].split("x")
        ]
        for name in names
        if name in fields
    }


def _valid_products(size, kernel, out, stride=1, pad=(0, 0), lhs_dilate=1, rhs_dilate=1) -> int:
    """Pairs (output position, kernel position) that meet a value of the input along one axis."""
    if kernel == 1 and stride == 1 and pad == (0, 0) and lhs_dilate == 1:
        return out
    output = np.arange(out, dtype=np.int64) * stride - pad[0]
    count = 0
    for offset in range(kernel):
        at, between = np.divmod(output + offset * rhs_dilate, lhs_dilate)
        count += int(((between == 0) & (at >= 0) & (at < size)).sum())
    return count
