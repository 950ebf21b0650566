"""Which blocks of a packed row's tokens may share a text: all that long attention has to visit."""

import jax.numpy as jnp


def number_padding_last(text_index_RL):
    """Texts as int32, padding numbered after all of them: it stands at the end of a row, and as -1
    would be a neighbour of every text."""
    last = jnp.iinfo(jnp.int32).max
    return jnp.where(text_index_RL < 0, last, text_index_RL).astype(jnp.int32)


def blocks_to_visit(index_RL, block: int, other_block: int):
    """For each block of `block` tokens, the first block of `other_block` tokens that may share a
    text with it, and the one behind the last, [R, L / block] int32 each."""
    low_RN, high_RN = _range(index_RL, block)
    low_Rn, high_Rn = _range(index_RL, other_block)
    shares_RNn = (low_RN[:, :, None] <= high_Rn[:, None]) & (low_Rn[:, None] <= high_RN[:, :, None])
    first_RN = jnp.argmax(shares_RNn, axis=-1)
    stop_RN = shares_RNn.shape[-1] - jnp.argmax(shares_RNn[:, :, ::-1], axis=-1)
    return first_RN.astype(jnp.int32), stop_RN.astype(jnp.int32)


def _range(index_RL, block: int):
    index_RNb = index_RL.reshape(len(index_RL), -1, block)
    return index_RNb.min(axis=-1), index_RNb.max(axis=-1)
