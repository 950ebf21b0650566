"""Every routing back end against the dense oracle: values and all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.other_devices import device_named
from helpers.swiglu_expert import SWIGLU_MLP, swiglu_mlp, swiglu_weights

from moe_embed_jax.errors import UserError
from moe_embed_jax.kernels import experts as expert_kernels
from moe_embed_jax.kernels import triton_experts
from moe_embed_jax.models.encoder_config import BACKENDS
from moe_embed_jax.models.feed_forward import gelu
from moe_embed_jax.models.moe import GELU_MLP, gelu_mlp
from moe_embed_jax.routing import ragged as ragged_module
from moe_embed_jax.routing.blocked import blocked
from moe_embed_jax.routing.capacity import capacity, cell_size, fill_cells
from moe_embed_jax.routing.exchange import Experts
from moe_embed_jax.routing.reference import reference
from moe_embed_jax.routing.router import route

WIDTH, FFN = 16, 24
ORACLE = functools.partial(reference, gelu_mlp)


@functools.cache
def layer(backend: str, mlp=GELU_MLP):
    """The back end, with cells that hold everything where it has cells."""
    return Experts(backend, "ring", capacity_factor=8.0).layer(mlp)


def make_case(tokens, experts, top_k, seed=0, choose=None, bias=False):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    expert = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    if choose is not None:
        expert = choose(expert)
    return (
        normal(tokens, WIDTH),
        jnp.asarray(expert, jnp.int32),
        jnp.asarray(rng.uniform(0.1, 1, (tokens, top_k)), jnp.float32),
        {
            "w_in": normal(experts, WIDTH, FFN) / WIDTH**0.5,
            "bias_in": normal(experts, FFN) if bias else None,
            "w_out": normal(experts, FFN, WIDTH) / FFN**0.5,
        },
    )


@functools.cache
def program(layer):
    """(x, expert, gate, weights) -> result, number of dropped assignments, all gradients."""

    def scalar(x, gate, weights, expert):
        target = jnp.asarray(np.random.default_rng(9).normal(size=x.shape), jnp.float32)
        y, dropped = layer(x, expert, gate, weights)
        return jnp.sum(y * target), (y, dropped)

    grad = jax.jit(jax.grad(scalar, argnums=(0, 1, 2), has_aux=True))
    return lambda x, expert, gate, weights: grad(x, gate, weights, expert)


def gradients(layer, case):
    (dx, dgate, dweights), (y, dropped) = program(layer)(*case)
    dweights = {name: leaf for name, leaf in dweights.items() if leaf is not None}
    return {"y": y, "dropped": dropped, "x": dx, "gate": dgate, **dweights}


def assert_equal(actual, expected):
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, atol=2e-5, rtol=1e-5, err_msg=key)


SMALL = dict(tokens=90, experts=8, top_k=2, bias=True)  # one program for many cases
CASES = {
    "plain": dict(tokens=300, experts=8, top_k=2),
    "top_1": dict(tokens=100, experts=4, top_k=1),
    "bias": SMALL,
    "padding": dict(choose=lambda e: np.where(np.arange(90)[:, None] % 3, e, 8), **SMALL),
    "only_padding": dict(choose=lambda e: np.full_like(e, 8), **SMALL),
    "all_to_two_experts": dict(choose=lambda e: np.tile([[5, 2]], (len(e), 1)), **SMALL),
    "top_4_of_64": dict(tokens=70, experts=64, top_k=4),
    "top_4_of_8": dict(tokens=90, experts=8, top_k=4, bias=True),
    "one_token": dict(tokens=1, experts=8, top_k=2),
    "not_a_multiple_of_the_block": dict(tokens=257, experts=3, top_k=1),
    "more_than_a_tile": dict(tokens=300, experts=3, top_k=2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend, name):
    case = make_case(**CASES[name])
    assert_equal(gradients(layer(backend), case), gradients(ORACLE, case))


@pytest.mark.parametrize("backend", ["blocked", "capacity"])
def test_one_token_in_bfloat16(backend):
    """XLA may not be asked for arrays of one row in an order of axes that it does not have."""
    x, *others = make_case(**CASES["one_token"])
    case = x.astype(jnp.bfloat16), *others
    found, expected = gradients(layer(backend), case), gradients(ORACLE, case)
    for name in ("y", "x", "w_in", "w_out"):
        error = np.asarray(found[name] - expected[name], np.float32)
        assert np.linalg.norm(error) < 2.0**-7 * np.linalg.norm(expected[name].astype(np.float32))


@pytest.mark.parametrize("name", ["plain", "one_token", "padding", "only_padding"])
@pytest.mark.parametrize("backend", ["blocked", "capacity"])
def test_another_expert_mlp_is_one_function(backend, name):
    case = make_case(**CASES[name])
    weights = swiglu_weights(CASES[name]["experts"], WIDTH, FFN)
    case = (*case[:3], weights)
    expected = gradients(functools.partial(reference, swiglu_mlp), case)
    assert expected.keys() > weights.keys()
    assert_equal(gradients(layer(backend, SWIGLU_MLP), case), expected)


@pytest.mark.parametrize("backend", ["grouped", "ragged"])
def test_an_expert_mlp_without_a_kernel_is_refused(backend):
    with pytest.raises(UserError, match=f"model.expert_backend='{backend}': .* choose 'blocked'"):
        layer(backend, SWIGLU_MLP)


@pytest.mark.parametrize("tokens", [300, 4096])
def test_weight_gradients_in_bfloat16_are_summed_in_float32(tokens):
    """They are sums over tokens: the error to float64 is that of one rounding, however many blocks
    or tokens there are. Summed in bfloat16, 4,096 tokens give 0.0050 to 0.0110."""
    x, expert, gate, weights = make_case(tokens, 4, 2, bias=True)
    x, weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (x, weights))
    target = np.random.default_rng(9).normal(size=x.shape).astype(jnp.bfloat16)

    def weight_gradients(layer, dtype, precise):
        def scalar(weights):
            y, _ = layer(x.astype(dtype), expert, gate.astype(precise), weights)
            return jnp.sum(y.astype(precise) * target.astype(precise))

        grads = jax.jit(jax.grad(scalar))(jax.tree.map(lambda w: w.astype(dtype), weights))
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), grads)

    with jax.enable_x64():
        oracle = weight_gradients(ORACLE, jnp.float64, jnp.float64)
    for backend in BACKENDS:
        found = weight_gradients(layer(backend), jnp.bfloat16, jnp.float32)
        for name, expected in oracle.items():
            error = np.linalg.norm(found[name] - expected) / np.linalg.norm(expected)
            assert error < 0.0045, (backend, name, error)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_all_gradients_in_bfloat16(backend):
    """Of a loss that needs the results, too: a processor may lack one of the products."""
    x, expert, gate, weights = make_case(64, 4, 2, bias=True)
    x, weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (x, weights))

    def gradients(layer, dtype):
        def scalar(x, weights):
            return jnp.sum(layer(x, expert, gate, weights)[0].astype(jnp.float32) ** 2)

        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), (x, weights))
        return jax.tree.leaves(jax.jit(jax.grad(scalar, argnums=(0, 1)))(*cast))

    both = gradients(layer(backend), jnp.bfloat16), gradients(ORACLE, jnp.float32)
    for found, expected in zip(*both, strict=True):
        error = np.linalg.norm(np.float32(found) - expected) / np.linalg.norm(expected)
        assert error < 0.02


def test_reference_is_the_formula():
    case = make_case(5, 4, 2, bias=True)
    x, expert, gate, weights = jax.tree.map(np.asarray, case)
    w_in, bias_in, w_out = (weights[name] for name in ("w_in", "bias_in", "w_out"))
    expected = np.zeros_like(x)
    for t in range(5):
        for k in range(2):
            e = expert[t, k]
            hidden = np.asarray(gelu(jnp.asarray(x[t] @ w_in[e] + bias_in[e])))
            expected[t] += gate[t, k] * (hidden @ w_out[e])
    actual, _ = ORACLE(*case)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["blocked", "grouped", "ragged"])
def test_empty_expert_gets_exactly_zero_gradient(backend):
    case = make_case(100, 4, 1, choose=lambda e: np.where(e == 3, 0, e))
    result = gradients(layer(backend), case)
    assert not np.asarray(result["w_in"][3]).any()
    assert not np.asarray(result["w_out"][3]).any()


@pytest.mark.parametrize(
    ("backend", "limit"), [("grouped", 1), ("grouped", 2**30), ("ragged", 2**30)]
)
def test_parts_of_the_hidden_layer_and_empty_tiles_do_not_matter(backend, limit, monkeypatch):
    """What is cut: for TPUs where an expert's matrices do not fit fast memory."""
    rng = np.random.default_rng(0)
    case = make_case(300, 8, 2, choose=lambda e: np.where(e > 5, 8, e))
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 16, jnp.float32)  # noqa: E731
    weights = {"w_in": draw(8, WIDTH, 384), "bias_in": draw(8, 384), "w_out": draw(8, 384, WIDTH)}
    case = (*case[:3], weights)
    expected = gradients(ORACLE, case)
    monkeypatch.setattr(expert_kernels, "vmem_limit_bytes", lambda: limit)
    program.cache_clear()
    assert_equal(gradients(layer(backend), case), expected)


@pytest.mark.parametrize("of_card", [triton_experts.A100, triton_experts.H100])
def test_blocks_of_every_card_give_the_same(of_card, monkeypatch):
    case = make_case(**CASES["more_than_a_tile"])
    monkeypatch.setattr(triton_experts, "blocks", lambda: of_card)
    monkeypatch.setattr(ragged_module, "blocks", lambda: of_card)
    program.cache_clear()
    assert_equal(gradients(layer("ragged"), case), gradients(ORACLE, case))


@pytest.mark.parametrize(
    ("platform", "kind", "mlp", "chosen"),
    [
        ("cpu", "cpu", GELU_MLP, "blocked"),
        ("tpu", "TPU v5 lite", GELU_MLP, "grouped"),
        ("tpu", "TPU v5 lite", SWIGLU_MLP, "blocked"),
        ("gpu", "NVIDIA H100 80GB HBM3", GELU_MLP, "ragged"),
        ("gpu", "NVIDIA A100-SXM4-80GB", GELU_MLP, "ragged"),
        ("gpu", "NVIDIA L4", GELU_MLP, "ragged"),
        ("gpu", "NVIDIA L4", SWIGLU_MLP, "reference"),
        ("gpu", "Tesla T4", GELU_MLP, "reference"),
        ("gpu", "AMD Instinct MI300X", GELU_MLP, "reference"),
    ],
)
def test_auto_is_the_fastest_back_end_that_drops_nothing(platform, kind, mlp, chosen):
    with device_named(platform, kind):
        assert Experts("auto", "ring", 1.0).layer(mlp).func.__name__ == chosen


def test_ragged_is_refused_on_a_gpu_without_triton():
    with device_named("gpu", "Tesla T4"), pytest.raises(UserError, match="NVIDIA GPUs of compute"):
        Experts("ragged", "ring", 1.0).layer(GELU_MLP)


@pytest.mark.parametrize("block", [8, 64])
def test_block_size_does_not_matter(block):
    case = make_case(100, 4, 2)
    expected, _ = blocked(gelu_mlp, *case)
    actual, _ = blocked(gelu_mlp, *case, block)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("capacity_factor", [0.25, 1.0])
def test_capacity_drops_what_overflows_and_counts_it(capacity_factor):
    """It equals the oracle on the assignments that it kept, and knows how many it did not."""
    x, expert, gate, weights = make_case(120, 4, 2, choose=lambda e: np.minimum(e, 2))
    expert = jnp.where(jnp.arange(120)[:, None] % 5 == 0, 4, expert)  # padding
    cell = cell_size(expert.size, 4, capacity_factor)
    slot, dropped = fill_cells(expert, 4, cell)
    kept = np.asarray(slot) < 4 * cell
    wanted = np.asarray(expert) < 4
    assert 0 < dropped == np.sum(wanted & ~kept)
    assert np.unique(np.asarray(slot)[kept]).size == kept.sum()
    for e in range(4):  # first choices before second ones, earlier tokens before later ones
        order = [tuple(i) for i in np.argwhere((np.asarray(expert) == e).T)]
        assert [tuple(i) for i in np.argwhere((e == np.asarray(expert).T) & kept.T)] == order[:cell]
    drops = functools.partial(capacity, gelu_mlp, capacity_factor=capacity_factor)
    actual = gradients(drops, (x, expert, gate, weights))
    expected = gradients(ORACLE, (x, jnp.where(kept, expert, 4), gate, weights))
    assert actual.pop("dropped") == dropped
    expected.pop("dropped")
    assert_equal(actual, expected)


@pytest.mark.parametrize(
    ("assignments", "destinations", "factor", "cell"),
    [
        (70, 4, 1.0, 24),  # a share of 18
        (64, 8, 1.0, 8),  # a share of 8
        (72, 8, 1.25, 16),  # 1.25 times a share of 9, which is more than 11
        (40, 8, 0.5, 8),
        (100, 4, 8.0, 100),  # all of them
        (5, 4, 1.0, 5),
    ],
)
def test_a_cell_is_a_share_rounded_up_to_eight(assignments, destinations, factor, cell):
    assert cell_size(assignments, destinations, factor) == cell


def test_padding_never_takes_a_cell_from_a_token():
    expert = jnp.array([[4], [0], [4], [0]])
    slot, dropped = fill_cells(expert, 4, 2)
    assert slot.tolist() == [[8], [0], [8], [1]] and dropped == 0


def test_ties_go_to_the_first_experts():
    expert, gate, _ = route(jnp.zeros((3, 2, 8)), jnp.ones((3, 2), bool), 2)
    assert (np.asarray(expert) == [0, 1]).all()
    np.testing.assert_allclose(gate, 1 / 8)
