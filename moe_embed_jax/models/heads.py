"""The masked-language-model head of BERT and RoBERTa: dense, GELU, norm, tied output matrix."""

import jax
import jax.numpy as jnp

from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.models.feed_forward import gelu


def mlm_head_shapes(config: EncoderConfig) -> dict:
    """Shapes of the head's parameters (float32); the output matrix is the word table [V, D]."""
    shapes = {
        "dense": {"kernel": (config.width, config.width), "bias": (config.width,)},
        "norm": {"scale": (config.width,), "bias": (config.width,)},
        "bias": (config.vocab_size,),
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def mlm_logits(config: EncoderConfig, head: dict, word_VD, x_TD):
    """Logits over the vocabulary, float32 [T, V], of the token states `x_TD`."""
    hidden_TD = gelu(x_TD @ head["dense"]["kernel"] + head["dense"]["bias"]).astype(jnp.float32)
    centred_TD = hidden_TD - hidden_TD.mean(axis=-1, keepdims=True)
    variance_T1 = jnp.mean(jnp.square(centred_TD), axis=-1, keepdims=True)
    hidden_TD = centred_TD * jax.lax.rsqrt(variance_T1 + config.norm_epsilon)
    hidden_TD = hidden_TD * head["norm"]["scale"] + head["norm"]["bias"]
    return hidden_TD @ word_VD.T + head["bias"]
