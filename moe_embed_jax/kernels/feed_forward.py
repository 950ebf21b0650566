"""The dense feed-forward layer by the experts' kernels: one expert, whose tiles are all tokens.

The hidden layer, its activation and its gradient are never a separate pass over HBM.
"""

import functools

import jax
import jax.numpy as jnp

from moe_embed_jax.kernels import experts as kernels
from moe_embed_jax.kernels.mxu import sum_tokens
from moe_embed_jax.kernels.tiles import Tiles

TILE_TOKENS = 256


def supports(tokens: int, width: int, ffn_width: int) -> bool:
    """Whether the kernels take this number of tokens, and matrices of this size."""
    return tokens % TILE_TOKENS == 0 and width % 128 == 0 and ffn_width % 128 == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def fused_feed_forward(x_TD, w_in_DF, bias_in_F, w_out_FD, activation, interpret: bool = False):
    """activation(x w_in + bias_in) w_out, [T, D]."""
    weights = w_in_DF[None], bias_in_F[None], w_out_FD[None]
    return kernels.forward(x_TD, *weights, _tiles(len(x_TD)), activation, interpret)


def _fwd(x_TD, w_in_DF, bias_in_F, w_out_FD, activation, interpret):
    args = (x_TD, w_in_DF, bias_in_F, w_out_FD)
    return fused_feed_forward(*args, activation, interpret), args


def _bwd(activation, interpret, args, dy_TD):
    x_TD, *weights = args
    tiles = _tiles(len(x_TD))
    gate_T1 = jnp.ones((len(x_TD), 1), jnp.float32)
    dx_TD, dpre_TF, hidden_TF, _ = kernels.backward(
        x_TD, dy_TD, gate_T1, *(w[None] for w in weights), tiles, activation, interpret
    )
    (dw_in_DF,), (dw_out_FD,) = (
        kernels.weight_gradient(a_TK, b_TN, 1, tiles, interpret)
        for a_TK, b_TN in ((x_TD, dpre_TF), (hidden_TF, dy_TD))
    )
    return dx_TD, dw_in_DF, sum_tokens(dpre_TF).astype(weights[1].dtype), dw_out_FD


fused_feed_forward.defvjp(_fwd, _bwd)


def _tiles(tokens: int) -> Tiles:
    count = tokens // TILE_TOKENS
    is_last_t = jnp.zeros(count, jnp.int32).at[-1].set(1)
    last_1 = jnp.full(1, count - 1, jnp.int32)
    return Tiles(jnp.zeros(count, jnp.int32), last_1, is_last_t, TILE_TOKENS, tokens)
