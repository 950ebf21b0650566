"""Products on the matrix units (MXU) of a TPU."""

import jax
import jax.numpy as jnp

ROWS = 8


def dot(x, y, x_axis: int, y_axis: int):
    """Product of two tiles inside a kernel, over axis `x_axis` of `x` and `y_axis` of `y`.

    The result is float32. float32 tiles are multiplied exactly.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=precision,
    )


def sum_tokens(x_RLN):
    """Sum over all axes but the last, in float32, as a matrix product.

    XLA's sum over tokens of a bfloat16 array takes a TPU several times as long as reading it; a
    product with rows of ones does not. Eight rows are a tile; XLA would turn a single row back into
    a sum.
    """
    x_TN = x_RLN.reshape(-1, x_RLN.shape[-1])
    ones_8T = jnp.ones((ROWS, len(x_TN)), x_TN.dtype)
    precision = "highest" if x_TN.dtype == jnp.float32 else None
    sums_8N = jnp.einsum(
        "ST,TN->SN", ones_8T, x_TN, precision=precision, preferred_element_type=jnp.float32
    )
    return sums_8N[0]
