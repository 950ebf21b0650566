"""Linear layers whose bias gradient is a matrix product.

XLA's sum over tokens of a bfloat16 array takes a TPU several times as long as reading it; a product
with rows of ones does not. Eight rows, a tile: a single one would be turned back into a sum.
"""

import jax
import jax.numpy as jnp
from flax import nnx

ROWS = 8


class Linear(nnx.Linear):
    """`nnx.Linear` with a bias, computing in `dtype`."""

    def __call__(self, x_RLD):
        kernel_DN, bias_N = (p[...].astype(self.dtype) for p in (self.kernel, self.bias))
        return add_bias(x_RLD.astype(self.dtype) @ kernel_DN, bias_N)


@jax.custom_vjp
def add_bias(y_RLN, bias_N):
    return y_RLN + bias_N


def _add_bias_bwd(_, dy_RLN):
    return dy_RLN, sum_tokens(dy_RLN).astype(dy_RLN.dtype)


add_bias.defvjp(lambda y_RLN, bias_N: (add_bias(y_RLN, bias_N), None), _add_bias_bwd)


def sum_tokens(x_RLN):
    """Sum over all axes but the last, in float32."""
    x_TN = x_RLN.reshape(-1, x_RLN.shape[-1])
    ones_8T = jnp.ones((ROWS, len(x_TN)), x_TN.dtype)
    precision = "highest" if x_TN.dtype == jnp.float32 else None
    sums_8N = jnp.einsum(
        "ST,TN->SN", ones_8T, x_TN, precision=precision, preferred_element_type=jnp.float32
    )
    return sums_8N[0]
