"""Where the time of a training step goes: its parts, timed alone, against plain matrix products.

    python benchmarks/step_profile.py [--width=384] [--rows=24] [--row_length=256] [--layers=12]
        [--dtype=bfloat16] [--output=FILE.json]

Every part is timed forward + backward in --dtype (`model.dtype`; default: float32) on rows of four
texts, and compared with the rate of a plain matrix product of the same width and dtype. `ratio` in
the JSON is the whole step over what its matrix products alone would take at that rate: 1 is the
limit of any implementation that computes the same numbers with the same products.
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
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_embed_jax.data.batches import PairBatch
from moe_embed_jax.kernels.cpu_products import product
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.models.attention import rotation
from moe_embed_jax.models.encoder import Block, EncoderConfig
from moe_embed_jax.stages.contrastive import Contrastive
from moe_embed_jax.training.optimizer import make_optimizer
from moe_embed_jax.training.run_config import LossConfig, OptimizerConfig
from moe_embed_jax.training.state import create_state
from moe_embed_jax.training.step import jit_train_step

VOCABULARY, TEXTS_PER_ROW = 16_384, 4


def main():
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--width", type=int, default=384)
    flags.add_argument("--rows", type=int, default=24)
    flags.add_argument("--row_length", type=int, default=256)
    flags.add_argument("--layers", type=int, default=12)
    flags.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--output", type=pathlib.Path)
    options = flags.parse_args()
    width, tokens = options.width, options.rows * options.row_length
    model = EncoderConfig(
        vocab_size=VOCABULARY,
        num_layers=options.layers,
        width=width,
        num_heads=width // 64,
        ffn_width=4 * width,
        dtype=options.dtype,
    )
    mesh = single_device_mesh()
    with jax.set_mesh(mesh):
        runs = parts(model, options.rows, options.row_length) | {
            "whole step": whole_step(model, options.rows, options.row_length, mesh)
        }
        seconds = {name: [] for name in runs}
        for run in runs.values():
            run()  # compiles
        for _ in range(options.rounds):
            for name, run in runs.items():
                if name != "whole step":  # the one before it may still be giving memory back
                    jax.block_until_ready(run())
                start = time.perf_counter()
                jax.block_until_ready(run())
                seconds[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in seconds.items()}

    moe, dense = model.num_moe_layers, model.num_layers - model.num_moe_layers
    flops = matmul_flops(model, tokens, options.row_length)
    rate = flops["plain matrix product"] / seconds["plain matrix product"]
    counts = {"attention": moe + dense, "dense feed-forward": dense, "expert layer": moe}
    rows = []
    for name, count in counts.items():
        rows.append((name, count * seconds[name], count * flops[name]))
    whole = seconds["whole step"]
    rest = whole - sum(row[1] for row in rows)
    rows.append(("embeddings, norms, loss, update, the rest", rest, 0.0))
    rows.append(("whole step", whole, sum(row[2] for row in rows)))
    print(f"{tokens:,} token slots, width {width}, {options.layers} layers, {options.dtype}")
    print(f"a plain matrix product: {rate / 1e9:.0f} GFLOP/s\n")
    print(f"{'':42} {'s':>7} {'share':>7} {'GFLOP/s':>8} {'of plain':>9}")
    for name, spent, work in rows:
        speed = work / spent
        print(f"{name:42} {spent:7.2f} {spent / whole:7.0%} {speed / 1e9:8.0f} {speed / rate:9.0%}")
    report = {
        "ratio": whole * rate / rows[-1][2],
        "compares": "seconds of the training step / seconds of its matrix products at the rate of "
        "a plain one",
        "plain_gflops": rate / 1e9,
        "parts": [dict(zip(("name", "seconds", "flops"), row, strict=True)) for row in rows],
    }
    print(f"\n{report['compares']}: {report['ratio']:.2f}")
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


def matmul_flops(model: EncoderConfig, tokens: int, row_length: int) -> dict[str, float]:
    """Forward + backward (three products for one) of one layer; of the plain product, forward."""
    D, F = model.width, model.ffn_width
    forward = {
        "plain matrix product": 2 * tokens * D * F / 3,
        "attention": 2 * tokens * (4 * D * D + 2 * row_length * D),
        "dense feed-forward": 4 * tokens * D * F,
        "expert layer": 4 * tokens * D * F * model.experts_per_token,
    }
    return {name: 3.0 * work for name, work in forward.items()}


def parts(model: EncoderConfig, rows: int, row_length: int) -> dict:
    """Functions that compute value and gradient of one part."""
    rng = np.random.default_rng(0)
    D, init = model.width, nnx.initializers.normal(model.initializer_range)
    x_RLD = jnp.asarray(rng.normal(size=(rows, row_length, D)), jnp.float32)
    text_index_RL, position_RL = texts(rows, row_length)
    plain = x_RLD.reshape(-1, D), rng.normal(size=(D, model.ffn_width))
    dense = nnx.split(Block(model, False, init, nnx.Rngs(0)))
    sparse = nnx.split(Block(model, True, init, nnx.Rngs(0)))

    def apply(block, part, x_RLD):
        block = nnx.merge(*block)
        if part == "attention":
            angles = rotation(position_RL, D // model.num_heads, model.rotary_base)
            return block.attention(x_RLD, text_index_RL, angles)
        if part == "expert layer":
            return jax.shard_map(  # of one device: the layer knows the axes of the mesh
                lambda x_RLD: block.moe(x_RLD, text_index_RL >= 0)[0],
                in_specs=P(),
                out_specs=P(),
                check_vma=False,
            )(x_RLD)
        return block.feed_forward(x_RLD)

    def gradient(function, *arguments):
        grad = jax.jit(
            jax.grad(lambda *a: jnp.sum(function(*a) * x_RLD), argnums=tuple(range(len(arguments))))
        )
        return functools.partial(grad, *arguments)

    def of_block(block, part):
        return gradient(lambda state, x: apply((block[0], state), part, x), block[1], x_RLD)

    return {
        "plain matrix product": functools.partial(
            jax.jit(product), *(jnp.asarray(x, model.dtype) for x in plain)
        ),
        "attention": of_block(dense, "attention"),
        "dense feed-forward": of_block(dense, "dense feed-forward"),
        "expert layer": of_block(sparse, "expert layer"),
    }


def texts(rows: int, row_length: int):
    """text_index_RL and position_RL of `TEXTS_PER_ROW` texts that fill each row."""
    length = row_length // TEXTS_PER_ROW
    column = np.arange(row_length)
    index = np.minimum(column // length, TEXTS_PER_ROW - 1)
    shape = (rows, row_length)
    return tuple(
        np.broadcast_to(a, shape).astype(np.int32) for a in (index, column - index * length)
    )


def whole_step(model: EncoderConfig, rows: int, row_length: int, mesh):
    """The training step; every second text is a query, the next one its document."""
    config = Contrastive(model, LossConfig(), TEXTS_PER_ROW)
    optimizer = make_optimizer(OptimizerConfig(), 10_000)
    step = jit_train_step(config, optimizer, mesh)
    rng = np.random.default_rng(0)
    pairs = rows * TEXTS_PER_ROW // 2
    text_index_RL, position_RL = texts(rows, row_length)
    ids = rng.integers(-(2**31), 2**31, (2, pairs, 2)).astype(np.int32)
    batch = PairBatch(
        rng.integers(4, VOCABULARY, (1, rows, row_length)).astype(np.int32),
        text_index_RL[None],
        position_RL[None],
        np.arange(0, 2 * pairs, 2, dtype=np.int32),
        np.arange(1, 2 * pairs, 2, dtype=np.int32)[:, None],
        ids[0],
        ids[1][:, None],
        np.ones((pairs, 1), bool),
    )
    state = [create_state(config, optimizer, mesh, seed=0)]

    def run():
        state[0], metrics = step(state[0], batch)
        return state[0], metrics

    return run


if __name__ == "__main__":
    main()
