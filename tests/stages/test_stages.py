"""A stage is one file: the smallest one is trained here. Few modules know that there are two."""

import dataclasses
import re

import jax.numpy as jnp
import test_step
from conftest import ROOT

from moe_embed_jax.data.batches import PairBatch
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.sharding import rules_for
from moe_embed_jax.stages.contrastive import encode_batch
from moe_embed_jax.training.state import create_state
from moe_embed_jax.training.step import jit_train_step


@dataclasses.dataclass(frozen=True)
class ToOnePoint:
    """Draws all queries to a learned point: what `train_step` needs of a stage, and no more."""

    Batch = PairBatch
    model: EncoderConfig
    texts_per_row: int

    @property
    def rules(self):
        return rules_for(self.model)

    def extra_params(self, key):
        return {"log_scale": jnp.zeros(())}

    def clip(self, params):
        return params | {"log_scale": jnp.clip(params["log_scale"], 0.0, 1.0)}

    def loss_and_metrics(self, params, batch):
        query_BD, _, _ = encode_batch(self, params, batch)
        loss = jnp.mean((query_BD - params["log_scale"]) ** 2)
        return loss, {"loss": loss}


def test_the_step_trains_any_stage():
    stage = ToOnePoint(dataclasses.replace(test_step.MODEL, moe_every=0), test_step.SLOTS)
    mesh, optimizer = single_device_mesh(), test_step.make_optimizer_of_tests()
    step = jit_train_step(stage, optimizer, mesh)
    state = create_state(stage, optimizer, mesh, seed=0)
    losses = []
    for _ in range(4):
        state, metrics = step(state, test_step.make_batch())
        losses.append(float(metrics["loss"]))
        assert 0 <= state.params["log_scale"] <= 1
    assert losses[-1] < losses[0] and int(state.step) == 4


def test_few_modules_know_that_there_are_several_objectives():
    """Configs, the registry, and model folders, whose cards are older than the package."""
    masked = r"MASKED_LM|MaskedRunConfig|MaskedLM\b|stages\.masked_lm|[\"']masked_lm[\"']"
    package = ROOT / "moe_embed_jax"
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(masked, path.read_text())
    }
    assert found - {"stages/masked_lm.py"} == {
        "losses/__init__.py",  # the name
        "model_folder.py",
        "stages/registry.py",
        "training/run_config.py",
    }
