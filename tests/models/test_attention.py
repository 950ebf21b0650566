"""The fused attention kernel (interpreted here) against plain attention: values and gradients."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from moe_embed_jax.kernels import fused_attention as fused_module
from moe_embed_jax.kernels import long_attention
from moe_embed_jax.kernels.fused_attention import fused_attention, supports
from moe_embed_jax.models import attention as attention_module
from moe_embed_jax.models.attention import attention, rotation


def make_case(rows, length, heads, head, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    text_index = np.full((rows, length), -1, np.int32)
    position = np.zeros((rows, length), np.int32)
    for row in range(rows):
        start = 0
        for text, n in enumerate(rng.integers(1, length // 2, 4)):
            stop = min(start + n, length - row)  # the last slots are padding, except in row 0
            text_index[row, start:stop] = text
            position[row, start:stop] = np.arange(max(stop - start, 0))
            start = max(stop, start)
    qkv = jnp.asarray(rng.normal(size=(rows, length, 3 * heads * head)), dtype)
    return qkv, jnp.asarray(text_index), rotation(jnp.asarray(position), head, 1e4)


@pytest.mark.parametrize(
    ("heads", "head", "length", "rotary"),
    [(2, 64, 128, True), (8, 32, 128, True), (1, 128, 256, True), (4, 64, 128, False)],
)
def test_equals_plain_attention(heads, head, length, rotary):
    qkv, text_index, angles = make_case(2, length, heads, head)
    angles = angles if rotary else None
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, length, heads * head)))

    def value_and_gradient(function, **options):
        def scalar(qkv):
            context = function(qkv, text_index, angles, heads, **options)
            return jnp.sum(context * weight), context

        return jax.jit(jax.grad(scalar, has_aux=True))(qkv)

    assert supports(length, heads * head, heads, jnp.float32)
    gradient, context = value_and_gradient(fused_attention, interpret=True)
    expected_gradient, expected = value_and_gradient(attention)
    np.testing.assert_allclose(context, expected, atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=3e-5)


@pytest.mark.parametrize("head", [32, 64])
def test_long_rows_equal_plain_attention(head):
    """JAX's flash attention kernel, interpreted."""
    heads, length = 2, 1024
    qkv, text_index, angles = make_case(2, length, heads, head)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, length, heads * head)))

    def gradient(is_tpu):
        def scalar(qkv):
            with mock.patch.object(attention_module, "platform", lambda: "tpu" * is_tpu):
                context = attention(qkv, text_index, angles, heads)
            return jnp.sum(context * weight), context

        with pltpu.force_tpu_interpret_mode():
            return jax.jit(jax.grad(scalar, has_aux=True))(qkv)

    (actual_gradient, actual), (expected_gradient, expected) = gradient(True), gradient(False)
    valid = np.asarray(text_index) >= 0
    np.testing.assert_allclose(actual[valid], expected[valid], atol=1e-5)
    np.testing.assert_allclose(actual_gradient[valid], expected_gradient[valid], atol=3e-5)
    assert np.isfinite(actual).all()
    assert long_attention.supports(2048) and not long_attention.supports(512)
    assert not long_attention.supports(1000)


def test_bfloat16_is_closer_to_float32_than_plain_attention():
    """The kernel keeps scores in float32; plain attention rounds them."""
    exact = attention(*make_case(2, 128, 2, 64), 2)
    qkv, text_index, angles = make_case(2, 128, 2, 64, jnp.bfloat16)
    fused = fused_attention(qkv, text_index, angles, 2, interpret=True)
    plain = attention(qkv, text_index, angles, 2)
    assert fused.dtype == jnp.bfloat16
    errors = [float(jnp.abs(x.astype(jnp.float32) - exact).mean()) for x in (fused, plain)]
    assert errors[0] <= 1.05 * errors[1] and errors[0] < 0.01, errors


def test_other_texts_cannot_matter():
    qkv, text_index, angles = make_case(1, 128, 2, 64)
    mine = text_index == 1
    other = jnp.where(mine[..., None], qkv, 100.0)
    one, two = (fused_attention(x, text_index, angles, 2, interpret=True) for x in (qkv, other))
    np.testing.assert_array_equal(one[mine], two[mine])

    def of_mine(qkv):
        context = fused_attention(qkv, text_index, angles, 2, interpret=True)
        return jnp.sum(jnp.where(mine[..., None], context, 0))

    gradient = jax.grad(of_mine)(qkv)
    assert not np.asarray(gradient[~mine]).any() and np.asarray(gradient[mine]).any()


def test_what_the_kernel_takes():
    def takes(*shape, dtype=jnp.bfloat16):
        return supports(*shape, dtype)

    assert takes(256, 768, 12) and takes(512, 384, 12) and takes(128, 1024, 8)
    assert takes(512, 1024, 16, dtype=jnp.float32)
    assert not takes(64, 768, 12)  # rows of less than 128 slots
    assert not takes(2048, 768, 12)  # scores that do not fit fast memory
    assert not takes(1024, 128, 2)  # left to the kernel of blocks
    assert not takes(256, 96, 2) and not takes(256, 480, 10)
    # The compiler wants 18.4 MB for the backward pass of the released model's rows of 512.
    with mock.patch.object(fused_module, "vmem_limit_bytes", lambda: 18 * 2**20):
        assert takes(256, 768, 12) and not takes(512, 768, 12)
