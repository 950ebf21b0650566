"""From token states to text embeddings: a mean over each text's own tokens."""

import jax
import jax.numpy as jnp

from moe_embed_jax.mesh import BATCH_SPEC, ROWS_SPEC


def mean_pool(x_RLD, text_index_RL, slots: int):
    """float32 mean_RSD of the tokens of each text (prefix and specials included); empty slots: 0.

    A matrix product with the one-hot text index: S is small (texts per row), so this costs next to
    nothing on any device, where a scatter-add would not.
    """
    member_RLS = jax.nn.one_hot(text_index_RL, slots, dtype=jnp.float32)  # padding (-1): all zero
    sum_RSD = jnp.einsum("RLD,RLS->RSD", x_RLD.astype(jnp.float32), member_RLS, precision="highest")
    return sum_RSD / jnp.maximum(member_RLS.sum(axis=1), 1.0)[..., None]


def take_texts(pooled_CRSD, slot_BN):
    """Embeddings [B, N, D] of a batch from packed rows: a slot is row * S + text index.

    Each device packs its own texts, so a slot counts from the device's first row, chunk by chunk,
    and nothing crosses devices. Needs a mesh in context.
    """

    def local(pooled_CRSD, slot_BN):
        return pooled_CRSD.reshape(-1, pooled_CRSD.shape[-1])[slot_BN]

    return jax.shard_map(local, in_specs=(ROWS_SPEC, BATCH_SPEC), out_specs=BATCH_SPEC)(
        pooled_CRSD, slot_BN
    )
