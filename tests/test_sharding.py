import types

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.forked import run_forked
from jax.sharding import PartitionSpec as P

from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import AXES, MeshConfig, describe, make_mesh
from moe_embed_jax.models.encoder import EncoderConfig, init_params
from moe_embed_jax.sharding import (
    optimizer_shardings,
    path_of,
    rules_for,
    shardings,
    specs,
    with_shardings,
)
from moe_embed_jax.stages.contrastive import Contrastive
from moe_embed_jax.training.optimizer import decay_mask, make_optimizer
from moe_embed_jax.training.run_config import LossConfig, OptimizerConfig
from moe_embed_jax.training.state import abstract_state

MESH = jax.sharding.AbstractMesh((2, 4, 2, 2), AXES)  # parameters and moments: whole in each slice
TREE = {"a": {"kernel": jnp.zeros((4, 6))}, "count": jnp.zeros(())}


@pytest.mark.parametrize(
    ("moe_every", "options"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (0, dict(positions="learned", max_positions=16, token_types=2)),
        (2, dict(expert_bias=True, normalize_gates=True)),
        (2, dict(expert_output_bias=False)),
        (1, dict(shared_expert_width=96)),
    ],
)
def test_the_table_covers_parameters_and_optimiser(moe_every, options):
    config = EncoderConfig(num_layers=2, moe_every=moe_every, **options)
    optimizer = make_optimizer(OptimizerConfig(), 2000)
    state = abstract_state(Contrastive(config, LossConfig(), 4), optimizer, MESH)
    params, adam = spec_of(state.params), state.opt_state[1][0]
    assert params["embeddings/token"] == P("fsdp", None)
    assert spec_of(adam.mu)["embeddings/token"] == P(("fsdp", "data"), None)
    assert spec_of(adam.mu) == spec_of(adam.nu) and adam.count.sharding.spec == P()
    if moe_every:
        w_in = f"groups/block_{moe_every - 1}/moe/w_in"
        assert params[w_in] == P(None, "expert", "fsdp", None)
        assert spec_of(adam.mu)[w_in] == P(None, "expert", ("fsdp", "data"), None)


def spec_of(tree) -> dict:
    """{path: PartitionSpec}, for paths that begin in the encoder."""
    return {
        path_of(path).removeprefix("encoder/"): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def matrices(params) -> dict:
    """What Muon takes: the last two axes; None: Adam takes it."""
    return jax.tree.map(
        lambda leaf: optax.contrib.MuonDimensionNumbers(-2, -1) if leaf.ndim > 2 else None, params
    )


OPTIMIZERS = {
    "adamw": optax.adamw(1e-3, mask=decay_mask),
    "lion": optax.lion(1e-3),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=16),
    "muon": optax.contrib.muon(1e-3, muon_weight_dimension_numbers=matrices),
    "clipped": optax.MultiSteps(optax.chain(optax.clip(1.0), optax.sgd(1e-3, 0.9)), 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_every_optimiser_are_split(name):
    """As large as a parameter: over `data` too. Smaller (Adafactor's rows): replicated."""
    config = EncoderConfig(vocab_size=64, num_layers=2, width=16, num_heads=2, ffn_width=32)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    state = jax.eval_shape(OPTIMIZERS[name].init, params)
    rules = rules_for(config)
    placed = optimizer_shardings(OPTIMIZERS[name], state, params, rules, MESH)
    expected = spec_of(with_shardings(params, shardings(params, rules, MESH, moments=True)))
    shapes = {path_of(p): leaf.shape for p, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    found = dict.fromkeys(expected, 0)
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(with_shardings(state, placed))[0]:
        path = next((path for path in expected if path_of(key_path).endswith(path)), None)
        is_moment = path is not None and leaf.shape == shapes[path]
        assert leaf.sharding.spec == (expected[path] if is_moment else P()), path_of(key_path)
        if is_moment:
            found[path] += 1
    factored = {path for path in shapes if sum(n >= 16 for n in shapes[path]) > 1}
    moments = dict.fromkeys(shapes, {"adamw": 2, "clipped": 2}.get(name, 1))
    if name == "muon":  # Adam, with two moments, takes what is no matrix
        moments = {path: 1 + (len(shapes[path]) < 3) for path in shapes}
    elif name == "adafactor":
        moments = {path: int(path not in factored) for path in shapes}
        assert len(factored) > 4
    assert found == moments


def test_state_that_optax_does_not_know_is_named():
    rules = [(r"kernel$", P("fsdp", None))]
    params = {"a": {"kernel": jnp.zeros((4, 6))}}

    def keeps(make):
        return optax.GradientTransformation(make, lambda grads, state, _: (grads, state))

    hidden = keeps(lambda params: {"leaves": [jnp.zeros_like(p) for p in jax.tree.leaves(params)]})
    fixed = keeps(lambda _: {"buffer": jnp.zeros((4, 6)), "other": jnp.zeros((5, 6))})
    large = keeps(lambda params: jax.tree.map(lambda p: jnp.zeros((p.size, p.size)), params))
    for optimizer, name in (
        (hidden, r"leaves/0 \(4, 6\)"),
        (fixed, r"buffer \(4, 6\)"),
        (large, r"a/kernel \(24, 24\)"),
    ):
        with pytest.raises(UserError, match=rf"optimiser state {name} has no sharding"):
            optimizer_shardings(optimizer, optimizer.init(params), params, rules, MESH)


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
    count = jax.device_count()
    assert make_mesh(MeshConfig()).shape == {"slice": 1, "data": count, "fsdp": 1, "expert": 1}
    assert "slice" not in describe(make_mesh(MeshConfig()))
    for bad in (MeshConfig(data=-1, expert=7), MeshConfig(data=3), MeshConfig(fsdp=0)):
        with pytest.raises(UserError, match="does not fit"):
            make_mesh(bad)


def devices_of(*slices: int):
    """Stand-ins for devices, by the slice that each is in."""
    return [types.SimpleNamespace(slice_index=index) for index in slices]


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (MeshConfig(fsdp=3), devices_of(0, 0, 0, 0, 1, 1, 1, 1), "4 devices of each of 2 slices"),
        (MeshConfig(data=8), devices_of(0, 0, 0, 0, 1, 1, 1, 1), "4 devices of each of 2 slices"),
        (MeshConfig(slice=4), devices_of(0, 0, 1, 1), r"2 \+ 2 devices of 2 slice\(s\): leave"),
        (MeshConfig(slice=1), devices_of(0, 0, 1, 1), "slice=1 does not fit"),
        (MeshConfig(), devices_of(0, 0, 1), r"2 \+ 1 devices of 2 slice\(s\)"),
        (MeshConfig(slice=3), devices_of(0, 0, 0, 0), "slice=3 does not fit 4 devices"),
        (MeshConfig(slice=0), devices_of(0), "slice=0 does not fit"),
    ],
)
def test_slices_that_do_not_fit_are_one_line(config, devices, message):
    with pytest.raises(UserError, match=message) as refused:
        make_mesh(config, devices)
    assert "\n" not in str(refused.value)


def test_devices_of_a_slice_stay_together_in_any_order():
    """On 8 fake devices, half of which stand for a slice."""
    program = """
import jax
from moe_embed_jax.mesh import MeshConfig, describe, make_mesh, local_device_positions

devices = jax.devices()
two = make_mesh(MeshConfig(slice=2, expert=2))
assert describe(two).startswith("slice=2 x data=2 x fsdp=1 x expert=2 on 8"), describe(two)
for part, own in zip(two.devices, (devices[:4], devices[4:]), strict=True):
    alone = make_mesh(MeshConfig(expert=2), own)
    assert (part == alone.devices[0]).all()
assert local_device_positions(two) == list(range(8))

class InSlice:
    "A device that knows its slice: every second one is in the other."
    def __init__(self, device):
        self.slice_index = device.id % 2
        self.of = device
    def __getattr__(self, name):
        return getattr(self.of, name)

mesh = make_mesh(MeshConfig(), [InSlice(device) for device in devices])
assert mesh.shape["slice"] == 2 and mesh.shape["data"] == 4
assert [[d.id for d in part.flat] for part in mesh.devices] == [[0, 2, 4, 6], [1, 3, 5, 7]]
"""
    result = run_forked(["-c", program], devices=8)
    assert result.returncode == 0, result.stderr
