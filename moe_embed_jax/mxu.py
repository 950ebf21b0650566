"""The product of two tiles inside a TPU kernel."""

import jax
import jax.numpy as jnp


def dot(x, y, x_axis: int, y_axis: int):
    """float32 product of two matrices over axis `x_axis` of the one and `y_axis` of the other;
    float32 ones are multiplied exactly."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=precision,
    )
