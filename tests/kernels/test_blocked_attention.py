"""The attention kernels for long rows (interpreted here), and cuDNN's call, against plain
attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.other_devices import device_named
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_embed_jax.kernels import blocked_attention as blocked_module
from moe_embed_jax.kernels.blocked_attention import blocked_attention, supports
from moe_embed_jax.kernels.text_blocks import blocks_to_visit
from moe_embed_jax.models import attention as attention_module
from moe_embed_jax.models.attention import (
    attention,
    attention_for,
    cudnn_attention,
    long_triton_attention,
    rotation,
)

BLOCK = 128  # half of the kernel's own, for speed; test_planning.py compiles that one
KEYS = 2 * BLOCK  # likewise
ROW = 2 * KEYS
ROWS = {  # lengths of the texts; the rest of the row is padding
    "one text fills the row": [ROW],
    "every token is a text": [1] * ROW,
    "short texts": [40, 1, 90, 7, 20, 30, 60, 33, 5, 40],
    "texts that end where blocks do": [BLOCK, BLOCK],
    "a text over two blocks, then padding": [BLOCK + 20],
    "padding": [],
}


KERNELS = {
    "TPU": functools.partial(blocked_attention, interpret=True),
    "Triton": functools.partial(long_triton_attention, interpret=True),
    "cuDNN": functools.partial(cudnn_attention, implementation="xla"),
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocked_module, "BLOCK", BLOCK)
    monkeypatch.setattr(blocked_module, "KEYS", KEYS)


def packed(rows):
    text_index, position = (np.full((len(rows), ROW), fill, np.int32) for fill in (-1, 0))
    for row, lengths in enumerate(rows):
        assert sum(lengths) <= ROW
        start = 0
        for text, n in enumerate(lengths):
            text_index[row, start : start + n] = text
            position[row, start : start + n] = np.arange(n)
            start += n
    return jnp.asarray(text_index), position


def make_case(rows, heads, head, dtype=jnp.float32):
    text_index, position = packed(rows)
    values = np.random.default_rng(0).normal(size=(len(rows), ROW, 3 * heads * head))
    return jnp.asarray(values, dtype), text_index, rotation(jnp.asarray(position), head, 1e4)


def value_and_gradient(function, case, heads):
    qkv, text_index, angles = case
    shape = (*qkv.shape[:2], qkv.shape[2] // 3)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

    def scalar(qkv):
        context = function(qkv, text_index, angles, heads)
        return jnp.sum(context * weight), context

    gradient = jax.jit(jax.grad(scalar, has_aux=True))
    return [np.asarray(x, np.float32) for x in gradient(qkv)]


@pytest.mark.parametrize(
    ("kernel", "heads", "head", "rotary"),
    [
        ("TPU", 2, 64, True),
        ("TPU", 8, 32, True),
        ("TPU", 1, 128, True),
        ("TPU", 4, 64, False),
        ("Triton", 2, 64, True),
        ("Triton", 4, 32, False),
        ("cuDNN", 2, 64, True),
    ],
)
def test_equals_plain_attention(small_blocks, kernel, heads, head, rotary):
    """Rows of all kinds in one call; two groups of lanes with 8 and 4 heads."""
    qkv, text_index, angles = make_case(ROWS.values(), heads, head)
    case = (qkv, text_index, angles if rotary else None)
    gradient, context = value_and_gradient(KERNELS[kernel], case, heads)
    expected_gradient, expected = value_and_gradient(attention, case, heads)
    for row, name in enumerate(ROWS):
        np.testing.assert_allclose(context[row], expected[row], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(
            gradient[row], expected_gradient[row], atol=3e-5, err_msg=f"gradient: {name}"
        )


@pytest.mark.parametrize("kernel", ["TPU", "Triton"])
def test_bfloat16_is_closer_to_float32_than_plain_attention(small_blocks, kernel):
    """The kernels keep scores in float32; plain attention rounds them."""
    rows = [ROWS["one text fills the row"], ROWS["short texts"]]
    case = make_case(rows, 2, 64, jnp.bfloat16)
    exact = value_and_gradient(attention, make_case(rows, 2, 64), 2)
    blocked = value_and_gradient(KERNELS[kernel], case, 2)
    plain = value_and_gradient(attention, case, 2)
    for ours, theirs, right in zip(blocked, plain, exact, strict=True):
        errors = [np.abs(x - right).mean() for x in (ours, theirs)]
        assert errors[0] <= 1.05 * errors[1] and errors[0] < 0.01, errors


@pytest.mark.parametrize("kernel", ["TPU", "Triton"])
def test_blocks_without_a_common_text_are_skipped(small_blocks, kernel):
    """Forward and backward: values that are no numbers cannot reach what never meets them. (A
    block that is met multiplies them by zero, which is no number either.)"""
    qkv, text_index, angles = make_case([[KEYS, ROW - KEYS]], 2, 64)
    spoilt = qkv.at[:, KEYS:].set(jnp.nan)
    of_case = {}
    for name, values in (("whole", qkv), ("spoilt", spoilt)):
        case = values, text_index, angles
        of_case[name] = value_and_gradient(KERNELS[kernel], case, 2)
    for whole, of_spoilt in zip(of_case["whole"], of_case["spoilt"], strict=True):
        np.testing.assert_array_equal(of_spoilt[:, :KEYS], whole[:, :KEYS])
        assert np.isnan(of_spoilt[:, KEYS:]).all()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=12, max_size=12), min_size=1, max_size=3),
    st.sampled_from([(3, 3), (6, 3), (2, 4)]),
    st.booleans(),
)
def test_no_pair_of_a_text_is_left_out(rows, sizes, are_sorted):
    """Of any texts, in order or not, against a loop; in order, blocks met do share a text or lie
    between two that do."""
    index = np.sort(rows) if are_sorted else np.asarray(rows)
    first, stop = map(np.asarray, blocks_to_visit(jnp.asarray(index), *sizes))
    for row, texts in enumerate(index):
        blocks, others = (texts.reshape(-1, size) for size in sizes)
        for block, own in enumerate(blocks):
            sharing = [n for n, other in enumerate(others) if set(other) & set(own)]
            assert first[row, block] <= min(sharing) and max(sharing) < stop[row, block]
            if are_sorted:
                assert (first[row, block], stop[row, block]) == (min(sharing), max(sharing) + 1)


def test_what_the_kernel_takes():
    assert supports(2048, 768, 12, jnp.bfloat16) and supports(2048, 768, 12, jnp.float32)
    assert supports(8192, 768, 12, jnp.bfloat16) and supports(1024, 1024, 8, jnp.bfloat16)
    assert not supports(16_384, 768, 12, jnp.bfloat16)  # keys that do not fit fast memory
    assert not supports(1000, 768, 12, jnp.bfloat16)  # no whole blocks
    assert not supports(1024, 96, 2, jnp.bfloat16) and not supports(1024, 128, 16, jnp.bfloat16)


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "chosen"),
    [
        ("TPU v5 lite", (512, 768, 12), "bfloat16", "fused_attention"),
        ("TPU v5 lite", (2048, 768, 12), "bfloat16", "blocked_attention"),
        ("TPU v5 lite", (16_384, 768, 12), "bfloat16", "attention"),
        ("cpu", (2048, 768, 12), "float32", "attention_in_pieces"),
        ("NVIDIA L4", (256, 768, 12), "bfloat16", "cudnn_attention"),
        ("NVIDIA L4", (512, 768, 12), "bfloat16", "cudnn_attention"),
        ("NVIDIA L4", (256, 768, 12), "float32", "long_triton_attention"),
        ("NVIDIA L4", (255, 768, 12), "bfloat16", "attention"),
        ("NVIDIA A100-SXM4-80GB", (2048, 768, 12), "bfloat16", "long_triton_attention"),
        ("NVIDIA A100-SXM4-80GB", (2048, 768, 6), "float32", "attention"),  # shared memory
        ("NVIDIA H100 80GB HBM3", (1000, 768, 12), "bfloat16", "attention"),  # no whole blocks
        ("NVIDIA H100 80GB HBM3", (2048, 96, 2), "bfloat16", "attention"),  # heads of 48
        ("Tesla T4", (256, 768, 12), "float32", "attention"),
    ],
)
def test_every_device_and_shape_has_its_function(kind, shape, dtype, chosen, monkeypatch):
    platform = kind[:3].lower() if kind[:3] in ("cpu", "TPU") else "gpu"
    monkeypatch.setattr(attention_module, "has_cudnn", lambda: True)
    with device_named(platform, kind):
        assert attention_for(*shape, dtype).__name__ == chosen


@pytest.mark.parametrize(("length", "chosen"), [(256, "long_triton_attention"), (64, "attention")])
def test_without_cudnn_short_rows_have_another_function(length, chosen, monkeypatch):
    def not_found(*arrays, **options):
        raise RuntimeError("cuDNN is not detected.")  # what JAX says

    monkeypatch.setattr(jax.nn, "dot_product_attention", not_found)
    attention_module.has_cudnn.cache_clear()
    with device_named("gpu", "NVIDIA L4"):
        assert attention_for(length, 768, 12, "bfloat16").__name__ == chosen
    attention_module.has_cudnn.cache_clear()
