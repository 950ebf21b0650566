"""The encoder's invariants: padding cannot matter, packing cannot matter, depth is a scan."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_embed_jax.data.packing import fill_rows, pack
from moe_embed_jax.errors import UserError
from moe_embed_jax.kernels import layer_norm as layer_norm_kernel
from moe_embed_jax.kernels.feed_forward import fused_feed_forward
from moe_embed_jax.kernels.layer_norm import TILE_TOKENS
from moe_embed_jax.losses.contrast import unit
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.models import feed_forward
from moe_embed_jax.models.attention import rotate, rotation
from moe_embed_jax.models.encoder import (
    EncoderConfig,
    count_params,
    encode_tokens,
    in_compute_dtype,
    init_params,
)
from moe_embed_jax.models.feed_forward import gelu
from moe_embed_jax.models.layer_norm import gradients, layer_norm
from moe_embed_jax.models.linear import add_bias
from moe_embed_jax.models.moe import MoE
from moe_embed_jax.models.pooling import pool_texts
from moe_embed_jax.routing.exchange import Experts
from moe_embed_jax.routing.reference import reference
from moe_embed_jax.routing.router import route
from moe_embed_jax.sharding import path_of

TINY = EncoderConfig(
    vocab_size=64,
    num_layers=4,
    width=32,
    num_heads=2,
    ffn_width=48,
    num_experts=4,
    experts_per_token=2,
    initializer_range=0.2,
)
LENGTHS = (5, 17, 1, 9, 3, 12, 7)
SLOTS = 4


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with jax.set_mesh(single_device_mesh()):
        yield


@pytest.fixture(scope="module")
def params():
    return make_params(TINY)


def make_params(config):
    return jax.jit(init_params, static_argnums=0)(config, jax.random.key(1))


def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(4, 64, n).astype(np.int32) for n in LENGTHS]


encode = jax.jit(encode_tokens, static_argnums=0)


def embed(config, params, arrays):
    x, statistics = encode(config, params, *arrays)
    return pool_texts("mean", x, arrays[1], SLOTS), statistics


def packed(row_length, slots=SLOTS, extra_rows=0):
    packing = pack(LENGTHS, row_length, slots)
    arrays = fill_rows(packing, sequences(), packing.rows + extra_rows, row_length, 1)
    return packing.slot(SLOTS), arrays


def test_released_model_size():
    """475,292,928 parameters of which 305,423,616 work on a token (paper_facts a)."""
    assert count_params(EncoderConfig()) == (475_292_928, 305_423_616)
    assert count_params(EncoderConfig(experts_per_token=1))[1] == 277_112_064
    assert count_params(EncoderConfig(moe_every=0))[0] == 277_093_632
    assert count_params(EncoderConfig(moe_every=1))[0] == 673_492_224
    # A shared expert works on every token: 6 layers, two matrices and their biases.
    shared = 6 * (2 * 768 * 512 + 512 + 768)
    sizes = count_params(EncoderConfig(shared_expert_width=512))
    assert sizes == (475_292_928 + shared, 305_423_616 + shared)


@pytest.mark.parametrize(
    ("moe_every", "options"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (2, dict(num_layers=5)),  # a dense tail
        (3, dict(num_layers=5)),  # a tail with experts
        (4, dict(num_layers=2)),  # a tail only
        (2, dict(positions="learned", max_positions=24, token_types=2)),
        (2, dict(normalize_gates=True, expert_bias=True)),
        (2, dict(expert_output_bias=False)),
        (1, dict(shared_expert_width=24)),
    ],
)
def test_packed_equals_one_text_per_row(moe_every, options):
    config = dataclasses.replace(TINY, moe_every=moe_every, **options)
    params = make_params(config)
    slot_packed, rows_packed = packed(24)
    slot_alone, rows_alone = packed(24, slots=1, extra_rows=1)
    pooled_packed, statistics_packed = embed(config, params, rows_packed)
    pooled_alone, statistics_alone = embed(config, params, rows_alone)
    a = np.asarray(pooled_packed).reshape(-1, 32)[slot_packed]
    b = np.asarray(pooled_alone).reshape(-1, 32)[slot_alone]
    np.testing.assert_allclose(a, b, atol=1e-5)
    if moe_every:
        layers = [i for i in range(config.num_layers) if i % moe_every == 1 % moe_every]
        assert statistics_packed.assignments_E.shape == (len(layers), 4)
        assert config.num_moe_layers == len(layers)
        assert (statistics_packed.tokens == sum(LENGTHS)).all()
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4),
            statistics_packed,
            statistics_alone,
        )


def test_content_of_padding_cannot_matter(params):
    slot, (token, text_index, position) = packed(24, extra_rows=1)
    rng = np.random.default_rng(5)
    other_token = np.where(text_index < 0, rng.integers(0, 64, token.shape), token)
    other_position = np.where(text_index < 0, 99, position)

    def loss(params, token, position):
        pooled, statistics = embed(TINY, params, (token, text_index, position))
        texts = pooled.reshape(-1, 32)[slot]
        return jnp.sum(jnp.sin(texts)) + jnp.sum(statistics.probability_E**2), (texts, statistics)

    grad_fn = jax.jit(jax.value_and_grad(loss, has_aux=True))
    one, grads_one = grad_fn(params, token, position)
    two, grads_two = grad_fn(params, other_token.astype(np.int32), other_position)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    # Gradients of the padding's own embeddings must be exactly zero too.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads_one, grads_two)


def assert_close_gradients(actual, expected, relative=1e-5):
    """Every parameter's gradient to `relative` of its own largest entry."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * max(np.abs(b).max(), 1e-3))


def test_blocked_equals_reference_in_the_model(monkeypatch, params):
    _, arrays = packed(24)

    def value_and_gradients():
        def loss(params):
            pooled, _ = embed(TINY, params, arrays)
            return jnp.sum(jnp.sin(3 * pooled))

        return jax.jit(jax.value_and_grad(loss))(params)

    blocked = value_and_gradients()
    oracle = lambda self, mlp: functools.partial(reference, mlp.function)  # noqa: E731
    monkeypatch.setattr(Experts, "layer", oracle)
    assert_close_gradients(blocked, value_and_gradients())


def test_remat_changes_nothing(params):
    """Neither values, gradients nor statistics: rows that fill up the last piece are padding."""
    _, arrays = packed(24)
    assert len(arrays[0]) == 3

    def loss(params, config):
        pooled, statistics = embed(config, params, arrays)
        balance = jnp.sum(statistics.probability_E**2) / statistics.tokens.max() ** 2
        return jnp.sum(jnp.sin(pooled)) + balance, statistics

    results = []
    for remat_rows in (0, 2, 24):  # 2: pieces do not divide the rows
        config = dataclasses.replace(TINY, remat_rows=remat_rows)
        evaluate = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
        results.append(evaluate(params, config))
    (expected, statistics), gradients = results[0]
    assert (statistics.tokens == sum(LENGTHS)).all()
    for (value, other_statistics), other_gradients in results[1:]:
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert_close_gradients(other_gradients, gradients)
        np.testing.assert_array_equal(other_statistics.tokens, statistics.tokens)
        np.testing.assert_array_equal(other_statistics.assignments_E, statistics.assignments_E)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), other_statistics, statistics
        )


def test_only_matrices_and_biases_of_blocks_are_cast_to_the_compute_dtype():
    """Embeddings, norms and the router stay float32 in a bfloat16 model."""
    config = dataclasses.replace(TINY, dtype="bfloat16", num_layers=3, expert_bias=True)
    cast = jax.eval_shape(lambda: in_compute_dtype(config, make_params(config)))
    flat = jax.tree_util.tree_flatten_with_path(cast)[0]
    kept = {path_of(path) for path, leaf in flat if leaf.dtype == jnp.float32}
    of_groups = {
        f"groups/block_{i}/norm_{n}/{name}"
        for i in (0, 1) for n in (1, 2) for name in ("scale", "bias")
    } | {"groups/block_1/moe/router/kernel"}  # fmt: skip
    of_tail = {f"tail/block_0/norm_{n}/{name}" for n in (1, 2) for name in ("scale", "bias")}
    outside = {path_of(path) for path, _ in flat if path_of(path).startswith("embeddings/")}
    assert kept == of_groups | of_tail | outside
    assert {leaf.dtype for path, leaf in flat if path_of(path) not in kept} == {
        jnp.dtype(jnp.bfloat16)
    }


def test_the_router_of_a_bfloat16_layer_computes_in_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16", num_experts=16)
    rng = np.random.default_rng(0)
    x_RLD = jnp.asarray(rng.normal(size=(4, 64, 32)), jnp.bfloat16)
    valid_RL = jnp.ones((4, 64), bool)
    moe = MoE(config, nnx.initializers.normal(0.02), nnx.Rngs(0))
    layer = jax.shard_map(
        lambda *rows: moe(*rows, keep_choices=True), in_specs=P(), out_specs=P(), check_vma=False
    )
    y_RLD, statistics = jax.jit(layer)(x_RLD, valid_RL)
    logits_RLE = np.asarray(x_RLD, np.float64) @ np.asarray(moe.router.kernel[...], np.float64)
    expert_RLK, _, expected = route(jnp.asarray(logits_RLE, jnp.float32), valid_RL, 2)
    assert y_RLD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(statistics.expert_RLK, expert_RLK)
    np.testing.assert_allclose(statistics.probability_E, expected.probability_E, rtol=4e-6)


def test_a_bfloat16_model_in_pieces_routes_by_the_float32_router(params):
    """Columns of the router that bfloat16 cannot tell apart: there all tokens would tie."""
    config = dataclasses.replace(TINY, dtype="bfloat16", remat_rows=2)
    column_GD1 = params["groups"]["block_1"]["moe"]["router"]["kernel"][..., :1]
    column_GD1 = column_GD1.astype(jnp.bfloat16).astype(jnp.float32)
    kernel_GDE = column_GD1 * (1 + 2.0**-12 * jnp.arange(4))
    assert (kernel_GDE.astype(jnp.bfloat16) == column_GD1).all()
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: kernel_GDE if path_of(path).endswith("router/kernel") else leaf, params
    )
    assignments_GE = np.asarray(embed(config, params, packed(24)[1])[1].assignments_E)
    # The last two experts lead wherever the logit is above 0.
    assert (assignments_GE[:, 2:] > 0.1 * sum(LENGTHS)).all()


def test_route_is_top_k_of_the_softmax_without_renormalisation():
    logits = jnp.asarray([[[0.1, 3.0, 2.0, -1.0], [5.0, 0.0, 0.0, 0.0]]])
    expert, gate, statistics = route(logits, jnp.asarray([[True, False]]), 2)
    probability = np.exp(logits[0, 0]) / np.exp(logits[0, 0]).sum()
    np.testing.assert_array_equal(expert, [[[1, 2], [4, 4]]])  # padding: expert E
    np.testing.assert_allclose(gate[0, 0], probability[[1, 2]], rtol=1e-5)
    assert gate[0, 0].sum() < 1
    np.testing.assert_array_equal(statistics.assignments_E, [0, 1, 1, 0])
    np.testing.assert_allclose(statistics.probability_E, probability, rtol=1e-5)


def test_rotary_scores_depend_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(i, j):
        at_i, at_j = (rotation(jnp.full((1, 1), p), 8, 1e4) for p in (i, j))
        return jnp.sum(rotate(q, at_i) * rotate(k, at_j))

    np.testing.assert_allclose(score(3, 1), score(103, 101), rtol=1e-4)
    assert abs(score(3, 1) - score(1, 3)) > 1e-3
    # NeoX halves: at position p the pair (x[i], x[i + 4]) turns by p * base ** (-i / 4).
    x = jnp.zeros((1, 1, 1, 8)).at[..., 1].set(1.0)
    turned = rotate(x, rotation(jnp.full((1, 1), 2), 8, 1e4))[0, 0, 0]
    np.testing.assert_allclose(turned[1], np.cos(2 * 1e4**-0.25), rtol=1e-5)
    np.testing.assert_allclose(turned[5], np.sin(2 * 1e4**-0.25), rtol=1e-5)


def test_layer_norm_and_bias_gradients_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=(3, 5, 24)) + 1, jnp.float32) for _ in range(2))
    scale, bias = (jnp.asarray(rng.normal(size=24), jnp.float32) for _ in range(2))

    def formula(x, scale, bias):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * scale + bias

    def gradients(function):
        scalar = lambda *a: jnp.sum(function(*a) * weight)  # noqa: E731
        return jax.value_and_grad(scalar, argnums=(0, 1, 2))(x, scale, bias)

    ours = gradients(lambda x, scale, bias: layer_norm(x, scale, bias, 1e-5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, gradients(formula))
    biased = gradients(lambda x, scale, bias: add_bias(x * scale, bias))
    plain = gradients(lambda x, scale, bias: x * scale + bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), biased, plain)


def test_layer_norm_kernel_has_the_gradients_of_the_formula():
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(2, TILE_TOKENS, 128)) + 1, jnp.float32) for _ in range(2))
    scale, bias = (jnp.asarray(rng.normal(size=128), jnp.float32) for _ in range(2))
    _, vjp = jax.vjp(lambda *a: layer_norm(*a, 1e-5), x, scale, bias)
    of_tokens = functools.partial(gradients, epsilon=1e-5)
    actual = layer_norm_kernel.backward(of_tokens, x, scale, dy, interpret=True)
    for a, b in zip(actual, vjp(dy), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5)


def test_feed_forward_kernels_equal_the_two_products():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 8, jnp.float32)  # noqa: E731
    weights = draw(32, 48), draw(48), draw(48, 32)
    x, dy = draw(2 * TILE_TOKENS, 32), draw(2 * TILE_TOKENS, 32)
    fused = functools.partial(fused_feed_forward, activation=gelu, interpret=True)

    def plain(x, w_in, bias_in, w_out):
        return gelu(x @ w_in + bias_in) @ w_out

    (a, a_vjp), (b, b_vjp) = (jax.vjp(function, x, *weights) for function in (fused, plain))
    for actual, expected in zip((a, *a_vjp(dy)), (b, *b_vjp(dy)), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_layer_norm_of_bfloat16_is_that_of_its_values():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 64, 256)) * 3 + 2, jnp.bfloat16)
    ones, zeros = jnp.ones(256), jnp.zeros(256)
    expected = layer_norm(x.astype(jnp.float32), ones, zeros, 1e-5)
    np.testing.assert_allclose(layer_norm(x, ones, zeros, 1e-5), expected, atol=2e-6, rtol=2e-6)


def test_gelu_of_tpu_kernels_is_the_exact_gelu():
    x = jnp.linspace(-6, 6, 1001)
    exact, exact_vjp = jax.vjp(functools.partial(jax.nn.gelu, approximate=False), x)
    actual, actual_vjp = jax.vjp(feed_forward._gelu_by_erf, x)
    np.testing.assert_allclose(actual, exact, atol=1e-6)
    dy = jnp.cos(x)
    np.testing.assert_allclose(actual_vjp(dy)[0], exact_vjp(dy)[0], atol=1e-6)


def test_gelu_in_bfloat16_is_exact_to_rounding():
    x = jnp.linspace(-6, 6, 4001, dtype=jnp.float32).astype(jnp.bfloat16)
    exact, exact_vjp = jax.vjp(gelu, x.astype(jnp.float32))
    ours, ours_vjp = jax.vjp(gelu, x)
    for a, b in ((ours, exact), (*ours_vjp(jnp.ones_like(x)), *exact_vjp(jnp.ones_like(exact)))):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=2**-8, atol=2e-6)  # half a unit in the last place


def test_unit_norm_of_a_zero_vector_is_finite():
    value, grad = jax.value_and_grad(lambda x: jnp.sum(unit(x)))(jnp.zeros((1, 4)))
    assert value == 0 and np.isfinite(np.asarray(grad)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(positions="sine"), "positions='sine': choose 'rotary' or 'learned'"),
        (dict(positions="learned"), "max_positions=0 with positions='learned'"),
        (dict(max_positions=9), "max_positions=9 with positions='rotary'"),
        (dict(width=30), "width=30 must be divisible"),
        (dict(experts_per_token=9), "experts_per_token=9 must be between 1 and num_experts=4"),
        (dict(expert_backend="magic"), "expert_backend='magic'"),
        (dict(router_gradient="all"), "router_gradient='all': choose from"),
        (
            dict(router_gradient="dense", expert_backend="capacity"),
            "model.expert_backend='capacity' drops tokens: choose another expert_backend",
        ),
        (
            dict(router_gradient="dense", expert_exchange="all_to_all"),
            "model.expert_exchange='all_to_all' drops tokens: choose another expert_exchange",
        ),
        (dict(dtype="float16"), "dtype='float16': choose from"),
    ],
)
def test_impossible_architectures_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)
