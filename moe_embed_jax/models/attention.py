"""Bidirectional multi-head attention over packed rows, with rotary or no positions."""

import jax
import jax.numpy as jnp
from flax import nnx


def rotary(x_RLHC, position_RL, base: float):
    """Rotate the two halves of each head (NeoX layout, not interleaved); angles in float32.

    C is the head size; `position_RL` restarts at 0 for every text of a row.
    """
    half = x_RLHC.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_RL.astype(jnp.float32)[:, :, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_RLHC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_RLHC.dtype)


class Attention(nnx.Module):
    """q, k, v in one matrix laid out [q | k | v], heads contiguous in each; all with bias."""

    def __init__(self, width: int, num_heads: int, rotary_base: float | None, linear):
        """`rotary_base` None: positions are in the embeddings (learned), nothing is rotated."""
        self.num_heads = num_heads
        self.rotary_base = rotary_base
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width)

    def __call__(self, x_RLD, text_index_RL, position_RL):
        """Tokens attend to the tokens of their own text only (equal `text_index`)."""
        rows, length, width = x_RLD.shape
        qkv = self.qkv(x_RLD).reshape(rows, length, 3, self.num_heads, -1)
        q_RLHC, k_RLHC, v_RLHC = (qkv[:, :, i] for i in range(3))
        if self.rotary_base is not None:
            q_RLHC = rotary(q_RLHC, position_RL, self.rotary_base)
            k_RLHC = rotary(k_RLHC, position_RL, self.rotary_base)
        # Heads before positions: XLA:CPU multiplies these faster than strided ones.
        q_RHLC, k_RHLC, v_RHLC = (x.swapaxes(1, 2) for x in (q_RLHC, k_RLHC, v_RLHC))
        scale = q_RHLC.shape[-1] ** -0.5
        score_RHLM = jnp.einsum("RHLC,RHMC->RHLM", q_RHLC, k_RHLC).astype(jnp.float32) * scale
        # Padding sees padding (index -1 equals itself): finite numbers that nobody reads.
        same_RLM = text_index_RL[:, :, None] == text_index_RL[:, None, :]
        score_RHLM = jnp.where(same_RLM[:, None], score_RHLM, jnp.finfo(jnp.float32).min)
        weight_RHLM = jax.nn.softmax(score_RHLM, axis=-1).astype(x_RLD.dtype)
        context_RHLC = jnp.einsum("RHLM,RHMC->RHLC", weight_RHLM, v_RHLC)
        return self.out(context_RHLC.swapaxes(1, 2).reshape(rows, length, width))
