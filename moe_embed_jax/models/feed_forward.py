"""The dense feed-forward layer: two matrices with bias and an exact (erf) GELU between them.

On TPUs by kernels (kernels/feed_forward.py), where they take its shape.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moe_embed_jax.kernels.feed_forward import fused_feed_forward, supports
from moe_embed_jax.mesh import platform
from moe_embed_jax.models.linear import add_bias


def gelu(x):
    """x * Phi(x), Phi the normal distribution's; exact to the rounding of `x.dtype`."""
    if x.dtype == jnp.bfloat16:
        return _gelu_bfloat16(x)
    if platform() == "gpu":
        return jax.nn.gelu(x, approximate=False)
    return _gelu_by_erf(x)


@jax.custom_vjp
def _gelu_by_erf(x):
    """For TPU kernels, which know erf, but neither erfc nor the derivative of erf in jax 0.12; and
    for CPUs, on which XLA's erfc takes two to three times as long."""
    return x * _phi(x)


def _phi(x):
    return 0.5 * (1.0 + jax.lax.erf(x / math.sqrt(2)))


def _gelu_by_erf_bwd(x, dy):
    bell = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return ((_phi(x) + x * bell) * dy,)


_gelu_by_erf.defvjp(lambda x: (_gelu_by_erf(x), x), _gelu_by_erf_bwd)


@jax.custom_vjp
def _gelu_bfloat16(x):
    return gelu_and_slope(x.astype(jnp.float32))[0].astype(jnp.bfloat16)


def gelu_and_slope(x):
    """(GELU, its derivative) of float32 `x`.

    Phi to 7.5e-8 (Abramowitz and Stegun 7.1.26), 3e-5 of what bfloat16 rounds off, in a third of
    the operations of XLA's float32 erf; the slope shares its exponential.
    """
    bell = jnp.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.3275911 / math.sqrt(2) * jnp.abs(x))
    tail = 1.061405429
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = tail * t + coefficient
    tail = 0.5 * tail * t * bell  # Phi(-|x|)
    phi = jnp.where(x < 0, tail, 1.0 - tail)
    return x * phi, phi + x * bell / math.sqrt(2 * math.pi)


def _gelu_bfloat16_bwd(x, dy):
    slope = gelu_and_slope(x.astype(jnp.float32))[1]
    return ((slope * dy.astype(jnp.float32)).astype(jnp.bfloat16),)


_gelu_bfloat16.defvjp(lambda x: (_gelu_bfloat16(x), x), _gelu_bfloat16_bwd)


class FeedForward(nnx.Module):
    def __init__(self, width: int, ffn_width: int, linear):
        self.up = linear(width, ffn_width)
        self.down = linear(ffn_width, width)

    def __call__(self, x_RLD):
        tokens, width, ffn_width = x_RLD.size // x_RLD.shape[-1], *self.up.kernel.shape
        if platform() == "tpu" and supports(tokens, width, ffn_width):
            weights = self.up.kernel, self.up.bias, self.down.kernel
            weights = [weight[...].astype(x_RLD.dtype) for weight in weights]
            y_TD = fused_feed_forward(x_RLD.reshape(tokens, width), *weights, gelu)
            return add_bias(y_TD.reshape(x_RLD.shape), self.down.bias[...].astype(x_RLD.dtype))
        return self.down(gelu(self.up(x_RLD)))
