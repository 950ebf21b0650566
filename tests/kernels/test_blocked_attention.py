"""The attention kernel for long rows (interpreted here) against plain attention."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_embed_jax.kernels import blocked_attention as blocked_module
from moe_embed_jax.kernels.blocked_attention import blocked_attention, supports
from moe_embed_jax.models import attention as attention_module
from moe_embed_jax.models.attention import attention, attention_for, rotation

BLOCK = 128  # half of the kernel's own, for speed; test_planning.py compiles that one
ROW = 3 * BLOCK
ROWS = {  # lengths of the texts; the rest of the row is padding
    "one text fills the row": [ROW],
    "every token is a text": [1] * ROW,
    "short texts": [40, 1, 90, 7, 20, 30, 60, 33, 5, 40],
    "texts that end where blocks do": [BLOCK, BLOCK],
    "a text over two blocks, then padding": [BLOCK + 20],
    "padding": [],
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocked_module, "BLOCK", BLOCK)


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


def value_and_gradient(function, case, heads, **options):
    qkv, text_index, angles = case
    shape = (*qkv.shape[:2], qkv.shape[2] // 3)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

    def scalar(qkv):
        context = function(qkv, text_index, angles, heads, **options)
        return jnp.sum(context * weight), context

    gradient = jax.jit(jax.grad(scalar, has_aux=True))
    return [np.asarray(x, np.float32) for x in gradient(qkv)]


@pytest.mark.parametrize(
    ("heads", "head", "rotary"), [(2, 64, True), (8, 32, True), (1, 128, True), (4, 64, False)]
)
def test_equals_plain_attention(small_blocks, heads, head, rotary):
    """Rows of all kinds in one call; two groups of lanes with 8 and 4 heads."""
    qkv, text_index, angles = make_case(ROWS.values(), heads, head)
    case = (qkv, text_index, angles if rotary else None)
    gradient, context = value_and_gradient(blocked_attention, case, heads, interpret=True)
    expected_gradient, expected = value_and_gradient(attention, case, heads)
    for row, name in enumerate(ROWS):
        np.testing.assert_allclose(context[row], expected[row], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(
            gradient[row], expected_gradient[row], atol=3e-5, err_msg=f"gradient: {name}"
        )


def test_bfloat16_is_closer_to_float32_than_plain_attention(small_blocks):
    """The kernel keeps scores in float32; plain attention rounds them."""
    rows = [ROWS["one text fills the row"], ROWS["short texts"]]
    case = make_case(rows, 2, 64, jnp.bfloat16)
    exact = value_and_gradient(attention, make_case(rows, 2, 64), 2)
    blocked = value_and_gradient(blocked_attention, case, 2, interpret=True)
    plain = value_and_gradient(attention, case, 2)
    for ours, theirs, right in zip(blocked, plain, exact, strict=True):
        errors = [np.abs(x - right).mean() for x in (ours, theirs)]
        assert errors[0] <= 1.05 * errors[1] and errors[0] < 0.01, errors


def test_blocks_without_a_common_text_are_skipped(small_blocks):
    """Forward and backward: values that are no numbers cannot reach what never meets them. (A
    block that is met multiplies them by zero, which is no number either.)"""
    qkv, text_index, angles = make_case([[BLOCK, 2 * BLOCK]], 2, 64)
    spoilt = qkv.at[:, BLOCK:].set(jnp.nan)
    of_case = {}
    for name, values in (("whole", qkv), ("spoilt", spoilt)):
        case = values, text_index, angles
        of_case[name] = value_and_gradient(blocked_attention, case, 2, interpret=True)
    for whole, of_spoilt in zip(of_case["whole"], of_case["spoilt"], strict=True):
        np.testing.assert_array_equal(of_spoilt[:, :BLOCK], whole[:, :BLOCK])
        assert np.isnan(of_spoilt[:, BLOCK:]).all()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=12, max_size=12), min_size=1, max_size=3),
    st.booleans(),
)
def test_no_pair_of_a_text_is_left_out(rows, are_sorted):
    """Of any texts, in order or not, against a loop; in order, blocks met do share a text or lie
    between two that do."""
    index = np.sort(rows) if are_sorted else np.asarray(rows)
    with mock.patch.object(blocked_module, "BLOCK", 3):
        first, stop = (
            np.asarray(x).reshape(len(rows), 4)
            for x in blocked_module._blocks_to_visit(jnp.asarray(index))
        )
    for row, texts in enumerate(index.reshape(-1, 4, 3)):
        for block in range(4):
            sharing = [n for n in range(4) if set(texts[n]) & set(texts[block])]
            assert first[row, block] <= min(sharing) and max(sharing) < stop[row, block]
            if are_sorted:
                assert (first[row, block], stop[row, block]) == (min(sharing), max(sharing) + 1)


def test_what_the_kernel_takes():
    assert supports(2048, 768, 12, jnp.bfloat16) and supports(2048, 768, 12, jnp.float32)
    assert supports(8192, 768, 12, jnp.bfloat16) and supports(1024, 1024, 8, jnp.bfloat16)
    assert not supports(16_384, 768, 12, jnp.bfloat16)  # keys that do not fit fast memory
    assert not supports(1000, 768, 12, jnp.bfloat16)  # no whole blocks
    assert not supports(1024, 96, 2, jnp.bfloat16) and not supports(1024, 128, 16, jnp.bfloat16)


def test_every_row_length_has_its_function():
    def chosen(device, *shape):
        with mock.patch.object(attention_module, "platform", lambda: device):
            return attention_for(*shape, jnp.bfloat16).__name__

    assert chosen("tpu", 512, 768, 12) == "fused_attention"
    assert chosen("tpu", 2048, 768, 12) == "blocked_attention"
    assert chosen("tpu", 16_384, 768, 12) == chosen("gpu", 2048, 768, 12) == "attention"
    assert chosen("cpu", 2048, 768, 12) == "attention_by_rows"
