"""Products of blocks in Triton kernels."""

import jax
import jax.numpy as jnp


def dot(x, y, x_axis: int, y_axis: int):
    """Product of two blocks inside a kernel, over axis `x_axis` of `x` and `y_axis` of `y`.

    The result is float32. float32 blocks are rounded to TF32 where XLA's own products are: unless
    `jax_default_matmul_precision` says otherwise.
    """
    dimensions = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)
