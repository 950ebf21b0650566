"""Products and attention of CPUs against float64, and what XLA makes of them in bfloat16."""

import functools
import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed_jax.kernels import cpu_attention as attention_module
from moe_embed_jax.kernels import cpu_products
from moe_embed_jax.kernels.cpu_attention import cpu_attention
from moe_embed_jax.kernels.cpu_products import product
from moe_embed_jax.routing.blocked import blocked
from moe_embed_jax.routing.expert_mlp import matmul

DTYPES = [jnp.float32, jnp.bfloat16]


def normal(*shape, dtype, seed=0):
    """Numbers that `dtype` holds."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def in_float64(*arrays):
    return [np.asarray(array).astype(np.float64) for array in arrays]


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_and_gradients(dtype, weight_dtype):
    x, dy = normal(40, 24, dtype=dtype), normal(40, 16, dtype=dtype, seed=1)
    w = normal(24, 16, dtype=jnp.bfloat16, seed=2).astype(weight_dtype)
    y, vjp = jax.vjp(product, x, w)
    dx, dw = vjp(dy.astype(jnp.float32))
    x64, w64, dy64 = in_float64(x, w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, dtype, weight_dtype)
    np.testing.assert_allclose(y, x64 @ w64, rtol=1e-5, atol=1e-5)
    for found, expected in ((dx, dy64 @ w64.T), (dw, x64.T @ dy64)):
        once_rounded = 2.0**-8 if found.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(
            np.asarray(found, np.float32), expected, rtol=once_rounded, atol=1e-5
        )


def make_case(rows, heads, length, head, dtype):
    """(q, k, v, dcontext, text_index): two texts in each row, then padding."""
    arrays = [normal(rows, heads, length, head, dtype=dtype, seed=i) for i in range(4)]
    index = np.full((rows, length), -1, np.int32)
    for row in range(rows):
        index[row, : length // 2 + row], index[row, length // 2 + row : length - 3] = 0, 1
    return *arrays, jnp.asarray(index)


def in_numpy(q, k, v, dcontext, text_index):
    """context, dq, dk, dv in float64."""
    q, k, v, dcontext = in_float64(q, k, v, dcontext)
    hidden = np.asarray(text_index)[:, :, None] != np.asarray(text_index)[:, None, :]
    score = np.where(hidden[:, None], -np.inf, q @ k.swapaxes(-1, -2))
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    dweight = dcontext @ v.swapaxes(-1, -2)
    dscore = weight * (dweight - (weight * dweight).sum(axis=-1, keepdims=True))
    return weight @ v, dscore @ k, dscore.swapaxes(-1, -2) @ q, weight.swapaxes(-1, -2) @ dcontext


# Rows (of 4) and heads (of 6) at a time: all, 2 rows, one row, 3 heads, one head.
@pytest.mark.parametrize("scores", [4 * 6 * 256, 3 * 6 * 256, 6 * 256, 4 * 256, 1])
def test_attention_in_pieces(scores):
    *arrays, dcontext, text_index = make_case(4, 6, 16, 8, jnp.float32)
    with mock.patch.object(attention_module, "SCORES_AT_A_TIME", scores):
        context, vjp = jax.vjp(lambda *a: cpu_attention(*a, text_index), *arrays)
        found = context, *vjp(dcontext)
        without_gradient = cpu_attention(*arrays, text_index)
    np.testing.assert_array_equal(without_gradient, context)
    for one, expected in zip(found, in_numpy(*arrays, dcontext, text_index), strict=True):
        np.testing.assert_allclose(one, expected, atol=1e-5)


def test_other_texts_cannot_matter():
    q, k, v, dcontext, text_index = make_case(2, 2, 16, 8, jnp.float32)
    is_first = (np.asarray(text_index) == 0)[:, None, :, None]

    def of_first(q, k, v):
        context, vjp = jax.vjp(lambda *a: cpu_attention(*a, text_index), q, k, v)
        return context * is_first, *(d * is_first for d in vjp(dcontext * is_first))

    others = (jnp.where(is_first, x, 1e4) for x in (q, k, v))
    for one, two in zip(of_first(q, k, v), of_first(*others), strict=True):
        np.testing.assert_array_equal(one, two)
        assert np.isfinite(one).all()


def test_attention_rounds_operands_only():
    *arrays, dcontext, text_index = make_case(2, 4, 32, 16, jnp.bfloat16)
    context, vjp = jax.vjp(lambda *a: cpu_attention(*a, text_index), *arrays)
    assert context.dtype == jnp.float32
    found = context, *vjp(dcontext.astype(jnp.float32))
    for one, expected in zip(found, in_numpy(*arrays, dcontext, text_index), strict=True):
        off = np.asarray(one, np.float32) - expected
        assert np.sqrt(np.mean(off**2)) < 2.0**-8 * np.sqrt(np.mean(expected**2))


def operands_made_float32(function, *arguments) -> set[str]:
    """Shapes of the bfloat16 arrays that the compiled program converts to float32."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    bfloat16 = dict(re.findall(r"%?([\w.-]+) = bf16(\[[\d,]*\])", text))
    bfloat16 |= dict(re.findall(r"%?([\w.-]+): bf16(\[[\d,]*\])", text))
    converted = re.findall(r"= f32\[[\d,]*\]\S* convert\(%?([\w.-]+)\)", text)
    return {bfloat16[name] for name in converted if name in bfloat16}


def test_xla_multiplies_bfloat16():
    """It makes no float32 operands first, in no product of a layer and none of its gradients."""
    x, w = normal(64, 128, dtype=jnp.bfloat16), normal(128, 256, dtype=jnp.bfloat16)

    def gradients(x, w):
        y, vjp = jax.vjp(product, x, w)
        return y, *vjp(y)

    assert not operands_made_float32(gradients, x, w)
    # What this test looks for. (XLA of jax 0.10 also does so for x @ w, that of jax 0.12 does not.)
    in_float32 = operands_made_float32(lambda x, w: x.astype(jnp.float32) @ w, x, w)
    assert in_float32 == {"[64,128]", "[128,256]"}

    *arrays, _, text_index = make_case(2, 2, 64, 32, jnp.bfloat16)

    def attention_gradients(*arrays):
        context, vjp = jax.vjp(lambda *a: cpu_attention(*a, text_index), *arrays)
        return vjp(context)

    assert not operands_made_float32(attention_gradients, *arrays)


@pytest.mark.parametrize(("width", "out", "turned"), [(256, 32, 32), (32, 256, 32)])
def test_the_narrower_operand_is_turned(width, out, turned):
    """For the gradient of a weight. Turned, the wide one would be an activation computed again."""
    x, w = normal(64, width, dtype=jnp.bfloat16), normal(width, out, dtype=jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(product(jnp.tanh(x), w) ** 2)))
    text = gradient.lower(w).compile().as_text()
    assert set(re.findall(r"bf16\[(\d+),64\]", text)) == {str(turned)}


def arrays_converted_for_slices(function, *arguments) -> set[str]:
    """Shapes of the arrays that the compiled program converts whole where it wants a part."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    made_by = {
        name: (shape, kind)
        for name, shape, kind in re.findall(r"%?([\w.-]+) = (\w+\[[\d,]*\])\S* ([\w-]+)\(", text)
    }
    sliced = re.findall(r" dynamic-(?:update-)?slice\((?:\w+\[\S* )?%?([\w.-]+)", text)
    found = [made_by[name] for name in sliced if name in made_by]
    return {shape for shape, kind in found if kind == "convert"}


def test_loops_keep_bfloat16_as_bits():
    """Layers after one another, pieces of attention, blocks of experts: none converts what the
    others have written."""

    # What this test looks for. (XLA of jax 0.10 also does so by itself, that of jax 0.12 does not.)
    def write_in_float32(i, x):
        x = x.astype(jnp.float32)
        return jax.lax.dynamic_update_slice(x, x[:1] + 1, (i, 0)).astype(jnp.bfloat16)

    in_float32 = functools.partial(jax.lax.fori_loop, 0, 8, write_in_float32)
    x, w = normal(64, 32, dtype=jnp.float32), normal(3, 32, 32, dtype=jnp.float32)
    assert arrays_converted_for_slices(in_float32, x.astype(jnp.bfloat16)) == {"f32[64,32]"}

    def layers(w):
        def layer(x, w):
            return jnp.tanh(product(x.astype(jnp.bfloat16), w)).astype(jnp.float32), None

        return jax.lax.scan(layer, x, w)[0].sum()

    assert not arrays_converted_for_slices(jax.grad(layers), w)

    *arrays, _, text_index = make_case(4, 6, 16, 8, jnp.bfloat16)

    def attention(*arrays):
        return cpu_attention(*arrays, text_index).sum()

    with mock.patch.object(attention_module, "SCORES_AT_A_TIME", 256):
        assert not arrays_converted_for_slices(jax.grad(attention, argnums=(0, 1, 2)), *arrays)

    x = normal(64, 32, dtype=jnp.bfloat16)
    expert = jnp.asarray(np.arange(128).reshape(64, 2) % 4, jnp.int32)

    def mlp(x, w):
        return matmul(x, w).astype(x.dtype)

    def experts(x, w):
        y, _ = blocked(mlp, x, expert, jnp.ones((64, 2), jnp.float32), w)
        return y.astype(jnp.float32).sum()

    w = normal(4, 32, 32, dtype=jnp.float32)
    assert not arrays_converted_for_slices(jax.grad(experts, argnums=(0, 1)), x, w)


@pytest.mark.parametrize(("seconds", "faster"), [(0.5, True), (0.9, False)])
def test_bfloat16_is_chosen_by_its_time(seconds, faster, monkeypatch):
    now = [0.0]

    def measured(x_BD, _):
        now[0] += seconds if x_BD.dtype == jnp.bfloat16 else 1.0
        return types.SimpleNamespace(block_until_ready=lambda: None)

    monkeypatch.setattr(cpu_products, "_measured", measured)
    monkeypatch.setattr(cpu_products.time, "process_time", lambda: now[0])
    assert cpu_products.bfloat16_is_faster.__wrapped__() == faster
