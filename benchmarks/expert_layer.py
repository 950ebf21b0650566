"""The expert layer against what it must cost at least.

    python benchmarks/expert_layer.py [--tokens=4096,16384] [--topologies=v5e:2x2,v5p:2x2x1,v6e:2x2]
        [--output=FILE.json]

* Here: time of `blocked`, forward + backward in float32, over that of two dense feed-forward layers
  of the same width, which is the work of top-2; measured in turns, median of `--rounds`.
* On TPUs, without one: FLOPs of the compiled `grouped` layer, forward + backward in bfloat16 (its
  kernels by their own estimate), over the ideal: three matrix products' worth for each of the two
  matrices of the K experts of every token. Needs the extra `plan`; `--topologies=` leaves it out.

`ratio` in the JSON is the highest measured one, `flops_ratio` the highest compiled one.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_embed_jax.mesh import MeshConfig, make_mesh
from moe_embed_jax.models.feed_forward import gelu
from moe_embed_jax.models.moe import GELU_MLP
from moe_embed_jax.planning.cost import module_cost
from moe_embed_jax.planning.hlo import parse_module
from moe_embed_jax.planning.topology import topology_devices
from moe_embed_jax.routing.exchange import Experts


def main():
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--tokens", default="4096,16384")
    flags.add_argument("--topologies", default="v5e:2x2,v5p:2x2x1,v6e:2x2")
    flags.add_argument("--width", type=int, default=768)
    flags.add_argument("--ffn_width", type=int, default=3072)
    flags.add_argument("--experts", type=int, default=8)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--output", type=pathlib.Path)
    options = flags.parse_args()
    tokens = [int(count) for count in options.tokens.split(",")]
    measured = {count: measure(options, count) for count in tokens}
    for count, (layer, dense, ratio) in measured.items():
        print(
            f"T={count}: blocked {layer:.3f} s, two dense layers {dense:.3f} s: {ratio:.3f}x "
            f"(median of {options.rounds} rounds; 1 is the least possible)"
        )
    compiled = {}
    for topology in filter(None, options.topologies.split(",")):
        compiled[topology] = {count: flops_ratio(options, topology, count) for count in tokens}
        shown = ", ".join(f"T={count} {ratio:.4f}x" for count, ratio in compiled[topology].items())
        print(f"{topology}: compiled FLOPs of grouped over ideal: {shown}")
    report = {
        "ratio": max(ratio for _, _, ratio in measured.values()),
        "compares": "blocked expert layer, forward + backward / two dense feed-forward layers",
        "goal": 1.15,
        "ratios": {count: ratio for count, (_, _, ratio) in measured.items()},
        "flops_ratio": max((max(r.values()) for r in compiled.values()), default=None),
        "flops_compares": "compiled FLOPs of grouped, forward + backward / ideal",
        "flops_goal": 1.02,
        "flops_ratios": compiled,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


def make_case(options, tokens: int, dtype):
    """x, experts (balanced on average, as a trained router's), gates, weights."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.02, dtype)  # noqa: E731
    E, D, F = options.experts, options.width, options.ffn_width
    expert_TK = jnp.asarray(rng.random((tokens, E)).argsort(axis=1)[:, :2], jnp.int32)
    gate_TK = jnp.asarray(rng.uniform(0.2, 0.8, (tokens, 2)), jnp.float32)
    return draw(tokens, D), expert_TK, gate_TK, draw(E, D, F), draw(E, F, D)


def expert_gradients(backend: str):
    layer = Experts(backend, "ring", 1.0).layer(GELU_MLP)

    def loss(x_TD, expert_TK, gate_TK, w_in_EDF, w_out_EFD):
        weights = {"w_in": w_in_EDF, "bias_in": None, "w_out": w_out_EFD}
        y_TD, _ = layer(x_TD, expert_TK, gate_TK, weights)
        return jnp.sum(jnp.square(y_TD.astype(jnp.float32)))

    return jax.jit(jax.grad(loss, argnums=(0, 2, 3, 4)))


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1, 2))
def dense_gradients(x_TD, w_in_EDF, w_out_EFD):
    """Two dense layers, each with two matrices: the products that a top-2 layer must do."""
    y_TD = sum(gelu(x_TD @ w_in_EDF[i]) @ w_out_EFD[i] for i in range(2))
    return jnp.sum(jnp.square(y_TD))


def measure(options, tokens: int) -> tuple[float, float, float]:
    """Median seconds of the layer and of its peer, and median ratio of the rounds."""
    x, expert, gate, w_in, w_out = make_case(options, tokens, jnp.float32)
    layer = functools.partial(expert_gradients("blocked"), x, expert, gate, w_in, w_out)
    dense = functools.partial(dense_gradients, x, w_in[:2], w_out[:2])
    rounds = []
    jax.block_until_ready((layer(), dense()))
    for _ in range(options.rounds):
        seconds = []
        for call in (layer, dense):
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - start)
        rounds.append((*seconds, seconds[0] / seconds[1]))
    return tuple(statistics.median(column) for column in zip(*rounds, strict=True))


def flops_ratio(options, topology: str, tokens: int) -> float:
    _, devices = topology_devices(topology)
    mesh = make_mesh(MeshConfig(data=1), devices[:1])
    placed = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(lambda: make_case(options, tokens, jnp.bfloat16))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), shapes
    )
    with jax.set_mesh(mesh):
        compiled = expert_gradients("grouped").lower(*shapes).compile()
    cost = module_cost(parse_module(compiled.as_text()), mesh)
    ideal = 3 * 2 * (2 * tokens * 2 * options.width * options.ffn_width)
    return cost.flops / ideal


if __name__ == "__main__":
    main()
