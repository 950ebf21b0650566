"""Layer normalisation in float32 that saves its input only.

Automatic differentiation would keep two float32 copies of it for the backward pass; per layer and
chunk those are written to HBM and read back.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from moe_embed_jax.models.linear import sum_tokens


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` over the last axis, with scale and bias; the result is float32."""

    def __call__(self, x_RLD):
        return layer_norm(x_RLD, self.scale[...], self.bias[...], self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x_RLD, scale_D, bias_D, epsilon: float):
    return _normalise(x_RLD, epsilon)[0] * scale_D + bias_D


def _normalise(x_RLD, epsilon):
    """(zero mean and unit variance, 1 / standard deviation), float32."""
    x_RLD = x_RLD.astype(jnp.float32)
    centred_RLD = x_RLD - jnp.mean(x_RLD, axis=-1, keepdims=True)
    inverse_RL1 = jax.lax.rsqrt(jnp.mean(jnp.square(centred_RLD), axis=-1, keepdims=True) + epsilon)
    return centred_RLD * inverse_RL1, inverse_RL1


def _fwd(x_RLD, scale_D, bias_D, epsilon):
    return layer_norm(x_RLD, scale_D, bias_D, epsilon), (x_RLD, scale_D)


def _bwd(epsilon, saved, dy_RLD):
    x_RLD, scale_D = saved
    unit_RLD, inverse_RL1 = _normalise(x_RLD, epsilon)
    dunit_RLD = dy_RLD * scale_D
    mean_RL1 = jnp.mean(dunit_RLD, axis=-1, keepdims=True)
    slope_RL1 = jnp.mean(dunit_RLD * unit_RLD, axis=-1, keepdims=True)
    dx_RLD = inverse_RL1 * (dunit_RLD - mean_RL1 - unit_RLD * slope_RL1)
    return dx_RLD.astype(x_RLD.dtype), sum_tokens(dy_RLD * unit_RLD), sum_tokens(dy_RLD)


layer_norm.defvjp(_fwd, _bwd)
