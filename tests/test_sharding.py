import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import MeshConfig, make_mesh, single_device_mesh
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.sharding import rules_for, shardings, specs
from moe_embed_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_embed_jax.training.state import abstract_state
from moe_embed_jax.training.step import LossConfig, StepConfig

TREE = {"a": {"kernel": jnp.zeros((4, 6))}, "count": jnp.zeros(())}


@pytest.mark.parametrize(
    ("moe_every", "options"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (0, dict(positions="learned", max_positions=16, token_types=2)),
        (2, dict(expert_bias=True, normalize_gates=True)),
    ],
)
def test_the_table_covers_parameters_and_optimiser(moe_every, options):
    config = EncoderConfig(num_layers=2, moe_every=moe_every, **options)
    optimizer = make_optimizer(OptimizerConfig(), 2000)
    state = abstract_state(StepConfig(config, LossConfig(), 4), optimizer, single_device_mesh())
    placed = specs(state, rules_for(config))
    adam = placed.opt_state[1][0]
    assert jax.tree.leaves(adam.mu) == jax.tree.leaves(placed.params)  # moments lie like parameters
    assert placed.params["embeddings"]["token"] == P("fsdp", None)
    if moe_every:
        moe = placed.params["groups"][f"block_{moe_every - 1}"]["moe"]
        assert moe["w_in"] == P(None, "expert", "fsdp", None)


def test_unmatched_parameter_is_named():
    with pytest.raises(UserError, match=r"parameter a/kernel \(4, 6\) matches no sharding rule"):
        specs(TREE, [(r"b/kernel$", P())])


def test_unused_rule_is_named():
    with pytest.raises(UserError, match="that no parameter uses: b/kernel"):
        specs(TREE, [(r"a/kernel$", P()), (r"b/kernel", P())])


def test_first_rule_wins():
    rules = [(r"a/kernel$", P("fsdp")), (r"kernel$", P())]
    with pytest.raises(UserError, match="that no parameter uses"):
        specs(TREE, rules)
    tree = TREE | {"c": {"kernel": jnp.zeros(3)}}
    assert specs(tree, rules)["a"]["kernel"] == P("fsdp")


def test_indivisible_axis_is_named():
    mesh = types.SimpleNamespace(shape={"fsdp": 5})
    with pytest.raises(UserError, match=r"axis 0 of a/kernel \(4, 6\) is not divisible .* fsdp=5"):
        shardings(TREE, [(r"a/kernel$", P("fsdp", None))], mesh)


def test_mesh_sizes():
    assert make_mesh(MeshConfig()).shape == {"data": jax.device_count(), "fsdp": 1, "expert": 1}
    for bad in (MeshConfig(data=-1, expert=7), MeshConfig(data=3), MeshConfig(fsdp=0)):
        with pytest.raises(UserError, match="does not fit"):
            make_mesh(bad)
