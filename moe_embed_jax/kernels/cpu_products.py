"""Matrix products on CPUs, of float32 or bfloat16 operands, with float32 results.

Processors that multiply bfloat16 do so by instructions that add up in float32. XLA's CPU compiler
uses them under two conditions; else it makes float32 operands first:

1. The result is float32. Between products a model of `model.dtype=bfloat16` is therefore float32 on
   a CPU; operands are rounded as a product takes them.
2. The left operand is contracted over its last axis. Where it is not, as in the gradient of a
   weight, it must be turned in memory, not only in name.

That of jax 0.10 has no slices of bfloat16: where a loop reads or writes an array in parts, it
converts the whole array for each part. What a loop may carry or save is therefore stored as `bits`.
"""

import functools
import time

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from moe_embed_jax.mesh import platform
from moe_embed_jax.unstacked import Turned


def dtype_between_products(dtype):
    """What a model of `dtype` computes in outside of products, on the devices in context."""
    return jnp.dtype(jnp.float32) if platform() == "cpu" else jnp.dtype(dtype)


def dot(x_XMK, y_X, y_axis: int):
    """float32 [X, M, N]: x over its last axis, times y over axis `y_axis`: -2 (y is [X, K, N]) or
    -1 (y is [X, N, K]). X: axes that both have."""
    batch = tuple(range(x_XMK.ndim - 2))
    contracted = ((x_XMK.ndim - 1,), (y_X.ndim + y_axis,))
    return jax.lax.dot_general(
        x_XMK, y_X, (contracted, (batch, batch)), preferred_element_type=jnp.float32
    )


def turned(x_XMN):
    """[X, N, M]; bfloat16 also in memory."""
    x_XNM = x_XMN.swapaxes(-1, -2)
    return as_it_is(x_XNM) if x_XMN.dtype == jnp.bfloat16 else x_XNM


def as_it_is(x_X):
    """x, which XLA may not store with its axes in another order."""
    return with_layout_constraint(x_X, Layout(major_to_minor=tuple(range(x_X.ndim))))


def bits(x_X):
    """x; bfloat16 as uint16, which `from_bits` gives back."""
    return jax.lax.bitcast_convert_type(x_X, jnp.uint16) if x_X.dtype == jnp.bfloat16 else x_X


def from_bits(x_X):
    return jax.lax.bitcast_convert_type(x_X, jnp.bfloat16) if x_X.dtype == jnp.uint16 else x_X


@jax.custom_vjp
def product(x_TD, w_DN):
    """`x_TD @ w_DN` of operands in the dtype of x; float32. Gradients have the dtypes of x and w;
    their operands are rounded likewise, their sums are float32.

    w may be `Turned`, then without gradients."""
    if isinstance(w_DN, Turned):
        return dot(x_TD, w_DN.by_output_ND.astype(x_TD.dtype), -1)
    return dot(x_TD, jnp.asarray(w_DN.astype(x_TD.dtype)), -2)


def _product_fwd(x_TD, w_DN):
    return product(x_TD, w_DN), (bits(x_TD), bits(w_DN))


def _product_bwd(saved, dy_TN):
    x_TD, w_DN = map(from_bits, saved)
    dy_TN = dy_TN.astype(x_TD.dtype)
    dx_TD = dot(dy_TN, w_DN.astype(x_TD.dtype), -1)
    if x_TD.dtype == jnp.bfloat16 and x_TD.shape[1] > dy_TN.shape[1]:
        # The narrower one is turned: XLA computes an activation again, slowly, as it turns it.
        dw_DN = as_it_is(dot(turned(dy_TN), x_TD, -2)).T
    else:
        dw_DN = dot(turned(x_TD), dy_TN, -2)
    return dx_TD.astype(x_TD.dtype), dw_DN.astype(w_DN.dtype)


product.defvjp(_product_fwd, _product_bwd)


@functools.cache
def bfloat16_is_faster() -> bool:
    """Whether this processor multiplies bfloat16 into float32 clearly faster than float32.

    Measured, once in a process, in half a second: processors that have the instructions are not
    always faster by them. In processor time, which others that share the machine disturb least.
    """
    seconds = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        x_BD, y_nD = jnp.ones((256, 512), dtype), jnp.ones((4096, 512), dtype)
        times = []
        for _ in range(9):
            start = time.process_time()
            _measured(x_BD, y_nD).block_until_ready()
            times.append(time.process_time() - start)
        seconds[dtype] = min(times[1:])  # the first one compiles
    return seconds[jnp.bfloat16] < 0.8 * seconds[jnp.float32]


@jax.jit
def _measured(x_BD, y_nD):
    return dot(x_BD, y_nD, -1)
