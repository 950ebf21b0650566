"""The backward pass of layer normalisation as one TPU kernel.

It reads the input and the gradient once. XLA makes a pass for each of the four sums, and one for
the result. The mathematics is in models/layer_norm.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

TILE_TOKENS = 256


def supports(shape: tuple[int, ...]) -> bool:
    """Whether the kernel takes arrays of this shape [R, L, D]."""
    return shape[0] * shape[1] % TILE_TOKENS == 0 and shape[2] % 128 == 0


def backward(gradients, x_RLD, scale_D, dy_RLD, interpret: bool = False):
    """(dx_RLD, dscale_D, dbias_D) in one pass over tiles of tokens.

    Args:
      gradients: (x_TD, scale_1D, dy_TD) of a tile, float32 -> (dx_TD, dscale_TD, dbias_TD), of
        which the last two are still to be summed over tokens.
      x_RLD, scale_D, dy_RLD: R x L must be a multiple of TILE_TOKENS.
    """
    width = x_RLD.shape[-1]
    tokens = x_RLD.size // width
    tile = pl.BlockSpec((TILE_TOKENS, width), lambda i: (i, 0))
    row = pl.BlockSpec((1, width), lambda i: (0, 0))
    x_TD, dy_TD = (array.reshape(tokens, width) for array in (x_RLD, dy_RLD))
    dx_TD, dscale_1D, dbias_1D = pl.pallas_call(
        functools.partial(_backward_kernel, gradients),
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


def _backward_kernel(gradients, x_ref, dy_ref, scale_ref, dx_ref, dscale_ref, dbias_ref):
    x_TD, dy_TD = (ref[...].astype(jnp.float32) for ref in (x_ref, dy_ref))
    dx_TD, dscale_TD, dbias_TD = gradients(x_TD, scale_ref[...], dy_TD)
    dx_ref[...] = dx_TD.astype(dx_ref.dtype)
    is_first = pl.program_id(0) == 0
    for ref, terms_TD in ((dscale_ref, dscale_TD), (dbias_ref, dbias_TD)):
        ref[...] = jnp.where(is_first, 0.0, ref[...]) + terms_TD.sum(axis=0, keepdims=True)
