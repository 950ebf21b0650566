"""The cross-entropy kernels (interpreted here) against logits in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.other_devices import device_named

from moe_embed_jax.kernels import linear_cross_entropy as module
from moe_embed_jax.losses.masked_lm import masked_cross_entropy, sums_of
from moe_embed_jax.models import heads
from moe_embed_jax.models.encoder import EncoderConfig

BLOCK, WIDTH = 128, 128
KERNEL = functools.partial(module.linear_cross_entropy, block=BLOCK, interpret=True)


def make_case(tokens, outputs, dtype=jnp.float32, scale=0.3):
    """(x, w, bias, target); every fifth target is padding."""
    rng = np.random.default_rng(0)
    x, w = (scale * rng.normal(size=(n, WIDTH)) for n in (tokens, outputs))
    target = rng.integers(0, outputs, tokens)
    target[::5] = -1
    x = jnp.asarray(x, dtype)
    # Values that are the same in both dtypes: the oracle then sees what the kernel sees.
    w = jnp.asarray(w, dtype).astype(jnp.float32)
    return x, w, jnp.asarray(rng.normal(size=outputs), jnp.float32), jnp.asarray(target, jnp.int32)


def oracle(x, w, bias, target):
    """Loss, correct predictions, gradients of x, w and bias of the summed loss, in float64."""
    x, w, bias, target = (np.asarray(array, np.float64) for array in (x, w, bias, target))
    there, target = target >= 0, np.maximum(target, 0).astype(int)
    logits = x @ w.T + bias
    own = logits[np.arange(len(x)), target]
    largest = logits.max(axis=1, keepdims=True)
    log_sum = largest + np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    softmax = np.exp(logits - log_sum)
    loss = log_sum[:, 0] - own
    dlogits = softmax.copy()
    dlogits[np.arange(len(x)), target] -= 1
    dlogits *= there[:, None]
    correct = (own >= logits.max(axis=1)) & there
    return loss[there].sum(), correct.sum(), dlogits @ w, dlogits.T @ x, dlogits.sum(axis=0)


@functools.partial(jax.jit, static_argnums=4)
def value_and_gradients(x, w, bias, target, function=KERNEL):
    def scalar(x, w, bias):
        sums = sums_of(*function(x, w, bias, target), target)
        return sums.loss, sums.correct

    (loss, correct), gradients = jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True)(
        x, w, bias
    )
    return loss, correct, *gradients


@pytest.mark.parametrize(
    ("tokens", "outputs"), [(2 * BLOCK, 3 * BLOCK), (150, 300), (1, 2)], ids=str
)
def test_equals_the_oracle(tokens, outputs):
    """Blocks that are full, blocks that are not, and less than one."""
    case = make_case(tokens, outputs)
    for found, wanted in zip(value_and_gradients(*case), oracle(*case), strict=True):
        assert found.shape == np.shape(wanted)
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_bfloat16_is_rounded_once():
    """Gradients err by what rounding one factor of each product does, 2^-9, and no more."""
    case = make_case(150, 300, jnp.bfloat16)
    loss, correct, *gradients = value_and_gradients(*case)
    wanted_loss, wanted_correct, *wanted = oracle(*case)
    assert loss == pytest.approx(wanted_loss, rel=1e-5) and correct == wanted_correct
    for found, exact in zip(gradients, wanted, strict=True):
        error = np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)
        assert error < 2**-8


def test_the_gradient_of_a_certain_prediction_keeps_its_digits():
    """softmax - 1 of 0.999 is 2^-10: in bfloat16 its difference would be 0."""
    x, w, bias, target = make_case(BLOCK, 2 * BLOCK, jnp.bfloat16)
    target = jnp.full_like(target, 7)
    bias = bias.at[7].set(14.0)
    _, _, *gradients = value_and_gradients(x, w, bias, target)
    _, _, *wanted = oracle(x, w, bias, target)
    assert -1e-2 * BLOCK < wanted[2][7] < 0
    for found, exact in zip(gradients, wanted, strict=True):
        error = np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)
        assert error < 2**-7


def test_large_logits_do_not_overflow():
    x, w, bias, target = make_case(BLOCK, 2 * BLOCK, scale=30.0)
    for found, wanted in zip(
        value_and_gradients(x, w, bias, target), oracle(x, w, bias, target), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-2)


def test_padding_cannot_matter():
    x, w, bias, target = make_case(150, 300)
    other_x = jnp.where((target < 0)[:, None], 1e3, x)
    first, second = (value_and_gradients(x, w, bias, target) for x in (x, other_x))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.any(first[2][np.asarray(target) < 0])
    assert all(np.isfinite(result).all() for result in KERNEL(other_x, w, bias, target))


def test_ties_with_the_largest_logit_are_correct():
    x, target = jnp.zeros((3, WIDTH)), jnp.array([0, 4, -1])
    sums = sums_of(*KERNEL(x, jnp.ones((5, WIDTH)), jnp.zeros(5), target), target)
    plain = masked_cross_entropy(jnp.zeros((3, 5)), target)
    assert (sums.correct, sums.count) == (plain.correct, plain.count) == (2, 2)
    assert sums.loss == pytest.approx(plain.loss)


def test_the_head_takes_the_kernel_on_tpus(monkeypatch):
    """With the same loss, and gradients of all parameters, as by logits."""
    config = EncoderConfig(
        vocab_size=300, width=WIDTH, num_heads=2, num_layers=1, ffn_width=8, moe_every=0
    )
    x, w, _, _ = make_case(12, 300)
    params, head = {"embeddings": {"token": w}}, heads.init_mlm_head(config, jax.random.key(0), 300)
    rows = x.reshape(2, 6, WIDTH), jnp.array([[0, 3], [5, 0]]), jnp.array([[2, 299], [8, -1]])

    def gradients(params, head, x_RLD):
        def loss(params, head, x_RLD):
            sums = heads.predict_tokens(config, 2, params, head, x_RLD, *rows[1:])
            return sums.loss, sums

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, head, x_RLD)

    plain = gradients(params, head, rows[0])
    monkeypatch.setattr(heads, "platform", lambda: "tpu")
    monkeypatch.setattr(heads.kernel, "linear_cross_entropy", KERNEL)
    by_kernel = gradients(params, head, rows[0])
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(by_kernel), strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(one)


@pytest.mark.parametrize(
    ("kind", "width", "block"),
    [("TPU v5 lite", 768, 1024), ("TPU v4", 768, 256), ("TPU v6 lite", 96, None)],
)
def test_the_block_fits_the_chip(kind, width, block):
    with device_named("tpu", kind):
        assert module.supports(width, jnp.bfloat16) == (block is not None)
        if block:
            assert module._block(width, jnp.bfloat16) == block
