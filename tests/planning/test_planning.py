"""The planner: flags, predictions and, with the TPU compiler, whole plans.

The golden plan is renewed, after a change that should change it, by the command that a failure
prints, once in each environment of GOLDEN; another libtpu gets a file of its own there.
"""

import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import math
import pathlib
import types

import pytest
from conftest import ROOT, run_python
from helpers.tpu_plans import plan, tpu_aot
from rich.console import Console

from moe_embed_jax import config as config_files
from moe_embed_jax.data.data_config import DataConfig
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import MeshConfig
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.planning import search, topology
from moe_embed_jax.planning.chips import CHIPS, HOP_SECONDS
from moe_embed_jax.planning.collectives import Collective
from moe_embed_jax.planning.cost import Cost, Kernel, Unestimated
from moe_embed_jax.planning.memory import advice
from moe_embed_jax.planning.request import PLANNED_CONFIGS
from moe_embed_jax.planning.roofline import predict
from moe_embed_jax.stages.contrastive import Contrastive
from moe_embed_jax.stages.masked_lm import MaskedLM
from moe_embed_jax.training.overview import training_flops_per_token

# By the libtpu that compiled it: one version gives the same program again.
GOLDEN = {
    "0.0.42.1": pathlib.Path("tests/golden/plan_v5e_2x2.json"),
    "0.0.50.1": pathlib.Path("tests/golden/plan_v5e_2x2_python3.12.json"),
}
SMALL = (
    "launch/plan.py",
    "--config=configs/pretrain.py:smoke",
    "--topology=v5e:2x2",
    "--set=model.num_layers=2",
    "--set=model.moe_every=0",
    "--set=data.dir=no_data",
)
GOLDEN_COMMAND = (*SMALL, "--set=mesh.fsdp=2")
ONE_WIDE_LAYER = dict(width=768, num_heads=12, num_layers=1, moe_every=1)


@pytest.fixture
def run():
    return PLANNED_CONFIGS["contrastive"](data=DataConfig(dir="no_data"))


# ---- Without the compiler ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v5e", "v5e:4by4", "v9:2x2", "v5e:0x4", "v5e:2x2x1", "v5p:2x2"])
def test_a_bad_topology_is_one_line_that_shows_a_good_one(name):
    with pytest.raises(UserError, match=r"v5[ep]:"):
        topology.parse_topology(name)


def test_without_the_compiler_the_message_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"\[plan\]"):
        topology.topology_devices("v5e:2x2")


def test_set_is_config(capsys):
    result = run_python([*SMALL, "--set", "model.widht=3"])
    assert result.returncode == 2
    assert "did you mean model.width?" in result.stderr


def test_a_run_is_planned_without_its_vocabulary():
    config = config_files.load(PLANNED_CONFIGS, str(ROOT / "configs/pretrain.py"), {})
    assert config.data.vocabulary.path


def test_fine_tuning_is_planned_without_its_model_and_pairs():
    config = config_files.load(
        PLANNED_CONFIGS, str(ROOT / "configs/finetune.py"), {"data.dir": "none"}
    )
    load = Contrastive.workload(config, types.SimpleNamespace(size=8), 12, 90)
    assert load.tokens == 256 * (12 + 11 * 90)
    assert (load.chunks, load.rows) == (1, -(-32 * 1002 * 10 // (9 * 512)))


def test_rows_follow_from_assumed_lengths(run):
    load = Contrastive.workload(run, types.SimpleNamespace(size=16), 12, 84)
    assert load.tokens == 16_384 * 96
    assert (load.chunks, load.rows) == (1, -(-1024 * 96 * 10 // (9 * 256)))
    assert "assumed" in load.note
    chunked = dataclasses.replace(run, data=dataclasses.replace(run.data, chunk_rows=64))
    load = Contrastive.workload(chunked, types.SimpleNamespace(size=16), 12, 84)
    assert load.chunks * load.rows >= 427 and load.rows <= 64


def test_a_batch_that_the_chips_do_not_divide_is_refused(run):
    with pytest.raises(UserError, match="multiple of 24"):
        Contrastive.workload(run, types.SimpleNamespace(size=24), 12, 84)


def test_masked_rows_are_those_of_the_page():
    config = config_files.load(PLANNED_CONFIGS, str(ROOT / "configs/mlm.py"), {})
    load = MaskedLM.workload(config, types.SimpleNamespace(size=64), 12, 90)
    assert (load.chunks, load.rows) == (4, 16)
    assert load.tokens == pytest.approx(0.97 * 4096 * 2048)
    with pytest.raises(UserError, match="multiple of 24"):
        MaskedLM.workload(config, types.SimpleNamespace(size=24), 12, 90)
    # Settings of a search are in rows of 256 tokens.
    found = [setting(candidate) for candidate in search.setting_candidates(config)]
    assert found[:3] == [(4, 4), (32, 8), (0, 8)]
    assert "predictions_at_once=1024" in " ".join(advice(config, "train", "hbm", "temporaries"))


def test_collectives_take_the_time_of_a_ring():
    chip = CHIPS["v5e"]
    gather = Collective("all-gather", 10**9, ("data",), 4, links=1, is_async=False)
    assert gather.seconds(chip) == pytest.approx(0.75e9 / 50e9 + 3 * HOP_SECONDS)
    reduce = dataclasses.replace(gather, kind="all-reduce")
    assert reduce.seconds(chip) == pytest.approx(2 * gather.seconds(chip))
    alone = dataclasses.replace(gather, group_size=1)
    assert alone.seconds(chip) == 0


def test_a_step_is_its_parts_and_hides_only_what_overlaps():
    chip = CHIPS["v5e"]
    cost = Cost(cycles=chip.clock_hz * 1e-3)
    cost.kernels[Kernel("gmm", chip.peak_flops * chip.kernel_share * 1e-3, 0.0, 0.0)] = 2
    cost.unestimated[Unestimated("gather", int(chip.hbm_bandwidth * 1e-3), 0.0, 0.0)] = 1
    blocking = Collective("collective-permute", int(50e6), ("data",), 4, 1, is_async=False)
    cost.collectives[blocking] = 1
    cost.collectives[dataclasses.replace(blocking, is_async=True)] = 1
    times = predict(cost, chip)
    hop = HOP_SECONDS
    assert times.step_seconds == pytest.approx(4e-3 + 1e-3 + hop)
    assert times.serial_seconds == pytest.approx(4e-3 + 2e-3 + 2 * hop)
    cost.collectives[dataclasses.replace(blocking, is_async=True)] = 10
    assert predict(cost, chip).step_seconds == pytest.approx(10e-3 + 1e-3 + 11 * hop)


def test_advice_starts_with_what_dominates(run):
    assert "remat_rows" in advice(run, "train", "hbm", "temporaries")[0]
    assert "fsdp" in advice(run, "train", "hbm", "optimiser state")[0]
    assert "tiles" in advice(run, "train", "vmem", None)[0]


def test_search_skips_what_cannot_fit_and_goes_on_from_its_cache(run, monkeypatch, tmp_path):
    compiled = []

    def plan_of(config):
        compiled.append(config)
        if config.mesh.expert == 4:
            raise UserError("axis 1 is not divisible")
        fits = 0 < config.model.remat_rows <= 128
        seconds = 1.0 / config.model.remat_rows + 0.1 * config.mesh.fsdp if fits else None
        return dict(
            fits=fits,
            rows=1000,
            hbm_bytes_per_chip=None,
            predicted_step_seconds=seconds,
            predicted_mfu=0.5 if fits else None,
        )

    monkeypatch.setattr(search, "to_json", lambda plan: plan)
    text = io.StringIO()
    cache = tmp_path / "cache.json"
    arguments = (run, 4, plan_of, {"topology": "v5e:2x2"}, cache, Console(file=text, width=120))
    best, found = search.search(*arguments)
    assert (best.mesh, setting(best)) == (MeshConfig(-1, 1, 1), (0, 128))
    assert found["fits"]
    assert {c.mesh for c in compiled[:4]} == {c.mesh for c in search.mesh_candidates(run, 4)}
    # 256 does not fit: what surely needs more is skipped.
    assert [setting(c) for c in compiled[4:]] == [(256, 64), (0, 64), (0, 128), (0, 256)]
    assert "skipped" in text.getvalue() and "not divisible" in text.getvalue()
    before = len(compiled)
    again, found = search.search(*arguments)
    assert again == best and found is None and len(compiled) == before

    whole = cache.read_text()
    key = next(iter(json.loads(whole)))
    for damaged in (whole[:-9], "[" * 100_000, "[]", json.dumps(json.loads(whole) | {key: 1})):
        cache.write_text(damaged)
        with pytest.raises(UserError, match=r"cache\.json") as refused:
            search.search(*arguments)
        assert len(str(refused.value).splitlines()) == 1


def setting(config) -> tuple[int, int]:
    return config.data.chunk_rows, config.model.remat_rows


def test_search_does_not_enlarge_what_has_no_more_rows(run, monkeypatch):
    compiled = []

    def plan_of(config):
        compiled.append(setting(config))
        return dict(
            fits=True,
            rows=100,
            hbm_bytes_per_chip=1,
            predicted_step_seconds=1.0 / (1 + len(compiled)),
            predicted_mfu=0.5,
        )

    monkeypatch.setattr(search, "to_json", lambda plan: plan)
    text = io.StringIO()
    dense = dataclasses.replace(run, model=EncoderConfig(moe_every=0))
    best, found = search.search(dense, 1, plan_of, {}, None, Console(file=text, width=120))
    assert setting(best) == (0, 0) and found["rows"] == 100
    assert compiled == [(32, 32), (256, 64), (0, 128), (0, 0)]
    assert "no more rows" in text.getvalue()


def test_candidates_divide_the_chips_and_the_experts(run):
    meshes = {c.mesh for c in search.mesh_candidates(run, 4)}
    assert meshes == {MeshConfig(-1, f, e) for f, e in [(1, 1), (1, 2), (1, 4), (4, 1)]}
    six = dataclasses.replace(run, model=EncoderConfig(num_experts=6))
    assert {c.mesh.expert for c in search.mesh_candidates(six, 8)} == {1, 2}
    dense = dataclasses.replace(run, model=EncoderConfig(moe_every=0))
    assert {c.mesh.expert for c in search.mesh_candidates(dense, 4)} == {1}


# ---- With the compiler ---------------------------------------------------------------------------


class TestCompiled:
    pytestmark = tpu_aot

    def test_the_golden_plan(self, tmp_path):
        text, found = plan(GOLDEN_COMMAND, tmp_path / "plan.json")
        compiler = importlib.metadata.version("libtpu")
        path = GOLDEN.get(compiler, GOLDEN["0.0.50.1"])
        golden = json.loads((ROOT / path).read_text())
        renew = f"renew: python {' '.join(GOLDEN_COMMAND)} --output={path}"
        assert found["fits"] and "predicted" in text, text
        for key, of_another_compiler in (
            ("model_flops_per_chip", 1e-6),
            ("compiled_flops_per_chip", 0.01),
            ("hbm_bytes_per_chip", 0.1),
            ("hbm_capacity_bytes", 0),
            ("predicted_step_seconds", 0.25),
            ("predicted_step_seconds_without_overlap", 0.25),
            ("predicted_mfu", 0.25),
        ):
            tolerance = 1e-6 if compiler in GOLDEN else of_another_compiler
            assert found[key] == pytest.approx(golden[key], rel=tolerance), f"{key}; {renew}"
        if compiler in GOLDEN:  # every collective, its bytes, times and overlap
            assert found["collectives"] == golden["collectives"], renew
        kinds = [
            {(c["kind"], tuple(c["axes"])) for c in plan["collectives"]} for plan in (found, golden)
        ]
        assert kinds[0] == kinds[1], renew

    @pytest.mark.parametrize(
        ("topology", "dtype"), [("v5e:2x2", "bfloat16"), ("v6e:2x2", "float32")]
    )
    def test_the_kernels_of_a_training_step_compile(self, topology, dtype, tmp_path):
        """Shapes that all kernels take, in pieces: attention, norms, dense layers and experts."""
        changes = dict(vocab_size=2048, width=128, ffn_width=256, num_layers=2)
        changes |= dict(remat_rows=2, dtype=dtype)
        _, found = plan(
            (
                *("launch/plan.py", "--config=configs/pretrain.py:smoke", f"--topology={topology}"),
                *(f"--set=model.{key}={value}" for key, value in changes.items()),
                *("--set=batch_size=8", "--set=data.row_length=128", "--set=data.dir=no_data"),
            ),
            tmp_path / "plan.json",
        )
        assert found["fits"] and not found["kernels_without_estimate"]
        assert found["pallas_flops_per_chip"] > 0.5 * found["model_flops_per_chip"]

    @pytest.mark.parametrize(
        ("topology", "dtype", "length"),
        [
            ("v5e:2x2", "bfloat16", 2048),
            pytest.param("v6e:2x2", "float32", 1024, marks=pytest.mark.slow),
            pytest.param("v4:2x2x1", "bfloat16", 2048, marks=pytest.mark.slow),
        ],
    )
    def test_masked_language_modelling(self, topology, dtype, length, tmp_path):
        """Its own step: the model's FLOPs are the encoder's and those of the predictions; rows
        are long enough for the kernel of blocks."""
        command = (
            "launch/plan.py",
            "--config=configs/mlm.py:smoke",
            f"--topology={topology}",
            f"--set=model.dtype={dtype}",
            "--set=model.num_layers=1",
            f"--set=data.row_length={length}",
            "--set=model.width=128",
            "--set=model.num_heads=2",
            "--set=data.chunk_rows=0",
        )
        text, found = plan(command, tmp_path / "plan.json")
        assert found["fits"] and "predictions" in text
        assert not found["kernels_without_estimate"]
        width, ffn_width, rows = 128, 64, 8
        layer = 4 * width**2 + 2 * width * ffn_width
        predictions = rows * math.ceil(0.3 * length)
        encoder = 6 * layer * rows * length / 4
        expected = encoder + 6 * width * (width + 16_384) * predictions / 4
        assert found["model_flops_per_chip"] == pytest.approx(expected, rel=0.02)
        # Scores of two heads: in the kernel forward, forward again (remat) and backward.
        attention = (2 + 2 + 5) * 2 * (rows // 4) * 2 * length**2 * 128
        # Logits, computed twice, take four products; predictions fill blocks that fit the VMEM.
        block = 512 if topology.startswith("v4") else 1024
        at_once = block * math.ceil(predictions / 4 / block)
        logits = 4 * 2 * at_once * 16_384 * width
        others = found["compiled_flops_per_chip"] - attention - logits
        # One more forward pass of the block, but for the last product, whose sum is saved.
        again = encoder / 3 - 2 * width * ffn_width * rows * length / 4
        hidden = 6 * width**2 * predictions / 4
        assert 1 < (others - again) / (encoder + hidden) < 1.1

    @pytest.mark.parametrize(
        ("topology", "shape"),
        [
            ("v5e:2x2", dict(width=128, num_heads=4, num_layers=2)),
            # As wide as the released model: its rows take most of a kernel's memory.
            pytest.param("v5p:2x2x1", ONE_WIDE_LAYER, marks=pytest.mark.slow),
            pytest.param("v4:2x2x1", ONE_WIDE_LAYER, marks=pytest.mark.slow),
        ],
    )
    def test_fine_tuning_compiles_with_its_negatives_in_rows_of_512(
        self, topology, shape, tmp_path
    ):
        changes = shape | dict(vocab_size=2048, ffn_width=256, remat_rows=2)
        text, found = plan(
            (
                *("launch/plan.py", "--config=configs/finetune.py:smoke", f"--topology={topology}"),
                *(f"--set=model.{key}={value}" for key, value in changes.items()),
                *("--set=batch_size=4", "--set=data.row_length=512"),
                *("--set=data.negatives=10", "--set=data.dir=no_data"),
            ),
            tmp_path / "plan.json",
        )
        assert found["fits"] and not found["kernels_without_estimate"]
        assert "rows of 512 slots" in text
        # A pair has 12 texts: what is computed are their rows, not those of two.
        config = EncoderConfig(**changes)
        rows = -(-(12 + 11 * 90) * 10 // (9 * 512))
        assert found["model_flops_per_chip"] == pytest.approx(
            training_flops_per_token(config) * rows * 512
        )

    def test_encoding_has_no_optimiser_and_a_third_of_the_work(self, tmp_path):
        picture = tmp_path / "plan.png"
        command = (*SMALL, "--step=encode", f"--picture={picture}")
        _, found = plan(command, tmp_path / "plan.json")
        assert found["fits"]
        assert "optimiser state" not in found["hbm_bytes_by_kind"]
        assert 1.0 <= found["compiled_flops_per_chip"] / found["model_flops_per_chip"] < 2.5
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_out_of_memory_is_a_result_with_advice(self, tmp_path):
        command = (*SMALL, "--step=knn", "--documents=1000000000")
        text, found = plan(command, tmp_path / "plan.json")
        assert found["fits"] is False
        assert found["hbm_bytes_per_chip"] > found["hbm_capacity_bytes"]
        assert found["advice"] and "to make it fit" in text

    def test_searching_a_million_documents_costs_what_the_formula_says(self, tmp_path):
        command = (*SMALL, "--step=knn", "--documents=1000000", "--set=model.width=128")
        _, found = plan(command, tmp_path / "plan.json")
        formula = 2 * 1024 * 1_000_000 * 128 / 4
        assert found["model_flops_per_chip"] == formula
        # The compiler's HLO has one product per float32 dot; the last block is partly padding.
        assert formula <= found["compiled_flops_per_chip"] < 1.1 * formula
