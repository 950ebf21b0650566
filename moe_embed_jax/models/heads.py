"""The masked-language-model head of BERT and RoBERTa: dense, GELU, norm, tied output matrix."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_embed_jax.kernels import linear_cross_entropy as kernel
from moe_embed_jax.losses.masked_lm import MaskedSums, masked_cross_entropy, sums_of
from moe_embed_jax.mesh import platform
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.models.feed_forward import gelu
from moe_embed_jax.models.layer_norm import layer_norm
from moe_embed_jax.models.linear import add_bias
from moe_embed_jax.models.remat import accumulated_loss
from moe_embed_jax.shapes import PADDING

UNREACHABLE_BIAS = -100.0  # of the outputs for rows of the word table that no token has


def mlm_head_shapes(config: EncoderConfig) -> dict:
    """Shapes of the head's parameters (float32); the output matrix is the word table [V, D]."""
    return jax.eval_shape(lambda: init_mlm_head(config, jax.random.key(0), config.vocab_size))


def init_mlm_head(config: EncoderConfig, key: jax.Array, vocabulary_size: int) -> dict:
    """A fresh head. `vocabulary_size`: ids that there are; the word table may have more rows."""
    width = config.width
    spare = jnp.arange(config.vocab_size) >= vocabulary_size
    return {
        "dense": {
            "kernel": config.initializer_range * jax.random.normal(key, (width, width)),
            "bias": jnp.zeros(width),
        },
        "norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
        "bias": jnp.where(spare, UNREACHABLE_BIAS, 0.0),
    }


def mlm_logits(config: EncoderConfig, head: dict, word_VD, x_TD):
    """Logits over the vocabulary, float32 [T, V], of the token states `x_TD`; products are in the
    dtype of `x_TD`."""
    logits_TV = jnp.einsum(
        "TD,VD->TV",
        _hidden(config, head, x_TD),
        word_VD.astype(x_TD.dtype),
        preferred_element_type=jnp.float32,
    )
    return logits_TV + head["bias"]


def _hidden(config: EncoderConfig, head: dict, x_TD):
    """What the output matrix is multiplied with, [T, D] in the dtype of `x_TD`."""
    kernel_DD, bias_D = (head["dense"][name].astype(x_TD.dtype) for name in ("kernel", "bias"))
    hidden_1TD = gelu(add_bias(x_TD @ kernel_DD, bias_D))[None]
    norm = head["norm"]
    hidden_1TD = layer_norm(hidden_1TD, norm["scale"], norm["bias"], config.norm_epsilon)
    return hidden_1TD[0].astype(x_TD.dtype)


def predict_tokens(
    config: EncoderConfig, at_once: int, params: dict, head: dict, x_RLD, column_RP, target_RP
) -> MaskedSums:
    """Loss of the masked tokens of one device's rows, inside shard_map.

    Args:
      at_once: predictions that have logits at a time, float32 [at_once, V]. On TPUs no logits are
        written (kernels/linear_cross_entropy.py), and it has no effect.
      params: the encoder's, with whole embedding tables.
      x_RLD: token states. column_RP: where in its row a token was masked. target_RP: which one;
        -1 where a row has fewer than P.
    """
    x_RPD = jnp.take_along_axis(x_RLD, column_RP[..., None], axis=1)
    x_TD, target_T = x_RPD.reshape(-1, x_RPD.shape[-1]), target_RP.reshape(-1)
    word_VD = params["embeddings"]["token"]
    if platform() == "tpu" and kernel.supports(config.width, x_TD.dtype):
        hidden_TD = _hidden(config, head, x_TD)
        return sums_of(
            *kernel.linear_cross_entropy(hidden_TD, word_VD, head["bias"], target_T), target_T
        )
    slices = -(-len(target_T) // at_once)
    spare = -len(target_T) % slices
    x_TD = jnp.pad(x_TD, ((0, spare), (0, 0)))
    target_T = jnp.pad(target_T, (0, spare), constant_values=PADDING)

    def block(weights, x_TD, target_T):
        logits_TV = mlm_logits(config, weights["head"], weights["word"], x_TD)
        sums = masked_cross_entropy(logits_TV, target_T)
        return sums.loss, sums

    def cast(weights):  # the large one, once for all slices
        return weights | {"word": weights["word"].astype(x_TD.dtype)}

    weights = {"word": word_VD, "head": head}
    loss, sums = accumulated_loss(
        block, cast=cast, slices=slices, params=weights, x_RLD=x_TD, context=target_T
    )
    return dataclasses.replace(sums, loss=loss)
