"""Training steps that are compiled for GPUs, without one: kernels, loops and memory."""

import pytest
from helpers.gpu_plans import STEPS, TOPOLOGIES, compile_all, gpu_aot

from moe_embed_jax.planning.cards import CARDS

pytestmark = gpu_aot
by_plan = pytest.mark.parametrize("name", [f"{step} {t}" for step in STEPS for t in TOPOLOGIES])


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    return compile_all(tmp_path_factory.mktemp("gpu") / "plans.json")


@by_plan
def test_experts_are_six_kernels_and_nothing_waits_for_the_host(name, plans):
    """Of a layer's experts: two products forward, two backward, two gradients of weights.

    With `model.remat_rows` the first one runs again in the backward pass, and no other.
    """
    found = plans[name]
    forward = 2 if name.startswith("pretrain") else 1
    calls = {kind: n for kind, n in found["kernels"].items() if kind.startswith("expert_")}
    pieces = calls["expert_hidden_gradient"]
    assert calls == {
        "expert_hidden": forward * pieces,
        "expert_product": 2 * pieces,
        "expert_hidden_gradient": pieces,
        "expert_weight_gradient": 2 * pieces,
    }
    assert not found["kernels_without_estimate"]
    # What is left: the loss walks over partners. Nothing of the encoder or its experts does.
    assert {place.split("/")[0] for place in found["loops_of_unknown_trip_count"]} == {"losses"}


@by_plan
def test_sums_of_experts_stay_in_registers(name, plans):
    spilled = plans[name]["spilled"]
    assert len(spilled) == 4
    # In float32 blocks of the inner side take twice the registers.
    assert max(spilled.values()) <= (200 if name.startswith("quickstart") else 32)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_attention_is_cudnns_in_bfloat16(topology, plans):
    kernels = plans[f"pretrain {topology}"]["kernels"]
    assert kernels["cudnn_attention_forward"] == 2 * kernels["cudnn_attention_backward"] > 0
    assert not [name for name in plans[f"quickstart {topology}"]["kernels"] if "cudnn" in name]


@by_plan
def test_the_step_fits_and_does_the_models_work(name, plans):
    found = plans[name]
    assert found["fits"] and found["hbm_capacity_bytes"] == CARDS[name.split()[1][:-2]].hbm_bytes
    assert 1.0 < found["compiled_flops_per_chip"] / found["model_flops_per_chip"] < 2.0
    assert found["is_lower_bound"] and 0 < found["predicted_mfu"] < 1


@pytest.mark.parametrize("step", STEPS)
def test_a_faster_card_is_predicted_to_be_faster(step, plans):
    seconds = [plans[f"{step} {t}"]["predicted_step_seconds"] for t in TOPOLOGIES]
    assert seconds == sorted(seconds)
