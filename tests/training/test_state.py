"""Checkpoints of the state: what is saved is restored, also in the layout of earlier versions."""

import jax
import numpy as np
import pytest

from moe_embed_jax.checkpoint import Checkpoints
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.stages.contrastive import Contrastive
from moe_embed_jax.stages.masked_lm import MaskedLM
from moe_embed_jax.training.optimizer import make_optimizer
from moe_embed_jax.training.run_config import LossConfig, MaskedLossConfig, OptimizerConfig
from moe_embed_jax.training.state import abstract_state, create_state, restore_state, to_items

# Three layers: a group of two and a tail.
MODEL = EncoderConfig(vocab_size=64, num_layers=3, width=8, num_heads=2, ffn_width=8, num_experts=2)
STAGES = {
    "contrastive": Contrastive(MODEL, LossConfig(learn_temperature=True), 4),
    "masked": MaskedLM(MODEL, MaskedLossConfig(), 60),
}


@pytest.fixture(scope="module", params=STAGES)
def stage(request):
    return STAGES[request.param]


@pytest.fixture(scope="module")
def optimizer():
    return make_optimizer(OptimizerConfig(warmup_steps=1), 10)


@pytest.fixture(scope="module")
def state(stage, optimizer):
    """A state in which no two moments are alike."""
    state = create_state(stage, optimizer, single_device_mesh(), seed=0)
    numbers = iter(range(1, 1000))
    state.opt_state = jax.tree.map(lambda leaf: leaf + next(numbers), state.opt_state)
    return state


def flat(params):
    """A tree of parameters as earlier versions had it."""
    names = {"head": "mlm_head", "log_scale": "log_scale"}
    rest = {names[name]: tree for name, tree in params.items() if name != "encoder"}
    return {**params["encoder"], **rest}


def items_of_the_previous_layout(state, optimizer):
    """Written by the optimiser itself, for flat parameters."""
    items = to_items(state)
    adam = state.opt_state[1][0]
    opt_state = optimizer.init(flat(state.params))
    moments = adam._replace(mu=flat(adam.mu), nu=flat(adam.nu))
    opt_state = (opt_state[0], (moments, *state.opt_state[1][1:]))
    assert jax.tree.structure(opt_state) == jax.tree.structure(optimizer.init(flat(state.params)))
    assert set(moments.mu) >= {"embeddings", "groups", "tail"}
    return items | {"optimizer": items["optimizer"] | {"opt_state": opt_state}}


@pytest.mark.parametrize("previous", [False, True], ids=["this layout", "previous layout"])
def test_a_checkpoint_is_restored_bit_by_bit(stage, state, optimizer, tmp_path, previous):
    items = items_of_the_previous_layout(state, optimizer) if previous else to_items(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {}, **items)
    checkpoints.wait()
    assert any("encoder/" in path for path in checkpoints.shapes(3, "optimizer")) != previous
    abstract = abstract_state(stage, optimizer, single_device_mesh())
    restored = restore_state(checkpoints, abstract, 3)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    checkpoints.close()


def test_a_previous_checkpoint_of_another_model_is_named(optimizer, tmp_path):
    state = create_state(STAGES["masked"], optimizer, single_device_mesh(), seed=0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {}, **items_of_the_previous_layout(state, optimizer))
    checkpoints.wait()
    wider = EncoderConfig(**{**vars(MODEL), "ffn_width": 16})
    stage = MaskedLM(wider, MaskedLossConfig(), 60)
    abstract = abstract_state(stage, optimizer, single_device_mesh())
    with pytest.raises(UserError, match=r"params/groups/.* there and .* in this configuration"):
        restore_state(checkpoints, abstract, 3)
    checkpoints.close()
