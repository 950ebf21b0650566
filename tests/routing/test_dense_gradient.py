"""The router's gradient of all experts' outputs, against loops and a surrogate in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.models.encoder import EncoderConfig, encode_tokens, init_params
from moe_embed_jax.models.feed_forward import gelu
from moe_embed_jax.models.moe import GELU_MLP, gelu_mlp
from moe_embed_jax.routing.exchange import Experts
from moe_embed_jax.routing.router import gates_of_all, route
from moe_embed_jax.training.overview import describe_router_gradient

T, D, F, E, K = 40, 8, 12, 5, 2
DROPLESS = ("reference", "blocked", "grouped", "ragged")


def make_case(seed=0):
    """x, logits of a router, which tokens are there, the experts' weights, a target."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    valid_T = np.arange(T) % 5 > 0
    weights = {"w_in": normal(E, D, F), "bias_in": normal(E, F), "w_out": normal(E, F, D)}
    return normal(T, D), normal(T, E), valid_T, weights, normal(T, D)


def experts_in_float64(x_TD, weights):
    """y_ETD, expert by expert."""
    x_TD, weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (x_TD, weights))
    with jax.enable_x64():
        return np.stack(
            [
                np.asarray(gelu(jnp.asarray(x_TD @ weights["w_in"][e] + weights["bias_in"][e])))
                @ weights["w_out"][e]
                for e in range(E)
            ]
        )


@functools.cache
def program(backend: str, router_gradient: str, normalize: bool):
    layer = Experts(backend, "ring", 8.0, router_gradient).layer(GELU_MLP)

    def loss(x_TD, logits_TE, weights, valid_T, target_TD):
        expert_TK, gates, _ = route(logits_TE, valid_T, K, normalize)
        if router_gradient == "dense":
            gates = gates, gates_of_all(logits_TE, expert_TK, normalize)
        y_TD, _ = layer(x_TD, expert_TK, gates, weights)
        return jnp.sum(y_TD * target_TD), (y_TD, expert_TK)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def run(backend, router_gradient, normalize=False):
    x, logits, valid, weights, target = make_case()
    (_, (y, expert)), gradients = program(backend, router_gradient, normalize)(
        x, logits, weights, valid, target
    )
    return y, np.asarray(expert), gradients


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("backend", DROPLESS)
def test_gates_learn_from_all_experts_and_nothing_else_changes(backend, normalize):
    x, logits, valid, weights, target = make_case()
    y, expert, (dx, dlogits, dweights) = run(backend, "dense", normalize)
    # Softmax and its Jacobian in float64, token by token; dL/dg_te = dL/dy_t . f_e(x_t).
    outputs_ETD = experts_in_float64(x, weights)
    expected_TE = np.zeros((T, E))
    for t in range(T):
        if not valid[t]:
            continue
        p_E = np.exp(np.asarray(logits[t], np.float64))
        p_E /= p_E.sum()
        dgate_E = outputs_ETD[:, t] @ np.asarray(target[t], np.float64)
        chosen = expert[t]
        dp_E = dgate_E.copy()
        if normalize:  # g_e = p_e / s, and s is the sum of the chosen ones
            s = p_E[chosen].sum()
            dp_E = dgate_E / s
            dp_E[chosen] -= (dgate_E @ p_E) / s**2
        expected_TE[t] = p_E * (dp_E - dp_E @ p_E)
    np.testing.assert_allclose(dlogits, expected_TE, rtol=1e-4, atol=1e-5)
    sparse_y, sparse_expert, (sparse_dx, sparse_dlogits, sparse_dweights) = run(
        "reference", "sparse", normalize
    )
    np.testing.assert_array_equal(expert, sparse_expert)
    np.testing.assert_allclose(y, sparse_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, sparse_dx, rtol=1e-4, atol=2e-5)
    for name, gradient in dweights.items():
        np.testing.assert_allclose(gradient, sparse_dweights[name], rtol=1e-4, atol=2e-5)
    assert np.abs(dlogits - sparse_dlogits).max() > 0.1


def test_with_all_experts_chosen_both_gradients_are_one():
    x, logits, valid, weights, target = make_case(1)
    found = {}
    for name in ("sparse", "dense"):
        layer = Experts("blocked", "ring", 8.0, name).layer(GELU_MLP)

        def loss(logits, name=name, layer=layer):
            expert, gates, _ = route(logits, valid, E)
            gates = (gates, gates_of_all(logits, expert)) if name == "dense" else gates
            return jnp.sum(layer(x, expert, gates, weights)[0] * target)

        found[name] = jax.grad(loss)(logits)
    np.testing.assert_allclose(found["dense"], found["sparse"], rtol=1e-4, atol=1e-5)


def assert_near(actual, expected):
    largest = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-6 * largest + 1e-7)


TINY = EncoderConfig(
    vocab_size=50, num_layers=4, width=16, num_heads=2, ffn_width=24, num_experts=4
)


def test_an_encoder_learns_it_whatever_back_end_and_rows_at_a_time():
    """Same vectors as with the sparse gradient; padding does not matter; remat_rows neither."""
    rng = np.random.default_rng(0)
    token = rng.integers(4, 50, (4, 12)).astype(np.int32)
    text = np.where(np.arange(12) < rng.integers(5, 12, 4)[:, None], 0, -1).astype(np.int32)
    position = np.tile(np.arange(12, dtype=np.int32), (4, 1))
    target = rng.normal(size=(4, 12, 16)).astype(np.float32) * (text >= 0)[..., None]
    params = init_params(TINY, jax.random.key(0))

    def gradients(token, **changes):
        model = dataclasses.replace(TINY, **changes)

        def loss(params):
            x, _ = encode_tokens(model, params, token, text, position)
            return jnp.sum(x * target), x * (text >= 0)[..., None]

        with jax.set_mesh(single_device_mesh()):
            return jax.jit(jax.grad(loss, has_aux=True))(params)

    expected, x = gradients(token, router_gradient="dense", expert_backend="blocked")
    sparse, sparse_x = gradients(token)
    np.testing.assert_allclose(x, sparse_x, atol=1e-5)
    router = lambda grads: grads["groups"]["block_1"]["moe"]["router"]["kernel"]  # noqa: E731
    assert np.abs(router(expected) - router(sparse)).max() > 1e-4
    other_padding = np.where(text < 0, 7, token)
    for found, _ in (
        gradients(token, router_gradient="dense", expert_backend="grouped", remat_rows=1),
        gradients(other_padding, router_gradient="dense", expert_backend="blocked"),
    ):
        jax.tree.map(assert_near, found, expected)


def test_a_run_and_a_plan_say_what_it_costs():
    assert describe_router_gradient(TINY) == []
    dense = dataclasses.replace(TINY, router_gradient="dense")
    (line,) = describe_router_gradient(dense)
    assert "all 4 experts" in line and "backward pass" in line
    assert describe_router_gradient(dataclasses.replace(dense, moe_every=0)) == []


def test_the_gradient_in_bfloat16_is_summed_in_float32():
    """dL/dg is a sum over D: bfloat16 outputs, float32 sums."""
    x, _, _, weights, target = make_case(2)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (x, weights, target))
    layer = Experts("reference", "ring", 8.0, "dense").layer(GELU_MLP)
    expert = jnp.zeros((T, 1), jnp.int32)

    def loss(gate_TE):
        gates = gate_TE[:, :1].astype(jnp.bfloat16), gate_TE
        y, _ = layer(half[0], expert, gates, half[1])
        return jnp.sum(y.astype(jnp.float32) * half[2].astype(jnp.float32))

    found_TE = jax.grad(loss)(jnp.ones((T, E)))
    outputs_ETD = jax.vmap(gelu_mlp, (None, 0))(half[0], half[1])
    products = np.float64(outputs_ETD.astype(jnp.float32)) * np.float64(half[2])
    np.testing.assert_allclose(found_TE, products.sum(axis=-1).T, rtol=1e-2, atol=0.3)
    assert found_TE.dtype == jnp.float32
