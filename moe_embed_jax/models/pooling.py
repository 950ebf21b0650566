"""From token states to text embeddings: the mean, first or last of each text's own tokens."""

import jax
import jax.numpy as jnp


def pool_texts(pooling: str, x_RLD, text_index_RL, slots: int):
    """float32 pooled_RSD of each text, prefix and special tokens included; empty slots: 0.

    Args:
      pooling: one of `encoder_config.POOLINGS`: "mean" of the tokens of a text, "cls" its first
        token, "last" its last one. The tokens of a text stand next to each other in its row.
      x_RLD: token states. text_index_RL: which text of its row a token belongs to, -1 padding.
      slots: S, the most texts in a row.

    A matrix product with the one-hot text index: S is small (texts per row), so this costs next to
    nothing on any device, where a scatter-add would not.
    """
    member_RLS = jax.nn.one_hot(text_index_RL, slots, dtype=jnp.float32)  # padding (-1): all zero
    if pooling != "mean":
        beside = jnp.pad(text_index_RL, ((0, 0), (1, 1)), constant_values=-1)
        neighbour_RL = beside[:, :-2] if pooling == "cls" else beside[:, 2:]
        member_RLS *= (text_index_RL != neighbour_RL)[..., None]
    sum_RSD = jnp.einsum("RLD,RLS->RSD", x_RLD.astype(jnp.float32), member_RLS, precision="highest")
    return sum_RSD / jnp.maximum(member_RLS.sum(axis=1), 1.0)[..., None]


def take_texts(pooled_RSD, slot_BN):
    """Embeddings [B, N, D] of a device's texts from its packed rows: a slot is row * S + text
    index, rows counted chunk by chunk. A device packs its own texts, so nothing crosses devices."""
    return pooled_RSD.reshape(-1, pooled_RSD.shape[-1])[slot_BN]
