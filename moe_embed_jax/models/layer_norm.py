"""Layer normalisation in float32 that saves its input only.

Automatic differentiation would keep two float32 copies of it for the backward pass; per layer and
chunk those are written to HBM and read back. On TPUs the backward pass is one kernel, which reads
the input and the gradient once (XLA: a pass for each of the four sums, and one for the result).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import pallas as pl

from moe_embed_jax.mesh import platform
from moe_embed_jax.models.linear import sum_tokens

TILE_TOKENS = 256


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` over the last axis, with scale and bias; the result is float32."""

    def __call__(self, x_RLD):
        return layer_norm(x_RLD, self.scale[...], self.bias[...], self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x_RLD, scale_D, bias_D, epsilon: float):
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


def _fwd(x_RLD, scale_D, bias_D, epsilon):
    return layer_norm(x_RLD, scale_D, bias_D, epsilon), (x_RLD, scale_D)


def _bwd(epsilon, saved, dy_RLD):
    x_RLD, scale_D = saved
    if platform() == "tpu" and x_RLD.dtype == jnp.bfloat16 and _supports(x_RLD.shape):
        # The sum of gradients was rounded to bfloat16 on its way here: the layer's result was.
        return gradients_in_one_pass(x_RLD, scale_D, dy_RLD.astype(x_RLD.dtype), epsilon)
    unit_RLD, inverse_RL1 = _normalise(x_RLD, epsilon)
    dx_RLD = _input_gradient(unit_RLD, inverse_RL1, dy_RLD * scale_D)
    return dx_RLD.astype(x_RLD.dtype), sum_tokens(dy_RLD * unit_RLD), sum_tokens(dy_RLD)


layer_norm.defvjp(_fwd, _bwd)


def _input_gradient(unit_RLD, inverse_RL1, dunit_RLD):
    mean_RL1 = jnp.mean(dunit_RLD, axis=-1, keepdims=True)
    slope_RL1 = jnp.mean(dunit_RLD * unit_RLD, axis=-1, keepdims=True)
    return inverse_RL1 * (dunit_RLD - mean_RL1 - unit_RLD * slope_RL1)


def _supports(shape: tuple[int, ...]) -> bool:
    """Whether the kernel takes arrays of this shape [R, L, D]."""
    return shape[0] * shape[1] % TILE_TOKENS == 0 and shape[2] % 128 == 0


def gradients_in_one_pass(x_RLD, scale_D, dy_RLD, epsilon: float, interpret: bool = False):
    """(dx_RLD, dscale_D, dbias_D) by the kernel; R x L must be a multiple of TILE_TOKENS."""
    width = x_RLD.shape[-1]
    tokens = x_RLD.size // width
    tile = pl.BlockSpec((TILE_TOKENS, width), lambda i: (i, 0))
    row = pl.BlockSpec((1, width), lambda i: (0, 0))
    x_TD, dy_TD = (array.reshape(tokens, width) for array in (x_RLD, dy_RLD))
    dx_TD, dscale_1D, dbias_1D = pl.pallas_call(
        functools.partial(_backward_kernel, epsilon=epsilon),
        grid=(tokens // TILE_TOKENS,),
        in_specs=[tile, tile, row],
        out_specs=[tile, row, row],
        out_shape=[
            jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype),
            *[jax.ShapeDtypeStruct((1, width), jnp.float32)] * 2,
        ],
        cost_estimate=pl.CostEstimate(
            flops=0,  # of matrix units
            bytes_accessed=2 * x_TD.size * x_TD.dtype.itemsize + dy_TD.size * dy_TD.dtype.itemsize,
            transcendentals=x_TD.size,  # its arithmetic is like that of one
        ),
        interpret=interpret,
        name="layer_norm_backward",
    )(x_TD, dy_TD, scale_D.astype(jnp.float32)[None])
    return dx_TD.reshape(x_RLD.shape), dscale_1D[0], dbias_1D[0]


def _backward_kernel(x_ref, dy_ref, scale_ref, dx_ref, dscale_ref, dbias_ref, *, epsilon):
    dy_TD = dy_ref[...].astype(jnp.float32)
    unit_TD, inverse_T1 = _normalise(x_ref[...].astype(jnp.float32), epsilon)
    dx_TD = _input_gradient(unit_TD, inverse_T1, dy_TD * scale_ref[...])
    dx_ref[...] = dx_TD.astype(dx_ref.dtype)
    is_first = pl.program_id(0) == 0
    for ref, of_tile_TD in ((dscale_ref, dy_TD * unit_TD), (dbias_ref, dy_TD)):
        ref[...] = jnp.where(is_first, 0.0, ref[...]) + of_tile_TD.sum(axis=0, keepdims=True)
