"""The dense feed-forward layer: two matrices with bias and an exact (erf) GELU between them."""

import functools

import jax
from flax import nnx

gelu = functools.partial(jax.nn.gelu, approximate=False)


class FeedForward(nnx.Module):
    def __init__(self, width: int, ffn_width: int, linear):
        self.up = linear(width, ffn_width)
        self.down = linear(ffn_width, width)

    def __call__(self, x_RLD):
        return self.down(gelu(self.up(x_RLD)))
