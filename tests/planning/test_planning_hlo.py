"""The planner's reading of compiled programs, against programs whose work is known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from helpers.forked import run_forked

from moe_embed_jax.planning.collectives import device_groups, spanned_axes
from moe_embed_jax.planning.cost import Kernel, module_cost
from moe_embed_jax.planning.hlo import parse_module, parse_shapes
from moe_embed_jax.planning.matmul import matmul_flops
from moe_embed_jax.planning.memory import parse_exhausted


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def cost_of(mesh, function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return module_cost(parse_module(text), mesh)


def test_a_matmul_counts_twice_its_multiply_adds(mesh):
    cost = cost_of(mesh, lambda x, w: x @ w, (24, 40), (40, 56))
    assert cost.flops == 2 * 24 * 40 * 56


def test_a_batched_matmul(mesh):
    cost = cost_of(mesh, lambda x, w: jnp.einsum("bik,bjk->bij", x, w), (6, 24, 40), (6, 56, 40))
    assert cost.flops == 2 * 6 * 24 * 40 * 56


def test_the_body_of_a_scan_counts_as_often_as_it_runs(mesh):
    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    cost = cost_of(mesh, scanned, (24, 40), (7, 40, 40))
    assert cost.flops == 7 * 2 * 24 * 40 * 40
    assert not cost.unknown_loops


def test_nested_scans_multiply(mesh):
    def inner(x, w):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), x)

    def outer(x, w):
        return jax.lax.scan(lambda x, w: (inner(x, w), None), x, w)[0]

    cost = cost_of(mesh, outer, (24, 40), (5, 40, 40))
    assert cost.flops == 5 * 3 * 2 * 24 * 40 * 40


def test_a_gradient_through_rematerialisation_counts_the_second_forward_pass(mesh):
    def loss(w, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    cost = cost_of(mesh, jax.grad(loss), (6, 40, 40), (24, 40))
    assert cost.flops == 4 * 6 * 2 * 24 * 40 * 40  # forward, forward again, dx, dw


def test_a_loop_that_the_data_bound_counts_once_and_is_named(mesh):
    def dynamic(x, w, count):
        return jax.lax.fori_loop(0, count[0].astype(int), lambda i, x: jnp.tanh(x @ w), x)

    cost = cost_of(mesh, dynamic, (24, 40), (40, 40), (1,))
    assert cost.flops == 2 * 24 * 40 * 40
    assert sum(cost.unknown_loops.values()) == 1


def test_collectives_are_counted_with_bytes_and_axes():
    program = """
import json, jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P, NamedSharding
from moe_embed_jax.mesh import MeshConfig, make_mesh
from moe_embed_jax.planning.cost import Kernel, module_cost
from moe_embed_jax.planning.hlo import parse_module

mesh = make_mesh(MeshConfig(data=2, fsdp=1, expert=2))
spec = P(("data", "expert"))

def local(x):
    x = jax.lax.psum(x, "expert")
    def step(x, _):
        return jax.lax.all_gather(x, "data").sum(0), None
    x, _ = jax.lax.scan(step, x, length=5)
    x = jax.lax.all_to_all(x.reshape(4, -1), ("data", "expert"), 0, 0)
    return jax.lax.ppermute(x.reshape(-1, 8), "data", [(0, 1), (1, 0)])

with jax.set_mesh(mesh):
    step = jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
    text = jax.jit(step).lower(x).compile().as_text()
cost = module_cost(parse_module(text), mesh)
print(json.dumps([[c.kind, c.bytes, c.axes, c.group_size, n] for c, n in cost.collectives.items()]))
"""
    result = run_forked(["-c", program], devices=4)
    assert result.returncode == 0, result.stderr
    found = sorted(json.loads(result.stdout.splitlines()[-1]))
    part = 16 * 8 * 4  # bytes of a device
    assert found == [
        ["all-gather", 2 * part, ["data"], 2, 5],
        ["all-reduce", part, ["expert"], 2, 1],
        ["all-to-all", part, ["data", "expert"], 4, 1],
        ["collective-permute", part, ["data"], 4, 1],
    ]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,2}}, x", [[0, 1], [1, 2]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
    ],
)
def test_every_form_of_device_groups(text, groups):
    assert device_groups(text, 4).tolist() == groups


def test_spanned_axes_are_those_that_vary_within_a_group():
    class Mesh:
        axis_names = ("data", "fsdp", "expert")
        devices = np.empty((2, 1, 4))

    assert spanned_axes(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), Mesh) == ("expert",)
    assert spanned_axes(np.array([[0, 4]]), Mesh) == ("data",)
    assert spanned_axes(np.array([[0, 5]]), Mesh) == ("data", "expert")


# ---- What TPUs write, in the form of libtpu 0.0.42 -----------------------------------------------

TPU_MODULE = (ROOT / "tests/golden/tpu_module.hlo").read_text()


def test_an_instruction_over_several_lines_is_one():
    """JAX's splash attention writes metadata whose last line begins as the end of a computation."""
    module = parse_module("""HloModule m

ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %k = f32[2]{0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={x={
"block": 1
}}, metadata={op_name="jit(f)/splash"}
  ROOT %r = f32[2]{0} add(%k, %k)
}
""")
    entry = module.computations[module.entry]
    assert entry.root.name == "r"
    assert "splash" in entry.instructions["k"].rest


@pytest.fixture(scope="module")
def tpu_cost():
    class Mesh:
        axis_names = ("data", "fsdp", "expert")
        devices = np.array([object() for _ in range(4)]).reshape(1, 4, 1)
        size = 4

    return module_cost(parse_module(TPU_MODULE), Mesh)


def test_tpu_loops_without_known_trip_count_are_read_from_their_condition(tpu_cost):
    product = 2 * 64 * 32 * 48
    assert tpu_cost.matmul_flops == (11 - 1 + 1) * product  # the loop starts at 1; one outside
    assert tpu_cost.cycles == 10 * 1000 + 2000 + 10


def test_tpu_kernels_count_by_their_own_estimate(tpu_cost):
    ((kernel, count),) = tpu_cost.kernels.items()
    assert (kernel.name, kernel.flops, kernel.bytes, count) == ("gmm", 196608, 13312, 1)


def test_a_tpu_kernel_fused_with_the_slice_it_writes_counts_its_estimate_only():
    """The compiler spreads the JSON of such a kernel over several lines."""
    text = """
%fused (x: bf16[8,128], all: bf16[4,8,128], i: s32[]) -> bf16[4,8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %all = bf16[4,8,128]{2,1,0} parameter(1)
  %kernel.3 = bf16[1,8,128]{2,1,0} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config": {"cost_estimate": {
"bytes_accessed":4096,
"flops":67108864,
"transcendentals":0
}, "serialization_format": 1}, "flag_configs": []}
  %i = s32[] parameter(2)
  ROOT %update = bf16[4,8,128]{2,1,0} dynamic-update-slice(%all, %kernel.3, %i, %i, %i)
}

ENTRY %main (x.1: bf16[8,128], all.1: bf16[4,8,128], i.1: s32[]) -> bf16[4,8,128] {
  %x.1 = bf16[8,128]{1,0} parameter(0)
  %all.1 = bf16[4,8,128]{2,1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  ROOT %fusion = bf16[4,8,128]{2,1,0} fusion(%x.1, %all.1, %i.1), kind=kCustom, calls=%fused
}
"""
    module = parse_module(text)
    assert module.computations["fused"].root.opcode == "dynamic-update-slice"
    cost = module_cost(module, None)
    assert dict(cost.kernels) == {Kernel("kernel", 67108864.0, 4096.0, 0.0): 1}
    assert not cost.unestimated


def test_tpu_collectives_woven_into_fusions_count_once(tpu_cost):
    found = {(c.kind, c.bytes, c.axes, c.is_async): n for c, n in tpu_cost.collectives.items()}
    assert found == {
        ("all-gather", 32 * 48 * 2, ("fsdp",), True): 1,
        ("reduce-scatter", 64 * 48 * 4, ("fsdp",), False): 1,
    }


def test_shapes_know_their_bytes_and_their_memory():
    big, small = parse_shapes("(bf16[8,128]{1,0:T(8,128)(2,1)}, /*index=1*/f32[3]{0:T(128)S(1)})")
    assert (big.bytes, big.fast) == (2048, False)
    assert (small.bytes, small.fast) == (12, True)


def test_a_batched_dot_written_as_a_convolution_counts_valid_positions_only():
    # bf16[6,24,40] x bf16[6,40,56] over batch 6, as TPUs write it.
    line = (
        "ENTRY %m (a: bf16[6,24,40], b: bf16[6,40,56]) -> bf16[6,24,56] {\n"
        "  %a = bf16[6,24,40] parameter(0)\n"
        "  %b = bf16[6,40,56] parameter(1)\n"
        "  ROOT %c = bf16[6,24,56] convolution(%a, %b), "
        "window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0io->0bf\n}\n"
    )
    computation = parse_module(line).computations["m"]
    lhs, rhs = (shapes[0] for shapes in computation.operand_shapes(computation.root))
    assert matmul_flops(computation.root, lhs, rhs) == 2 * 6 * 24 * 40 * 56


@pytest.mark.parametrize(
    ("message", "space", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (640.00G) exceeds available HBM (15.75G).",
            "hbm",
            640 * 2**30,
            int(15.75 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: Allocation (size=268435456) would exceed memory (size=134217728) "
            ":: #allocation2 [shape = 'u8[268435456]{0}', space=vmem, size = 0x10000000]",
            "vmem",
            2**28,
            2**27,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            "hbm",
            int(20.5 * 2**30),
            int(15.75 * 2**30),
        ),
    ],
)
def test_out_of_memory_is_understood(message, space, needed, available):
    found = parse_exhausted(message)
    assert (found.space, found.needed, found.available) == (space, needed, available)


def test_the_kernel_that_ran_out_of_fast_memory_is_named():
    message = (
        "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space "
        "vmem while allocating on stack for %attention.26 = bf16[35,512,2304]{2,1,0} custom-call("
        '%fusion.29), metadata={op_name="jit(train_step)/attention_backward" stack_frame_id=5}. '
        "Scoped allocation with size 18.43M and limit 16.00M exceeded scoped vmem limit by 2.43M."
    )
    found = parse_exhausted(message)
    assert (found.space, found.available) == ("vmem", 16 * 2**20)
    assert found.needed == int(18.43 * 2**20)
    assert found.largest == ("kernel jit(train_step)/attention_backward",)


def test_another_error_is_not_out_of_memory():
    assert parse_exhausted("INVALID_ARGUMENT: no such thing") is None
