"""From token states to text embeddings: a mean over each text's own tokens."""

import jax
import jax.numpy as jnp


def mean_pool(x_RLD, text_index_RL, slots: int):
    """float32 mean_RSD of the tokens of each text (prefix and specials included); empty slots: 0.

    A matrix product with the one-hot text index: S is small (texts per row), so this costs next to
    nothing on any device, where a scatter-add would not.
    """
    member_RLS = jax.nn.one_hot(text_index_RL, slots, dtype=jnp.float32)  # padding (-1): all zero
    sum_RSD = jnp.einsum("RLD,RLS->RSD", x_RLD.astype(jnp.float32), member_RLS, precision="highest")
    return sum_RSD / jnp.maximum(member_RLS.sum(axis=1), 1.0)[..., None]


def take_texts(pooled_RSD, slot_BN):
    """Embeddings [B, N, D] of a device's texts from its packed rows: a slot is row * S + text
    index, rows counted chunk by chunk. A device packs its own texts, so nothing crosses devices."""
    return pooled_RSD.reshape(-1, pooled_RSD.shape[-1])[slot_BN]
