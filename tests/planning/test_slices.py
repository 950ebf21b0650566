"""Several TPU slices: what crosses between them in programs compiled for two, and its price."""

import json
import math
import types

import jax
import pytest
from helpers.forked import run_forked
from helpers.tpu_plans import plan, tpu_aot

from moe_embed_jax.errors import UserError
from moe_embed_jax.models.encoder import EncoderConfig, init_params
from moe_embed_jax.planning.chips import CHIPS, DCN_SECONDS
from moe_embed_jax.planning.collectives import Collective, device_groups
from moe_embed_jax.planning.cost import Cost, module_cost
from moe_embed_jax.planning.hlo import parse_module
from moe_embed_jax.planning.roofline import predict
from moe_embed_jax.planning.topology import parse_topology

MEGASCALE = '_xla_host_transfer_handler_name="xla_megascale_runtime"'


def test_a_topology_of_several_slices():
    two, one = parse_topology("2xv5e:4x8"), parse_topology("v5e:4x8")
    assert (two.slices, one.slices) == (2, 1)
    assert two.chip is one.chip and two.sizes == one.sizes == (4, 8)
    assert two.slice_name == one.slice_name == "v5e:4x8"


@pytest.mark.parametrize("name", ["0xv5e:4x4", "2v5e:4x4", "x" + "v5e:4x4", "2xv5e", "2x2xv5e:4x4"])
def test_a_bad_number_of_slices_is_one_line(name):
    with pytest.raises(UserError, match="two slices"):
        parse_topology(name)


TWO_SLICES = types.SimpleNamespace(shape={"slice": 2, "data": 4, "fsdp": 1, "expert": 1})


def transfers(shape: str, kind: str, name: str) -> str:
    """The four instructions of a transfer of %x, as libtpu 0.0.42 writes them."""
    attributes = f'frontend_attributes={{{MEGASCALE},_xla_megascale_transfer_type="{kind}"}}'
    done = f"frontend_attributes={{{MEGASCALE}}}"
    return f"""
  %send.{name} = ({shape}, u32[], token[]) send(%x, %token), channel_id=1, {attributes}
  %recv.{name} = ({shape}, u32[], token[]) recv(%token), channel_id=2, {attributes}
  %send-done.{name} = token[] send-done(%send.{name}), {done}
  %recv-done.{name} = ({shape}, token[]) recv-done(%recv.{name}), {done}
"""


def cost_of(body: str, entry: str) -> Cost:
    """Of a program with a loop of 5 passes over `body`."""
    text = f"""
%condition (state.1: (s32[], f32[4,128])) -> pred[] {{
  %state.1 = (s32[], f32[4,128]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %five), direction=LT
}}

%body (state.2: (s32[], f32[4,128])) -> (s32[], f32[4,128]) {{
  %state.2 = (s32[], f32[4,128]) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.2), index=0
  %x = f32[4,128] get-tuple-element(%state.2), index=1
  %token = token[] after-all()
  %one = s32[] constant(1)
  %next = s32[] add(%i.2, %one)
{body}
  ROOT %state.3 = (s32[], f32[4,128]) tuple(%next, %x)
}}

ENTRY %main (x: f32[4,128]) -> f32[4,128] {{
  %x = f32[4,128] parameter(0)
  %token = token[] after-all()
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,128]) tuple(%zero, %x)
{entry}
  %loop = (s32[], f32[4,128]) while(%start), condition=%condition, body=%body, \
metadata={{op_name="jit(step)/ring/while"}}
  ROOT %result = f32[4,128] get-tuple-element(%loop), index=1
}}
"""
    return module_cost(parse_module(text), TWO_SLICES)


def test_transfers_between_slices_are_collectives_over_their_axis():
    shape, size = "f32[4,128]", 4 * 128 * 4
    kinds = ("ALL_REDUCE", "ALL_GATHER", "REDUCE_SCATTER", "ONE_TO_ONE")
    cost = cost_of("", "".join(transfers(shape, kind, kind) for kind in kinds))
    assert {(c.kind, c.bytes, c.axes, c.group_size, n) for c, n in cost.collectives.items()} == {
        ("all-reduce", size, ("slice",), 2, 1),
        ("all-gather", 2 * size, ("slice",), 2, 1),
        ("reduce-scatter", size, ("slice",), 2, 1),
        ("collective-permute", size, ("slice",), 2, 1),
    }
    assert cost.waits_for_slices == 4 and not cost.slice_loops
    assert [it.opcode for it in cost.unestimated] == ["add"]  # of the loop, not of a transfer


def test_what_is_sent_together_is_waited_for_once():
    lines = [transfers("f32[4,128]", "ALL_REDUCE", name).split("\n")[1:5] for name in "ab"]
    # send a, send b, recv a, recv b, send-done a, send-done b, recv-done a, recv-done b
    woven = "\n".join(line for pair in zip(*lines, strict=True) for line in pair)
    cost = cost_of("", woven)
    assert sum(cost.collectives.values()) == 2 and cost.waits_for_slices == 1


def test_a_transfer_in_a_loop_is_named_and_counts_every_pass():
    cost = cost_of(transfers("f32[4,128]", "ONE_TO_ONE", "a"), "")
    assert cost.slice_loops == {"jit(step)/ring": 5}
    assert sum(cost.collectives.values()) == cost.waits_for_slices == 5


def test_transfers_take_the_network_of_the_hosts_and_a_latency_per_wait():
    chip = CHIPS["v5e"]
    reduce = Collective("all-reduce", 10**9, ("slice",), 2, links=1, is_async=False)
    cost = Cost(waits_for_slices=3)
    cost.collectives[reduce] = 1
    times = predict(cost, chip)
    # Two slices: each sends its array to the other, over 6.4 Tbit/s per pod of 256 chips.
    seconds = 1e9 / (6.4e12 / 8 / 256)
    assert times.between_slices == pytest.approx(seconds + 3 * DCN_SECONDS)
    assert times.step_seconds == times.serial_seconds == pytest.approx(times.between_slices)
    assert times.blocking_collectives == 0
    for kind, passes in (("all-gather", 3 / 4), ("reduce-scatter", 3 / 4), ("all-reduce", 6 / 4)):
        of_four = Collective(kind, 10**9, ("slice",), 4, links=1, is_async=False)
        assert of_four.seconds(chip) == pytest.approx(passes * 1e9 / chip.dcn_bandwidth)


def test_a_permute_whose_pairs_are_all_in_another_slice_is_nothing():
    assert device_groups("source_target_pairs={}, x", 8).tolist() == [[0]]


def test_the_loss_crosses_slices_twice_and_in_no_loop():
    """On 8 fake devices: documents once, their gradients once; only rings inside a slice."""
    program = """
import json
import jax
import jax.numpy as jnp
from moe_embed_jax.losses.contrast import ContrastConfig
from moe_embed_jax.losses.infonce import infonce
from moe_embed_jax.mesh import MeshConfig, batch_sharding, make_mesh
from moe_embed_jax.planning.cost import module_cost
from moe_embed_jax.planning.hlo import parse_module

mesh = make_mesh(MeshConfig(slice=2, expert=2))
placed = batch_sharding(mesh)
shapes = [((32, 16), jnp.float32), ((32, 3, 16), jnp.float32), ((32, 2), jnp.int32)]
shapes.append(((32, 3, 2), jnp.int32))
arguments = [jax.ShapeDtypeStruct(*shape, sharding=placed) for shape in shapes]
loss = lambda *batch: infonce(ContrastConfig(), *batch).loss
with jax.set_mesh(mesh):
    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    cost = module_cost(parse_module(step.lower(*arguments).compile().as_text()), mesh)
found = [[c.kind, c.bytes, c.axes, n] for c, n in cost.collectives.items()]
print(json.dumps([found, cost.slice_loops]))
"""
    result = run_forked(["-c", program], devices=8)
    assert result.returncode == 0, result.stderr
    found, loops = json.loads(result.stdout.splitlines()[-1])
    assert loops == {}
    vectors = 2 * 4 * 3 * 16 * 4  # bytes of those of one device and of its twin in the other slice
    over_slices = [(kind, size, n) for kind, size, axes, n in found if axes == ["slice"]]
    assert sorted(over_slices) == [("all-gather", vectors, 1), ("reduce-scatter", vectors, 1)]
    rings = {tuple(axes) for kind, _, axes, _ in found if kind == "collective-permute"}
    assert rings == {("data", "expert")}


# ---- With the compiler ---------------------------------------------------------------------------


def parameter_bytes(model: EncoderConfig) -> int:
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(shapes))


class TestCompiled:
    pytestmark = tpu_aot

    def crossing(self, tmp_path, *flags):
        """What crosses slices in a step on 2 x v5e:2x2, {kind: [(bytes per device, how often)]},
        and how often the step waits for it. Checks that none of it stands in a loop."""
        command = ("launch/plan.py", "--topology=2xv5e:2x2", "--set=data.dir=no_data", *flags)
        text, found = plan(command, tmp_path / "plan.json")
        assert found["fits"] and found["chips"] == 8 and "between slices" in text
        assert found["transfers_between_slices_in_loops"] == {} and "WARNING" not in text
        between = [c for c in found["collectives"] if "slice" in c["axes"]]
        assert all(c["axes"] == ["slice"] and c["group_size"] == 2 for c in between)
        seconds = found["waits_for_other_slices"] * DCN_SECONDS + sum(c["seconds"] for c in between)
        assert found["seconds_by_kind"]["between slices"] == pytest.approx(seconds)
        sizes = {}
        for c in between:
            sizes.setdefault(c["kind"], []).append((c["bytes"] / c["count"], c["count"]))
        print(sizes)
        return sizes, found["waits_for_other_slices"]

    def test_contrastive_step(self, tmp_path):
        """With fsdp, experts and GradCache inside each slice."""
        model = dict(vocab_size=16_384, width=128, num_heads=4, ffn_width=256, num_layers=2)
        sizes, waits = self.crossing(
            tmp_path,
            "--config=configs/pretrain.py:smoke",
            *(f"--set=model.{key}={value}" for key, value in model.items()),
            *("--set=mesh.fsdp=2", "--set=mesh.expert=2"),
        )
        # No parameter is gathered, and nothing goes round over slices.
        assert set(sizes) == {"all-reduce", "all-gather", "reduce-scatter"}
        # Each device sends its quarter of the gradients of its slice.
        quarter = parameter_bytes(EncoderConfig(**model)) / 4
        assert quarter <= sum(size * n for size, n in sizes["all-reduce"]) < 1.1 * quarter
        vectors = 32 / 4 * 128 * 4  # a quarter of all documents
        assert sizes["reduce-scatter"] == [(vectors, 1)]
        # The documents, and the ids of queries and documents.
        assert (vectors, 1) in sizes["all-gather"]
        assert sum(n for _, n in sizes["all-gather"]) == 3
        assert waits <= 4

    def test_masked_step(self, tmp_path):
        model = dict(vocab_size=16_384, width=128, num_heads=2, ffn_width=256, num_layers=1)
        sizes, waits = self.crossing(
            tmp_path,
            "--config=configs/mlm.py:smoke",
            *(f"--set=model.{key}={value}" for key, value in model.items()),
        )
        assert set(sizes) == {"all-reduce"}
        quarter = parameter_bytes(EncoderConfig(moe_every=0, **model)) / 4
        assert quarter <= sum(size * n for size, n in sizes["all-reduce"]) < 1.1 * quarter
        assert waits <= 2
