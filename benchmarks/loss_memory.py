"""Memory and time of the contrastive loss, all logits in one array or streamed; memory of the step.

    python benchmarks/loss_memory.py [--devices=8] [--width=768] [--batches=1024,16384,131072]
        [--time_batches=256,2048] [--step_batches=256,1024] [--output=FILE.json]

Memory: loss and gradient are compiled, not run, for each batch size on fake CPU devices; what is
compared are the temporaries per device in XLA's memory analysis. `ratio` in the JSON is dense over
streamed at the largest batch. Time: both run on one of the devices, in turns; medians.

The step: the whole training step of a 12-layer MoE encoder of that width (heads of 64, experts of 4
widths), compiled for one device and a batch of `--step_batches` pairs, in one piece and in chunks
of --chunk_rows rows of 256 tokens. Rows are as many as the batch needs when a pair has 128 tokens.

"dense" is the least that a loss with its logits in memory needs: normalise, multiply, log-softmax,
sharded by rows, differentiated by JAX, no duplicates masked. "streamed" is
`losses.infonce.infonce` as the training step calls it, duplicates and all.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

ROW_LENGTH, PAIR_TOKENS = 256, 128
VOCABULARY = 16_384


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def sizes(text):
        return sorted(int(size) for size in text.split(","))

    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batches", type=sizes, default="1024,4096,16384,65536,131072")
    parser.add_argument("--time_batches", type=sizes, default="256,512,1024,2048,4096")
    parser.add_argument("--step_batches", type=sizes, default="128,512,2048,8192")
    parser.add_argument("--chunk_rows", type=int, default=32)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args(arguments)
    uneven = [batch for batch in options.batches if batch % options.devices]
    if uneven:
        parser.error(f"--batches: {uneven[0]} is not divisible by --devices={options.devices}")
    per_chunk = options.chunk_rows * ROW_LENGTH // PAIR_TOKENS
    uneven = [batch for batch in options.step_batches if batch % per_chunk]
    if uneven:
        parser.error(
            f"--step_batches: {uneven[0]} is not divisible by {per_chunk}, a chunk's pairs"
        )
    return options


def main(arguments) -> None:
    options = parse(arguments)
    os.environ["JAX_PLATFORMS"] = "cpu"  # before anything imports jax
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + f" --xla_force_host_platform_device_count={options.devices}"
    )
    import jax

    from moe_embed_jax.losses.ring import TILE
    from moe_embed_jax.mesh import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(), jax.devices()[: options.devices])
    rows = []
    print("loss and gradient, float32, width", options.width)
    print(f"\ntemporaries per device, {options.devices} devices\n")
    print(f"{'pairs':>9} {'dense MB':>10} {'streamed MB':>12} {'ratio':>7}")
    for batch in options.batches:
        used = {
            name: compile_loss(name, batch, options.width, mesh).memory_analysis()
            for name in ("dense", "streamed")
        }
        dense, streamed = (used[name].temp_size_in_bytes for name in ("dense", "streamed"))
        rows.append({"batch": batch, "dense_bytes": dense, "streamed_bytes": streamed})
        print(f"{batch:9,} {dense / 1e6:10,.1f} {streamed / 1e6:12,.1f} {dense / streamed:7.1f}")
    single = make_mesh(MeshConfig(), jax.devices()[:1])
    times = []
    print(f"\ntime on one device\n\n{'pairs':>9} {'dense ms':>10} {'streamed ms':>12} {'ratio':>7}")
    for batch in options.time_batches:
        seconds = measure(batch, options.width, single)
        dense, streamed = seconds["dense"], seconds["streamed"]
        times.append({"batch": batch, "dense_seconds": dense, "streamed_seconds": streamed})
        print(f"{batch:9,} {1e3 * dense:10,.1f} {1e3 * streamed:12,.1f} {dense / streamed:7.2f}")
    print(
        f"\nWith more than {TILE:,} texts per device the streamed form scores everything a second\n"
        "time in its backward pass: four matmuls instead of three. Below, what it adds is the\n"
        "comparison of contents."
    )
    step = []
    print(f"\ntemporaries of the training step, in chunks of {options.chunk_rows} rows\n")
    print(f"{'pairs':>9} {'whole MB':>10} {'chunked MB':>12} {'ratio':>7}")
    for batch in options.step_batches:
        rows_needed = batch * PAIR_TOKENS // ROW_LENGTH
        whole = step_bytes(options.width, batch, rows_needed, single)
        chunked = step_bytes(options.width, batch, options.chunk_rows, single)
        step.append({"batch": batch, "whole_bytes": whole, "chunked_bytes": chunked})
        print(f"{batch:9,} {whole / 1e6:10,.0f} {chunked / 1e6:12,.0f} {whole / chunked:7.1f}")
    summary = {
        "ratio": rows[-1]["dense_bytes"] / rows[-1]["streamed_bytes"],
        "compares": f"temporary bytes per device of loss and gradient, dense / streamed, for "
        f"{rows[-1]['batch']} pairs of width {options.width} on {options.devices} devices",
        "time_ratio": times[-1]["dense_seconds"] / times[-1]["streamed_seconds"],
        "time_compares": f"seconds of loss and gradient, dense / streamed, for "
        f"{times[-1]['batch']} pairs on one CPU device",
        "memory": rows,
        "time": times,
        "step_ratio": step[-1]["whole_bytes"] / step[-1]["chunked_bytes"],
        "step_compares": f"temporary bytes of the training step, in one piece / in chunks, for "
        f"{step[-1]['batch']} pairs of width {options.width} on one device",
        "step": step,
        "jax": jax.__version__,
    }
    print(f"\n{summary['compares']}: {summary['ratio']:.1f}")
    if options.output:
        options.output.write_text(json.dumps(summary, indent=2) + "\n")


def dense_loss(temperature, query_BD, document_BD):
    import jax
    import jax.numpy as jnp

    from moe_embed_jax.losses.contrast import unit

    query_BD, document_BD = unit(query_BD), unit(document_BD)
    logits_BB = jnp.einsum("BD,CD->BC", query_BD, document_BD, precision="highest") / temperature
    own_B = jnp.sum(query_BD * document_BD, axis=-1) / temperature
    return jnp.mean(jax.nn.logsumexp(logits_BB, axis=1) - own_B)


def compile_loss(name: str, batch: int, width: int, mesh):
    """The compiled gradient function of (query_BD, document_BD, query_id_B2, document_id_B2)."""
    import jax
    import jax.numpy as jnp

    from moe_embed_jax.losses.contrast import ContrastConfig
    from moe_embed_jax.losses.infonce import infonce
    from moe_embed_jax.mesh import batch_sharding, replicated

    config = ContrastConfig()

    def loss(query_BD, document_BD, query_id_B2, document_id_B2):
        if name == "dense":
            return dense_loss(config.temperature, query_BD, document_BD)
        arguments = query_BD, document_BD[:, None], query_id_B2, document_id_B2[:, None]
        return infonce(config, *arguments).loss

    sharded = batch_sharding(mesh)
    shapes = [((batch, width), jnp.float32)] * 2 + [((batch, 2), jnp.int32)] * 2
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=sharded) for shape in shapes]
    outputs = replicated(mesh), (sharded, sharded)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=outputs)
        return gradient.lower(*arguments).compile()


def step_bytes(width: int, batch: int, rows: int, mesh) -> int:
    """Temporaries of the compiled step that encodes `rows` rows at a time."""
    import jax

    from moe_embed_jax.data.batches import PairBatch, abstract_batch
    from moe_embed_jax.models.encoder import EncoderConfig
    from moe_embed_jax.stages.contrastive import Contrastive, batch_shapes
    from moe_embed_jax.training.optimizer import make_optimizer
    from moe_embed_jax.training.run_config import LossConfig, OptimizerConfig
    from moe_embed_jax.training.state import abstract_state
    from moe_embed_jax.training.step import jit_train_step

    model = EncoderConfig(
        vocab_size=VOCABULARY, width=width, num_heads=width // 64, ffn_width=4 * width
    )
    config = Contrastive(model, LossConfig(), texts_per_row=16)
    optimizer = make_optimizer(OptimizerConfig(), steps=10_000)
    chunks = batch * PAIR_TOKENS // ROW_LENGTH // rows
    shapes = batch_shapes((chunks, rows, ROW_LENGTH), batch, documents=1)
    abstract = abstract_batch(mesh, PairBatch, **shapes)
    step = jit_train_step(config, optimizer, mesh).jitted
    with jax.set_mesh(mesh):
        compiled = step.lower(abstract_state(config, optimizer, mesh), abstract).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def measure(batch: int, width: int, mesh, rounds: int = 9) -> dict[str, float]:
    """Median seconds of each form; they take turns, so that both see the same machine."""
    import jax
    import numpy as np

    from moe_embed_jax.mesh import batch_sharding

    rng = np.random.default_rng(0)
    query_BD, document_BD = rng.normal(size=(2, batch, width)).astype(np.float32)
    ids = rng.integers(-(2**31), 2**31, (2, batch, 2)).astype(np.int32)
    arguments = jax.device_put((query_BD, document_BD, *ids), batch_sharding(mesh))
    compiled = {name: compile_loss(name, batch, width, mesh) for name in ("dense", "streamed")}
    seconds = {name: [] for name in compiled}
    losses = {name: float(run(*arguments)[0]) for name, run in compiled.items()}
    np.testing.assert_allclose(losses["dense"], losses["streamed"], rtol=1e-5)
    for _ in range(rounds):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
