"""The planner's price of attention kernels against the compiler's own schedule.

    python benchmarks/kernel_schedules.py [--topology=v5e:1x1]

A TPU runs bundles of instructions in the order that the compiler chose, one per cycle, so their
number is the time of a loop's body, or of a kernel without loops, but for what it waits for memory.
libtpu writes the bundles out (--xla_jf_dump_to). Price: matrix units at their peak, or vector
operations as in planning/roofline.py, whichever is longer; the share of the peak that hardware
reaches (chips.kernel_share) is not in it. Fewer bundles than the price mean that they wait for the
matrix units. Needs libtpu and no TPU; takes a minute.
"""

import argparse
import functools
import os
import pathlib
import re
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler alone; never takes a TPU that is there

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moe_embed_jax.kernels import blocked_attention, fused_attention
from moe_embed_jax.markdown_table import markdown_table
from moe_embed_jax.mesh import MeshConfig, make_mesh
from moe_embed_jax.models.attention import rotation
from moe_embed_jax.planning import roofline
from moe_embed_jax.planning.topology import topology_devices

LONG, SHORT, HEADS, HEAD = 2048, 256, 12, 64  # tokens of a row for either kernel


def attention_gradient(attention, qkv_RLU, text_index_RL, position_RL):
    def context(qkv_RLU):
        return attention(qkv_RLU, text_index_RL, rotation(position_RL, HEAD, 10_000.0), HEADS)

    context_RLD, vjp = jax.vjp(context, qkv_RLU)
    return vjp(context_RLD)


def bundles_of(folder: pathlib.Path, kernel: str, in_loop: bool) -> int:
    """Bundles of a kernel; with `in_loop` in the body of its longest loop without a loop inside."""
    (path,) = folder.glob(f"*-{kernel}_.1-*-final_bundles.txt")
    bundles = [
        (found[1].count(">"), "LB" in found[1])  # depth, begins a loop
        for line in path.read_text().splitlines()
        if (found := re.match(r"\s*(?:0x[0-9a-f]+|0)\b([^{]*)\{", line))
    ]
    if not in_loop:
        return len(bundles)
    lengths = []
    for start, (depth, begins) in enumerate(bundles):
        if begins:
            body = [bundles[start]]
            for bundle in bundles[start + 1 :]:
                if bundle[0] < depth:
                    break
                body.append(bundle)
            if sum(starts for _, starts in body) == 1:
                lengths.append(len(body))
    return max(lengths)


def main():
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--topology", default="v5e:1x1")
    options = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={name} --xla_jf_dump_llo_text=true"
        chip, devices = topology_devices(options.topology)
        mesh = make_mesh(MeshConfig(), devices)
        here = NamedSharding(mesh, PartitionSpec())
        attentions = {
            LONG: blocked_attention.blocked_attention,
            SHORT: fused_attention.fused_attention,
        }
        for length, attention in attentions.items():
            index = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=here)
            shape = (1, length, 3 * HEADS * HEAD)
            qkv = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here)
            with jax.set_mesh(mesh):
                gradient = functools.partial(attention_gradient, attention)
                jax.jit(gradient).lower(qkv, index, index).compile()
        rows = []
        block = blocked_attention.BLOCK
        for kernel, scores, products, in_loop in (
            ("blocked_attention", 2 * blocked_attention.KEYS * block, 2, True),  # a group of heads
            ("blocked_attention_backward", 2 * block * block, 5, True),
            ("fused_attention", HEADS * SHORT * SHORT, 2, False),  # a row
            ("fused_attention_backward", HEADS * SHORT * SHORT, 5, False),
        ):
            is_gradient = kernel.endswith("backward")
            dumped = f"transpose_jvp_{kernel}_" if is_gradient else f"jvp_{kernel}"
            flops = products * 2 * scores * 128
            operations = scores * roofline.vector_operations_of(kernel)
            units = flops / chip.peak_flops, operations / chip.vector_operations
            price = chip.clock_hz * max(units)
            bundles = bundles_of(pathlib.Path(name), dumped, in_loop)
            rows.append([kernel, f"{price:.0f}", bundles, f"{bundles / price:.2f}"])
    print(markdown_table(["kernel", "price, cycles", "bundles", "bundles / price"], rows, "lr"))


if __name__ == "__main__":
    main()
