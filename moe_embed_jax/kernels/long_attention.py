"""Attention over rows that are too long for the kernel of blocked_attention.py.

It is JAX's flash attention for TPUs, which holds one block of keys at a time in VMEM.
"""

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.flash_attention import (
    BlockSizes,
    SegmentIds,
    flash_attention,
)

BLOCK = 512


def supports(row_length: int) -> bool:
    """Whether the kernel takes rows of this length."""
    return row_length > BLOCK and row_length % BLOCK == 0


def long_attention(q_RHLJ, k_RHLJ, v_RHLJ, text_index_RL):
    """Context [R, H, L, J]; tokens attend to tokens of equal index."""
    segments = SegmentIds(text_index_RL.astype(jnp.int32), text_index_RL.astype(jnp.int32))
    blocks = BlockSizes(
        block_q=BLOCK,
        block_k_major=BLOCK,
        block_k=BLOCK,
        block_b=1,
        block_q_major_dkv=BLOCK,
        block_k_major_dkv=BLOCK,
        block_k_dkv=BLOCK,
        block_q_dkv=BLOCK,
        block_k_major_dq=BLOCK,
        block_k_dq=BLOCK,
        block_q_dq=BLOCK,
    )
    return flash_attention(
        q_RHLJ,
        k_RHLJ,
        v_RHLJ,
        segment_ids=segments,
        sm_scale=q_RHLJ.shape[-1] ** -0.5,
        block_sizes=blocks,
    )
