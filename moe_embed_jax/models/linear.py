"""Linear layers whose bias gradient is a matrix product (`kernels.mxu.sum_tokens`)."""

import jax
from flax import nnx

from moe_embed_jax.kernels.cpu_products import product
from moe_embed_jax.kernels.mxu import sum_tokens
from moe_embed_jax.mesh import platform


class Linear(nnx.Linear):
    """`nnx.Linear` with a bias, computing in `dtype`; on CPUs the result is float32."""

    def __call__(self, x_RLD):
        kernel_DN, bias_N = (p[...].astype(self.dtype) for p in (self.kernel, self.bias))
        x_RLD = x_RLD.astype(self.dtype)
        if platform() == "cpu":
            y_TN = product(x_RLD.reshape(-1, x_RLD.shape[-1]), kernel_DN)
            return add_bias(y_TN.reshape(*x_RLD.shape[:-1], -1), bias_N)
        return add_bias(x_RLD @ kernel_DN, bias_N)


@jax.custom_vjp
def add_bias(y_RLN, bias_N):
    """`y_RLN + bias_N` in the dtype of y. The gradient of the bias is in the bias's dtype."""
    return y_RLN + bias_N.astype(y_RLN.dtype)


def _add_bias_bwd(bias_N, dy_RLN):
    return dy_RLN, sum_tokens(dy_RLN).astype(bias_N.dtype)


add_bias.defvjp(lambda y_RLN, bias_N: (add_bias(y_RLN, bias_N), bias_N), _add_bias_bwd)
