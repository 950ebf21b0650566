"""The planner against times that others measured on TPUs: predicted and measured, with sources.

    python benchmarks/planner_validation.py [--only=TEXT] [--results=FILE.json] [--table=FILE.md]
        [--programs=FOLDER]

Every case is compiled ahead of time for the topology on which it was measured, and priced by the
planner's own code (planning/cost.py, planning/roofline.py). It needs libtpu and no TPU. Products
and collectives take seconds, whole training steps minutes each. `--results` keeps what is finished;
a run with `--only` adds its cases to it. Programs in `--programs` are priced again without the
compiler, which is what a change of the planner's prices needs.

Cases are those that were published with enough to rebuild them, whether they fit or not.
NOT_REBUILT names the others. The rebuilt steps are ours: what a publication does not say is a
comment here.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler alone; never takes a TPU that is there

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from planner_decoder import Decoder

from moe_embed_jax.markdown_table import markdown_table
from moe_embed_jax.planning import roofline
from moe_embed_jax.planning.cost import Cost, Kernel, module_cost
from moe_embed_jax.planning.hlo import parse_module
from moe_embed_jax.planning.topology import topology_devices

JAX_DOCS = "jax docs/pallas/tpu/matmul.ipynb"  # 100 calls from Python, each with its dispatch
VORUSHIN = "vorushin.github.io/blog/llm-pretraining-tpu-v6e-50usd, February 2026"
MARIN = "marin-community/marin issue 6736, June 2026"
JETSTREAM = "AI-Hypercomputer/jetstream-pytorch PR 168, benchmarks/basic_ops.py"
MAXTEXT = "AI-Hypercomputer/maxtext, MaxText/configs"
NOT_REBUILT = {
    f"{MARIN}: chains of dependent bfloat16 products on v5p and v6e": "the shapes and times could "
    "not be read in what is stored of the thread",
    "AI-Hypercomputer/tpu-recipes, Llama 3.1 8B on v6e-8, 3.443 s a step": "it keeps five tensors "
    "of each layer in the host's memory, whose link the planner does not price",
    "marin issue 6044, 67B-A2B on v4-1024, 22.19 s a step": "sizes of layers and experts, and the "
    "mesh, are not published with it",
    "marin issue 1608, Mixtral-like 380M, 17 and 22 % MFU": "no time, batch or topology with it",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """kind: "product", "collective", "part" of a step, or "step".

    build: mesh -> (function, arguments, donated arguments). repeats: how often one call does what
    was measured. decoder: prices its attention, of which the kernels say nothing.
    """

    kind: str
    name: str
    topology: str
    measured: float  # seconds
    source: str
    build: Callable
    repeats: int = 1
    decoder: Decoder | None = None
    mesh: tuple[int, int, int] = (1, 1, 1)  # data, fsdp, tensor
    options: dict | None = None  # of the compiler


def product(size: int):
    def build(mesh):
        x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
        return jnp.matmul, (x, x), ()

    return build


REPEATS = 8


def ring_permute(size: int):
    """`size` bytes of every device go to its neighbour, REPEATS times, each after the last."""

    def build(mesh):
        devices = mesh.size
        ring = [(i, (i + 1) % devices) for i in range(devices)]

        def permute(x):
            def once(_, x):
                x = jax.lax.ppermute(jax.lax.optimization_barrier(x), "fsdp", ring)
                return jax.lax.optimization_barrier(x)

            return jax.lax.fori_loop(0, REPEATS, once, x)

        spec = P("fsdp")
        shape = (devices * size // 2048, 1024)  # full tiles; the thread does not say the shape
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        return jax.shard_map(permute, mesh=mesh, in_specs=spec, out_specs=spec), (x,), ()

    return build


def sharded_square(function, specs, out=None):
    """`function` of bfloat16 [32768, 32768] in `specs`; inside shard_map if `out` is given."""

    def build(mesh):
        arguments = tuple(
            jax.ShapeDtypeStruct((2**15,) * 2, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
            for spec in specs
        )
        if out is None:
            return function, arguments, ()
        local = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
        return local, arguments, ()

    return build


def part(decoder: Decoder, function):
    def build(mesh):
        parameters = decoder.parameters(mesh, jnp.bfloat16)
        return function(decoder.loss), (parameters, decoder.tokens(mesh)), ()

    return build


def step(decoder: Decoder):
    def build(mesh):
        parameters, optimizer = decoder.parameters(mesh), decoder.optimizer()
        state = jax.eval_shape(optimizer.init, parameters)
        by_shape = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(parameters)}
        whole = NamedSharding(mesh, P())
        state = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=by_shape.get(leaf.shape, whole)
            ),
            state,
        )
        token = decoder.tokens(mesh, (decoder.micro,) if decoder.micro > 1 else ())
        function = lambda *arguments: decoder.step(optimizer, *arguments)  # noqa: E731
        return function, (parameters, state, token), (0, 1)

    return build


# 163.6M parameters. Blocks of attention, chunks of the loss, and the scan over layers are ours: on
# v6e 0.28 of the 0.76 s are slices and copies that the scan makes, which the measured program may
# not have.
SMALL = Decoder(
    vocab=32_768, layers=8, width=1024, heads=4, kv_heads=1, head=256, ffn=3072, length=2048,
    rows=4, block=1024, micro=16, loss_chunks=8, qk_norm=True, cap=15.0,
)  # fmt: skip
# MaxText/configs/base.yml, scaled by global_parameter_scale of the scripts (whose first of 2^4 and
# 2^5 doublings are heads and ffn, then width, then layers); blocks of attention are its default.
MAXTEXT_16B = Decoder(
    vocab=32_000, layers=32, width=4096, heads=64, kv_heads=64, head=128, ffn=28_672, length=2048,
    rows=6, block=512, remat="none", clip=True, one_hot=True,
)  # fmt: skip
MAXTEXT_32B = dataclasses.replace(MAXTEXT_16B, width=8192, rows=4)
MAXTEXT_32B_V5P = dataclasses.replace(MAXTEXT_32B, rows=7, remat="products")
# LIBTPU_INIT_ARGS that both scripts set, as far as this libtpu knows them.
MAXTEXT_OPTIONS = dict.fromkeys(
    (
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        "xla_tpu_data_parallel_opt_different_sized_ops",
        "xla_tpu_enable_async_collective_fusion",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "xla_tpu_overlap_compute_collective_tc",
        "xla_enable_async_all_gather",
    ),
    True,
)


def maxtext_seconds(decoder: Decoder, tflops: float) -> float:
    """Seconds of a step that MaxText reports as `tflops` per device: 6 FLOPs per parameter and
    token, and half of 12 per score and feature of a head."""
    layer = 2 * decoder.width * decoder.head * (decoder.heads + decoder.kv_heads)
    layer += 3 * decoder.width * decoder.ffn
    parameters = decoder.layers * layer + 2 * decoder.vocab * decoder.width
    scores = decoder.layers * decoder.heads * decoder.length**2 * decoder.rows
    tokens = decoder.rows * decoder.length
    return 6 * (parameters * tokens + scores * decoder.head) / (tflops * 1e12)


def _permutes():
    for topology, devices, seconds in (
        ("v5p:2x2x1", 4, {2**20: 16.94e-6, 2**26: 781.98e-6}),
        ("v6e:2x4", 8, {2**20: 17.45e-6, 2**26: 776.34e-6}),
    ):
        for size, measured in seconds.items():
            name = f"permute, {size // 2**20} MiB per device"
            build = ring_permute(size)
            mesh = (1, devices, 1)
            yield Case(
                "collective", name, topology, measured, MARIN, build, repeats=REPEATS, mesh=mesh
            )


def _jetstream():
    rows, columns, whole, ring = P("fsdp"), P(None, "fsdp"), P(), (1, 8, 1)
    gather = sharded_square(lambda x: jax.lax.all_gather(x, "fsdp"), (rows,), whole)
    reduce = sharded_square(lambda x: jax.lax.psum(x, "fsdp"), (rows,), whole)
    for kind, name, measured, build in (
        ("product", "product 32768 on each of 8", 438.17e-3,
         sharded_square(jnp.matmul, (whole, whole))),
        ("product", "product 32768 over 8, columns x rows", 108.891e-3,
         sharded_square(jnp.matmul, (columns, rows))),
        ("product", "product 32768 over 8, rows x rows", 76.6386e-3,
         sharded_square(jnp.matmul, (rows, rows))),
        ("collective", "all-gather of 2 GiB", 68.3381e-3, gather),
        ("collective", "all-reduce of 256 MiB", 8.25386e-3, reduce),
    ):  # fmt: skip
        yield Case(kind, name, "v5e:2x4", measured, JETSTREAM, build, mesh=ring)


def _maxtext():
    for name, topology, decoder, tflops, mesh in (
        ("16B, batch 6 x 2048", "v5e:16x16", MAXTEXT_16B, 120, (1, 256, 1)),
        ("32B, batch 4 x 2048", "v5e:16x16", MAXTEXT_32B, 132, (1, 256, 1)),
        ("32B, batch 7 x 2048, tensor 4", "v5p:4x4x4", MAXTEXT_32B_V5P, 328, (1, 16, 4)),
    ):
        chip = topology.partition(":")[0]
        source = f"{MAXTEXT}/{chip}/README.md: {tflops} TFLOP/s per chip"
        measured = maxtext_seconds(decoder, tflops)
        yield Case(
            "step", f"MaxText {name}", topology, measured, source, step(decoder),
            decoder=decoder, mesh=mesh, options=MAXTEXT_OPTIONS,
        )  # fmt: skip


CASES = (
    Case("product", "product 1024", "v5e:1x1", 0.119e-3, JAX_DOCS, product(1024)),
    Case("product", "product 4096", "v5e:1x1", 0.827e-3, JAX_DOCS, product(4096)),
    Case("product", "product 8192", "v5e:1x1", 6.047e-3, JAX_DOCS, product(8192)),
    Case("product", "product 4096", "v6e:1x1", 0.36e-3, VORUSHIN, product(4096)),
    Case("product", "product 8192", "v6e:1x1", 1.72e-3, VORUSHIN, product(8192)),
    *_permutes(),
    *_jetstream(),
    Case(
        "part", "164M, 4 x 2048, forward", "v6e:1x1", 4.73e-3, VORUSHIN,
        part(SMALL, lambda loss: loss), decoder=SMALL,
    ),
    Case(
        "part", "164M, 4 x 2048, forward and backward", "v6e:1x1", 18.45e-3, VORUSHIN,
        part(SMALL, jax.value_and_grad), decoder=SMALL,
    ),
    Case(
        "step", "164M, batch 64 x 2048", "v6e:1x1", 131_072 / 433_606, VORUSHIN,
        step(SMALL), decoder=SMALL,
    ),
    Case(
        "step", "164M, batch 64 x 2048", "v5e:1x1", 131_072 / 148_829, VORUSHIN,
        step(SMALL), decoder=SMALL,
    ),
    *_maxtext(),
)  # fmt: skip


def predict(case: Case, programs: pathlib.Path | None) -> dict:
    """Predicted seconds of a case: as the planner reports them, and with nothing hidden."""
    chip, devices = topology_devices(case.topology)
    axes = ("data", "fsdp", "tensor")
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh(case.mesh, axes, axis_types=auto, devices=devices)
    start = time.perf_counter()
    program = programs and programs / f"{re.sub('[^a-zA-Z0-9]+', '_', key(case))}.hlo"
    if program and program.exists():
        text = program.read_text()
    else:
        with jax.set_mesh(mesh):
            function, arguments, donated = case.build(mesh)
            lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
            text = lowered.compile(compiler_options=case.options).as_text()
        if program:
            program.write_text(text)
    cost = module_cost(parse_module(text), mesh, 1)
    if case.decoder:
        price_attention(cost, case.decoder)
    times = roofline.predict(cost, chip)
    return {
        "predicted": times.step_seconds / case.repeats,
        "nothing hidden": times.serial_seconds / case.repeats,
        "compile": time.perf_counter() - start,
    }


def price_attention(cost: Cost, decoder: Decoder) -> None:
    """Gives the kernels of splash attention, which declare nothing, the work of `decoder`."""
    products = {"fwd": 2, "dkv": 4, "dq": 3}  # with [L, L] scores
    for kernel in list(cost.kernels):
        if kernel.flops is None and kernel.name.startswith("splash"):
            count = products[next(phase for phase in products if f"_{phase}" in kernel.name)]
            flops = 2 * count * decoder.scores * max(decoder.head, 128)
            priced = Kernel(kernel.name, flops, 0.0, decoder.scores)
            cost.kernels[priced] += cost.kernels.pop(kernel)


def key(case: Case) -> str:
    return f"{case.name} on {case.topology}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 10 else f"{seconds * 1e3:.4g}"


def table(results: dict[str, dict]) -> str:
    """The cases that have a result, in the order of CASES."""
    rows = []
    for case in CASES:
        if found := results.get(key(case)):
            times = (case.measured, found["predicted"], found["nothing hidden"])
            ratio = f"{case.measured / found['predicted']:.2f}"
            rows.append([
                case.kind, case.name, case.topology, *map(milliseconds, times), ratio,
                case.source,
            ])  # fmt: skip
    head = ["kind", "case", "topology", "measured, ms", "predicted, ms", "nothing hidden, ms"]
    return markdown_table([*head, "measured / predicted", "source"], rows, "lllrrrrl")


def main():
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--only", default="", help="cases whose kind, name or topology contain it")
    flags.add_argument("--results", type=pathlib.Path, help="JSON that is read and added to")
    flags.add_argument("--programs", type=pathlib.Path, help="folder that keeps compiled programs")
    flags.add_argument("--table", type=pathlib.Path, help="write the table as Markdown")
    options = flags.parse_args()
    results = {}
    if options.results and options.results.exists():
        results = json.loads(options.results.read_text())
    for case in CASES:
        if options.only in f"{case.kind} {key(case)}":
            found = results[key(case)] = predict(case, options.programs)
            ratio = case.measured / found["predicted"]
            print(
                f"{key(case)}: predicted {milliseconds(found['predicted'])} ms, measured "
                f"{milliseconds(case.measured)} ms, {ratio:.2f} times the prediction "
                f"(compiled in {found['compile']:.0f} s)",
                flush=True,
            )
            if options.results:
                options.results.write_text(json.dumps(results, indent=1))
    print(table(results))
    if options.table:
        options.table.write_text(table(results) + "\n")
    for name, reason in NOT_REBUILT.items():
        print(f"not rebuilt: {name}: {reason}")


if __name__ == "__main__":
    main()
