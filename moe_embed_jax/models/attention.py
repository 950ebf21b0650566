"""Bidirectional multi-head attention over packed rows, with rotary or no positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_embed_jax.kernels import (
    blocked_attention,
    cpu_attention,
    fused_attention,
    long_attention,
    triton_attention,
)
from moe_embed_jax.mesh import has_triton, platform

LONGEST_MASK = 512  # tokens of a row: for cuDNN, [R, L, L] in memory


def rotation(position_RL, head: int, base: float):
    """(cos, signed sin), float32 [R, L, J] each, that turn the two halves of a head (NeoX layout,
    not interleaved): x * cos + halves exchanged(x) * sin. `position_RL` restarts at 0 for every
    text of a row."""
    half = head // 2
    # By the host, rounded once: a processor's own float32 power is one rounding off, which a
    # position of 400 multiplies to 3e-5.
    frequency = np.power(float(base), -np.arange(half) / half).astype(np.float32)
    angle_RLH = position_RL.astype(jnp.float32)[..., None] * frequency
    cos, sin = jnp.cos(angle_RLH), jnp.sin(angle_RLH)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x_RLHJ, rotation_RLJ):
    """`x_RLHJ` turned by the tables of `rotation`; computed in float32, in the dtype of x."""
    cos_RL1J, sin_RL1J = (table[:, :, None] for table in rotation_RLJ)
    first, second = jnp.split(x_RLHJ.astype(jnp.float32), 2, axis=-1)
    exchanged = jnp.concatenate([second, first], axis=-1)
    rotated = x_RLHJ.astype(jnp.float32) * cos_RL1J + exchanged * sin_RL1J
    return rotated.astype(x_RLHJ.dtype)


def attention(qkv_RLU, text_index_RL, rotation_RLJ, heads: int):
    """Context vectors [R, L, D]; the arguments of `fused_attention.fused_attention`.

    Plain XLA, for devices and shapes that the kernels do not take. On a TPU, rows that are too long
    for the kernels use `long_attention`.
    """
    q_RLHJ, k_RLHJ, v_RLHJ = _rotated_heads(qkv_RLU, rotation_RLJ, heads)
    q_RHLJ, k_RHLJ, v_RHLJ = (x.swapaxes(1, 2) for x in (q_RLHJ, k_RLHJ, v_RLHJ))
    if platform() == "tpu" and long_attention.supports(qkv_RLU.shape[1]):
        context_RHLJ = long_attention.long_attention(q_RHLJ, k_RHLJ, v_RHLJ, text_index_RL)
        return _side_by_side(context_RHLJ.swapaxes(1, 2))
    scale = q_RHLJ.shape[-1] ** -0.5
    score_RHLk = jnp.einsum("RHLJ,RHkJ->RHLk", q_RHLJ, k_RHLJ).astype(jnp.float32) * scale
    score_RHLk = jnp.where(_same_text(text_index_RL), score_RHLk, jnp.finfo(jnp.float32).min)
    weight_RHLk = jax.nn.softmax(score_RHLk, axis=-1).astype(qkv_RLU.dtype)
    context_RHLJ = jnp.einsum("RHLk,RHkJ->RHLJ", weight_RHLk, v_RHLJ)
    return _side_by_side(context_RHLJ.swapaxes(1, 2))


def cudnn_attention(
    qkv_RLU, text_index_RL, rotation_RLJ, heads: int, implementation: str = "cudnn"
):
    """`attention` by NVIDIA's cuDNN, for rows so short that a mask [R, L, L] costs little.

    implementation: "xla" computes the same call without a GPU.
    """
    q_RLHJ, k_RLHJ, v_RLHJ = _rotated_heads(qkv_RLU, rotation_RLJ, heads)
    mask_R1Lk = _same_text(text_index_RL)
    context_RLHJ = jax.nn.dot_product_attention(
        q_RLHJ, k_RLHJ, v_RLHJ, mask=mask_R1Lk, implementation=implementation
    )
    return _side_by_side(context_RLHJ)


def long_triton_attention(
    qkv_RLU, text_index_RL, rotation_RLJ, heads: int, interpret: bool = False
):
    """`attention` by the kernels of triton_attention.py, for long rows on GPUs."""
    q_RLHJ, k_RLHJ, v_RLHJ = _rotated_heads(qkv_RLU, rotation_RLJ, heads)
    context_RLHJ = triton_attention.triton_attention(
        q_RLHJ, k_RLHJ, v_RLHJ, text_index_RL, interpret
    )
    return _side_by_side(context_RLHJ)


def _rotated_heads(qkv_RLU, rotation_RLJ, heads: int):
    """q and k, rotated, and v, [R, L, H, J] each."""
    qkv = qkv_RLU.reshape(*qkv_RLU.shape[:2], 3, heads, -1)
    q_RLHJ, k_RLHJ, v_RLHJ = (x.squeeze(2) for x in jax.lax.split(qkv, (1, 1, 1), axis=2))
    if rotation_RLJ is not None:
        q_RLHJ, k_RLHJ = rotate(q_RLHJ, rotation_RLJ), rotate(k_RLHJ, rotation_RLJ)
    return q_RLHJ, k_RLHJ, v_RLHJ


def _same_text(text_index_RL):
    """[R, 1, L, L]: which tokens see each other. Padding sees padding (index -1 equals itself):
    finite numbers that nobody reads."""
    return (text_index_RL[:, :, None] == text_index_RL[:, None, :])[:, None]


def _side_by_side(context_RLHJ):
    return context_RLHJ.reshape(*context_RLHJ.shape[:2], -1)


def attention_in_pieces(qkv_RLU, text_index_RL, rotation_RLJ, heads: int):
    """`attention` by cpu_attention.py, for CPUs; float32."""
    q_RLHJ, k_RLHJ, v_RLHJ = _rotated_heads(qkv_RLU, rotation_RLJ, heads)
    q_RLHJ *= q_RLHJ.shape[-1] ** -0.5
    # Heads before positions: XLA:CPU multiplies these faster than strided ones.
    heads_first = (x.swapaxes(1, 2) for x in (q_RLHJ, k_RLHJ, v_RLHJ))
    context_RHLJ = cpu_attention.cpu_attention(*heads_first, text_index_RL)
    return _side_by_side(context_RHLJ.swapaxes(1, 2))


def attention_for(row_length: int, width: int, heads: int, dtype):
    """The function that computes attention for this shape on the devices in context."""
    shape = row_length, width, heads, dtype
    if platform() == "tpu" and fused_attention.supports(*shape):
        return fused_attention.fused_attention
    if platform() == "tpu" and blocked_attention.supports(*shape):
        return blocked_attention.blocked_attention
    if has_triton() and _cudnn_supports(*shape) and has_cudnn():
        return cudnn_attention
    if has_triton() and triton_attention.supports(*shape):
        return long_triton_attention
    if platform() == "cpu":
        return attention_in_pieces
    return attention


def _cudnn_supports(row_length: int, width: int, heads: int, dtype) -> bool:
    head = width // heads
    takes_shape = row_length % 2 == 0 and head % 8 == 0 and head <= 128
    return jnp.dtype(dtype) == jnp.bfloat16 and row_length <= LONGEST_MASK and takes_shape


@functools.cache
def has_cudnn() -> bool:
    """Whether JAX finds cuDNN's library, for which it looks as it traces a call.

    JAX's CUDA builds bring it. Where programs are compiled for a GPU that is elsewhere it may be
    missing.
    """
    x_RLHJ = jax.ShapeDtypeStruct((1, 2, 1, 8), jnp.bfloat16)
    call = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        jax.eval_shape(call, x_RLHJ, x_RLHJ, x_RLHJ)
    except RuntimeError:
        return False
    return True


class Attention(nnx.Module):
    """q, k, v in one matrix laid out [q | k | v], heads contiguous in each; all with bias."""

    def __init__(self, width: int, num_heads: int, linear):
        self.num_heads = num_heads
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width)

    def __call__(self, x_RLD, text_index_RL, rotation_RLJ):
        """Tokens attend to the tokens of their own text only (equal `text_index`).

        `rotation_RLJ` None: positions are in the embeddings (learned), nothing is rotated.
        """
        _, length, width = x_RLD.shape
        function = attention_for(length, width, self.num_heads, self.qkv.dtype)
        qkv_RLU = self.qkv(x_RLD).astype(self.qkv.dtype)
        return self.out(function(qkv_RLU, text_index_RL, rotation_RLJ, self.num_heads))
