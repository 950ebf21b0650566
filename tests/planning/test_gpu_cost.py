"""What the planner reads in a program for GPUs, and how it prices it; no compiler is needed."""

import dataclasses
import importlib.util
import types

import numpy as np
import pytest

from moe_embed_jax.errors import UserError
from moe_embed_jax.planning import topology
from moe_embed_jax.planning.cards import CARDS, MEMORY_FRACTION
from moe_embed_jax.planning.collectives import Collective
from moe_embed_jax.planning.cost import Cost, Kernel, Unestimated
from moe_embed_jax.planning.gpu_cost import gpu_module_cost
from moe_embed_jax.planning.hlo import parse_module
from moe_embed_jax.planning.memory import advice, parse_exhausted
from moe_embed_jax.planning.roofline import predict

KIB = 2**10


@pytest.mark.parametrize(("name", "card", "count"), [("h100:8", "h100", 8), ("l4:1", "l4", 1)])
def test_a_topology_of_gpus(name, card, count):
    found = topology.parse_topology(name)
    assert found.is_gpu and found.chip is CARDS[card] and found.sizes == (count,)
    assert not topology.parse_topology("v5e:2x2").is_gpu


@pytest.mark.parametrize("name", ["h100:2x4", "2xh100:8", "h100:16"])
def test_gpus_are_planned_on_one_host(name):
    with pytest.raises(UserError, match="h100:1 to h100:8"):
        topology.parse_topology(name)


def test_without_the_compiler_the_message_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e \.\[plan-gpu\]") as refused:
        topology.topology_devices("h100:1")
    assert len(str(refused.value).splitlines()) == 1


def test_a_program_has_the_part_of_a_card_that_jax_takes():
    for card in CARDS.values():
        assert card.hbm_bytes == int(MEMORY_FRACTION * card.memory_bytes)
        assert f"device_memory_size: {card.memory_bytes}\n" in card.target_config


MESH = types.SimpleNamespace(
    size=8,
    shape={"slice": 1, "data": 8, "fsdp": 1, "expert": 1},
    axis_names=("slice", "data", "fsdp", "expert"),
    devices=np.empty((1, 8, 1, 1), object),
)
PROGRAM = """
%sliced (param.0: f32[64,256], param.1: s32[]) -> f32[1,256] {
  %param.0 = f32[64,256] parameter(0)
  %param.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,256] dynamic-slice(%param.0, %param.1, %zero), dynamic_slice_sizes={1,256}
  ROOT %double = f32[1,256] add(%row, %row)
}

%updated (param.2: f32[64,256], param.3: f32[1,256], param.4: s32[]) -> f32[64,256] {
  %param.2 = f32[64,256] parameter(0)
  %param.3 = f32[1,256] parameter(1)
  %param.4 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %put = f32[64,256] dynamic-update-slice(%param.2, %param.3, %param.4, %zero.1)
}

%product (param.5: f32[64,256], param.6: f32[256,32]) -> f32[64,32] {
  %param.5 = f32[64,256] parameter(0)
  %param.6 = f32[256,32] parameter(1)
  ROOT %dot.1 = f32[64,32] dot(%param.5, %param.6), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}PRECISION
}

ENTRY %main (a: f32[64,256], i: s32[], w: f32[256,32]) -> f32[] {
  %a = f32[64,256] parameter(0)
  %i = s32[] parameter(1)
  %w = f32[256,32] parameter(2)
  %m = bf16[8,256,512] parameter(3)
  %x = bf16[64,256] parameter(4)
BODY
}
"""


def cost_of(body: str, precision: str = "") -> Cost:
    text = PROGRAM.replace("BODY", body).replace("PRECISION", precision)
    return gpu_module_cost(parse_module(text), MESH)


def test_a_fusion_moves_what_it_reads_of_its_arrays_and_writes():
    row = cost_of("  ROOT %f = f32[1,256] fusion(%a, %i), kind=kLoop, calls=%sliced")
    (work,) = row.unestimated
    assert work.bytes == 2 * 256 * 4 + 4  # the row, the result, the index; not all 64 rows
    put = cost_of("  ROOT %f = f32[64,256] fusion(%a, %a, %i), kind=kLoop, calls=%updated")
    (work,) = put.unestimated
    assert work.bytes == 2 * 256 * 4 + 4


@pytest.mark.parametrize(
    ("attribute", "precision"),
    [("", "default"), (", operand_precision={highest,highest}", "highest")],
)
def test_products_run_at_the_rate_of_their_precision(attribute, precision):
    body = "  ROOT %f = f32[64,32] fusion(%a, %w), kind=kCustom, calls=%product"
    cost = cost_of(body, attribute)
    (work,) = cost.unestimated
    assert work.precision == precision and work.flops == cost.matmul_flops == 2 * 64 * 256 * 32
    card = dataclasses.replace(CARDS["h100"], hbm_bandwidth=1e30)
    peak = {"default": card.tf32_flops, "highest": card.float32_flops}[precision]
    assert predict(cost, card).step_seconds == pytest.approx(work.flops / peak)


def test_products_of_cublas_are_counted():
    cost = cost_of(
        '  ROOT %c = (f32[64,32], s8[64]) custom-call(%a, %w), custom_call_target="__cublas$gemm", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
        '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]},'
        '"precision_config":{"operand_precision":["HIGHEST","HIGHEST"]}}}'
    )
    assert cost.products == {"highest": 2 * 64 * 256 * 32}


@pytest.mark.parametrize(
    ("name", "result", "flops"),
    [
        ("expert_product", "bf16[64,512]", 2 * 64 * 256 * 512),
        ("scores", "bf16[64,512]", None),  # of nobody: named as a kernel without estimate
    ],
)
def test_a_pallas_kernel_is_priced_by_its_shapes(name, result, flops):
    cost = cost_of(
        f"  ROOT %k = {result} custom-call(%x, %m), "
        'custom_call_target="__gpu$xla.gpu.triton", '
        f'metadata={{op_name="jit(step)/transpose(jvp({name}))/pallas_call"}}, '
        'backend_config={grid_x = 1 : i32, ir = "ML\\EFR(("}'
    )
    ((kernel, count),) = cost.kernels.items()
    moved = 2 * (64 * 256 + 8 * 256 * 512 + 64 * 512)
    assert (kernel, count) == (Kernel(name, flops, moved, 0.0), 1)
    assert not cost.unestimated


@pytest.mark.parametrize(("kind", "products"), [("", 2), ("Backward", 5)])
def test_cudnn_attention_is_priced_by_its_scores(kind, products):
    cost = cost_of(
        "  %q = bf16[4,128,12,64] bitcast(%x)\n"
        "  ROOT %k = (bf16[4,12,128,64], u8[0]) custom-call(%q, %q, %q), "
        f'custom_call_target="__cudnn$fmhaScaleBiasSoftmax{kind}", '
        "operand_layout_constraints={bf16[4,128,12,64]{3,2,1,0}}"
    )
    (kernel,) = cost.kernels
    assert kernel.flops == 2 * products * 4 * 12 * 128 * 128 * 64
    assert kernel.name == f"cudnn_attention_{'backward' if kind else 'forward'}"


@pytest.mark.parametrize(("dtype", "precision"), [("bf16", "bfloat16"), ("f32", "default")])
def test_our_attention_is_priced_by_its_scores(dtype, precision):
    cost = cost_of(
        f"  %q = {dtype}[4,128,12,64] bitcast(%x)\n"
        f"  %t = s32[4,128] bitcast(%x)\n"
        f"  ROOT %k = {dtype}[4,128,12,64] custom-call(%t, %q, %q, %q), "
        'custom_call_target="__gpu$xla.gpu.triton", '
        'metadata={op_name="jit(step)/transpose(jvp(attention_key_gradient))/pallas_call"}'
    )
    (kernel,) = cost.kernels
    assert kernel.flops == 2 * 4 * 4 * 12 * 128 * 128 * 64 and kernel.precision == precision
    card = dataclasses.replace(CARDS["h100"], hbm_bandwidth=1e30, clock_ghz=1e30)
    assert predict(cost, card).kernels == kernel.flops / card.product_flops(precision)


@pytest.mark.parametrize("between", [True, False])
def test_a_collective_overlaps_with_what_stands_before_its_end(between):
    work = "  %f = f32[64,32] fusion(%a, %w), kind=kCustom, calls=%product\n" if between else ""
    cost = cost_of(
        "  %s = f32[64,256] all-reduce-start(%a), replica_groups={}, to_apply=%sum\n"
        "  %b = f32[64,256] bitcast(%a)\n"
        f"{work}  ROOT %d = f32[64,256] all-reduce-done(%s)"
    )
    (found,) = cost.collectives
    assert found.is_async is between
    assert (found.kind, found.axes, found.bytes) == ("all-reduce", ("data",), 64 * 256 * 4)


def test_collectives_cross_the_switch():
    card, size = CARDS["h100"], 10**9
    gather = Collective("all-gather", size, ("data",), 8, links=1, is_async=False)
    once = size * 7 / 8 / card.link_bandwidth
    assert gather.seconds(card) == pytest.approx(once + 7 * card.link_seconds)
    for kind, seconds in (
        ("all-reduce", 2 * once + 14 * card.link_seconds),
        ("all-to-all", once + card.link_seconds),
        ("collective-permute", size / card.link_bandwidth + card.link_seconds),
    ):
        assert dataclasses.replace(gather, kind=kind).seconds(card) == pytest.approx(seconds)


def test_a_card_takes_the_time_of_its_busiest_unit():
    card, cost = CARDS["l4"], Cost()
    cost.kernels[Kernel("expert_product", card.peak_flops * 1e-3, 1.0, 0.0)] = 2
    cost.unestimated[Unestimated("copy", int(card.hbm_bandwidth * 1e-3), 0.0, 0.0)] = 3
    assert predict(cost, card).step_seconds == pytest.approx(5e-3)


def test_a_kernel_that_wants_too_much_shared_memory_is_a_result():
    found = parse_exhausted(
        "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 131072, available: "
        "101376, context: []"
    )
    assert found.space == "shared memory"
    assert (found.needed, found.available) == (128 * KIB, 99 * KIB)
    assert "tiles" in advice(None, "train", found.space, None)[0]


def test_a_loop_that_the_data_bound_is_named_by_its_source():
    """XLA writes tables of files, functions and stack frames before the computations."""
    body = """  ROOT %l = (s32[], f32[64,256]) while(%start), condition=%c, body=%b, \
metadata={op_name="jit(step)/while" stack_frame_id=2}"""
    text = f"""HloModule jit_step

FileNames
1 "/home/somebody/moe_embed_jax/moe_embed_jax/losses/infonce.py"
2 "/lib/python3.11/site-packages/flax/nnx.py"

FunctionNames
1 "main"
2 "against.<locals>.walk"

FileLocations
1 {{file_name_id=2 function_name_id=1 line=4 end_line=4 column=1 end_column=9}}
2 {{file_name_id=1 function_name_id=2 line=9 end_line=9 column=1 end_column=9}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=1}}


%c (state: (s32[], f32[64,256])) -> pred[] {{
  %state = (s32[], f32[64,256]) parameter(0)
  ROOT %more = pred[] custom-call(%state), custom_call_target="decide"
}}

%b (state.1: (s32[], f32[64,256])) -> (s32[], f32[64,256]) {{
  ROOT %state.1 = (s32[], f32[64,256]) parameter(0)
}}

ENTRY %main (start: (s32[], f32[64,256])) -> (s32[], f32[64,256]) {{
  %start = (s32[], f32[64,256]) parameter(0)
{body}
}}
"""
    cost = gpu_module_cost(parse_module(text), MESH)
    assert cost.unknown_loops == {"losses/infonce.py, walk": 1}
