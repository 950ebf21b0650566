"""Bidirectional multi-head attention over packed rows, with rotary or no positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_embed_jax.kernels import blocked_attention, fused_attention, long_attention
from moe_embed_jax.mesh import platform

SCORES_AT_A_TIME = 1 << 20  # on a CPU: 4 MB of float32, which its caches can hold


def rotation(position_RL, head: int, base: float):
    """(cos, signed sin), float32 [R, L, C] each, that turn the two halves of a head (NeoX layout,
    not interleaved): x * cos + halves exchanged(x) * sin. `position_RL` restarts at 0 for every
    text of a row."""
    half = head // 2
    # By the host, rounded once: a processor's own float32 power is one rounding off, which a
    # position of 400 multiplies to 3e-5.
    frequency = np.power(float(base), -np.arange(half) / half).astype(np.float32)
    angle_RLH = position_RL.astype(jnp.float32)[..., None] * frequency
    cos, sin = jnp.cos(angle_RLH), jnp.sin(angle_RLH)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x_RLHC, rotation_RLC):
    """`x_RLHC` turned by the tables of `rotation`; computed in float32, in the dtype of x."""
    cos_RL1C, sin_RL1C = (table[:, :, None] for table in rotation_RLC)
    first, second = jnp.split(x_RLHC.astype(jnp.float32), 2, axis=-1)
    exchanged = jnp.concatenate([second, first], axis=-1)
    rotated = x_RLHC.astype(jnp.float32) * cos_RL1C + exchanged * sin_RL1C
    return rotated.astype(x_RLHC.dtype)


def attention(qkv_RLM, text_index_RL, rotation_RLC, heads: int):
    """Context vectors [R, L, D]; the arguments of `fused_attention.fused_attention`.

    Plain XLA, for devices other than TPUs and for shapes that the kernels do not take. On a TPU,
    rows that are too long for the kernels use `long_attention`.
    """
    rows, length, features = qkv_RLM.shape
    qkv = qkv_RLM.reshape(rows, length, 3, heads, -1)
    q_RLHC, k_RLHC, v_RLHC = (qkv[:, :, i] for i in range(3))
    if rotation_RLC is not None:
        q_RLHC, k_RLHC = rotate(q_RLHC, rotation_RLC), rotate(k_RLHC, rotation_RLC)
    # Heads before positions: XLA:CPU multiplies these faster than strided ones.
    q_RHLC, k_RHLC, v_RHLC = (x.swapaxes(1, 2) for x in (q_RLHC, k_RLHC, v_RLHC))
    if platform() == "tpu" and long_attention.supports(length):
        context_RHLC = long_attention.long_attention(q_RHLC, k_RHLC, v_RHLC, text_index_RL)
        return context_RHLC.swapaxes(1, 2).reshape(rows, length, features // 3)
    scale = q_RHLC.shape[-1] ** -0.5
    score_RHLM = jnp.einsum("RHLC,RHMC->RHLM", q_RHLC, k_RHLC).astype(jnp.float32) * scale
    # Padding sees padding (index -1 equals itself): finite numbers that nobody reads.
    same_RLM = text_index_RL[:, :, None] == text_index_RL[:, None, :]
    score_RHLM = jnp.where(same_RLM[:, None], score_RHLM, jnp.finfo(jnp.float32).min)
    weight_RHLM = jax.nn.softmax(score_RHLM, axis=-1).astype(qkv_RLM.dtype)
    context_RHLC = jnp.einsum("RHLM,RHMC->RHLC", weight_RHLM, v_RHLC)
    return context_RHLC.swapaxes(1, 2).reshape(rows, length, features // 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention_by_rows(qkv_RLM, text_index_RL, rotation_RLC, heads: int):
    """`attention` for CPUs.

    Without gradients it computes a few rows at a time, whose scores stay in the cache: half the
    time for 16 rows of 512 tokens. With gradients it computes all rows at once, because the scores
    must be saved in any case.
    """
    rows, length, _ = qkv_RLM.shape
    most = max(SCORES_AT_A_TIME // (heads * length**2), 1)
    piece = next(size for size in range(min(most, rows), 0, -1) if rows % size == 0)
    if piece == rows:
        return attention(qkv_RLM, text_index_RL, rotation_RLC, heads)
    pieces = jax.tree.map(
        lambda array: array.reshape(-1, piece, *array.shape[1:]),
        (qkv_RLM, text_index_RL, rotation_RLC),
    )
    context_PRLD = jax.lax.map(lambda of_piece: attention(*of_piece, heads), pieces)
    return context_PRLD.reshape(rows, length, -1)


def _fwd(qkv_RLM, text_index_RL, rotation_RLC, heads):
    def whole(qkv_RLM):
        return attention(qkv_RLM, text_index_RL, rotation_RLC, heads)

    return jax.vjp(whole, qkv_RLM)


def _bwd(heads, vjp, dcontext_RLD):
    return *vjp(dcontext_RLD), None, None


attention_by_rows.defvjp(_fwd, _bwd)


def attention_for(row_length: int, width: int, heads: int, dtype):
    """The function that computes attention for this shape on the devices of the mesh."""
    shape = row_length, width, heads, dtype
    if platform() == "tpu" and fused_attention.supports(*shape):
        return fused_attention.fused_attention
    if platform() == "tpu" and blocked_attention.supports(*shape):
        return blocked_attention.blocked_attention
    return attention_by_rows if platform() == "cpu" else attention


class Attention(nnx.Module):
    """q, k, v in one matrix laid out [q | k | v], heads contiguous in each; all with bias."""

    def __init__(self, width: int, num_heads: int, linear):
        self.num_heads = num_heads
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width)

    def __call__(self, x_RLD, text_index_RL, rotation_RLC):
        """Tokens attend to the tokens of their own text only (equal `text_index`).

        `rotation_RLC` None: positions are in the embeddings (learned), nothing is rotated.
        """
        _, length, width = x_RLD.shape
        function = attention_for(length, width, self.num_heads, self.qkv.dtype)
        return self.out(function(self.qkv(x_RLD), text_index_RL, rotation_RLC, self.num_heads))
