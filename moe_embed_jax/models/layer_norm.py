"""Layer normalisation in float32 that saves its input only.

Automatic differentiation would keep two float32 copies of the input for the backward pass; per
layer and chunk those are written to HBM and read back. On TPUs the backward pass is one kernel
(kernels/layer_norm.py).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from moe_embed_jax.kernels import layer_norm as kernel
from moe_embed_jax.kernels.mxu import sum_tokens
from moe_embed_jax.mesh import platform


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` over the last axis, with scale and bias; the result is float32."""

    def __call__(self, x_RLD):
        return layer_norm(x_RLD, self.scale[...], self.bias[...], self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x_RLD, scale_D, bias_D, epsilon: float):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, float32."""
    return _normalise(x_RLD, epsilon)[0] * scale_D + bias_D


def _normalise(x_RLD, epsilon):
    """(zero mean and unit variance, 1 / standard deviation), float32."""
    is_rounded = x_RLD.dtype == jnp.bfloat16
    x_RLD = x_RLD.astype(jnp.float32)
    mean_RL1 = jnp.mean(x_RLD, axis=-1, keepdims=True)
    centred_RLD = x_RLD - mean_RL1
    if is_rounded:
        # One pass over x for both sums, which XLA appends to the product that makes x. What cancels
        # is 2^-24 of mean^2 / variance, and x itself is rounded to 2^-9.
        variance_RL1 = jnp.mean(jnp.square(x_RLD), axis=-1, keepdims=True) - jnp.square(mean_RL1)
        variance_RL1 = jnp.maximum(variance_RL1, 0.0)
    else:
        variance_RL1 = jnp.mean(jnp.square(centred_RLD), axis=-1, keepdims=True)
    inverse_RL1 = jax.lax.rsqrt(variance_RL1 + epsilon)
    return centred_RLD * inverse_RL1, inverse_RL1


def gradients(x_RLD, scale_D, dy_RLD, epsilon: float):
    """(dx, dscale, dbias), float32 [R, L, D]; the last two are still to be summed over tokens."""
    unit_RLD, inverse_RL1 = _normalise(x_RLD, epsilon)
    dunit_RLD = dy_RLD * scale_D
    mean_RL1 = jnp.mean(dunit_RLD, axis=-1, keepdims=True)
    slope_RL1 = jnp.mean(dunit_RLD * unit_RLD, axis=-1, keepdims=True)
    dx_RLD = inverse_RL1 * (dunit_RLD - mean_RL1 - unit_RLD * slope_RL1)
    return dx_RLD, dy_RLD * unit_RLD, dy_RLD


def _fwd(x_RLD, scale_D, bias_D, epsilon):
    return layer_norm(x_RLD, scale_D, bias_D, epsilon), (x_RLD, scale_D)


def _bwd(epsilon, saved, dy_RLD):
    x_RLD, scale_D = saved
    of_tokens = functools.partial(gradients, epsilon=epsilon)
    if platform() == "tpu" and x_RLD.dtype == jnp.bfloat16 and kernel.supports(x_RLD.shape):
        # The sum of gradients was rounded to bfloat16 on its way here: the layer's result was.
        return kernel.backward(of_tokens, x_RLD, scale_D, dy_RLD.astype(x_RLD.dtype))
    dx_RLD, dscale_RLD, dbias_RLD = of_tokens(x_RLD, scale_D, dy_RLD)
    return dx_RLD.astype(x_RLD.dtype), sum_tokens(dscale_RLD), sum_tokens(dbias_RLD)


layer_norm.defvjp(_fwd, _bwd)
