"""Bidirectional multi-head attention over packed rows, with rotary or no positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_embed_jax.kernels import (
    blocked_attention,
    fused_attention,
    long_attention,
    triton_attention,
)
from moe_embed_jax.mesh import has_triton, platform

SCORES_AT_A_TIME = 1 << 20  # on a CPU: 4 MB of float32, which its caches can hold
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
    # Heads before positions: XLA:CPU multiplies these faster than strided ones.
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
    q_RLHJ, k_RLHJ, v_RLHJ = (qkv[:, :, i] for i in range(3))
    if rotation_RLJ is not None:
        q_RLHJ, k_RLHJ = rotate(q_RLHJ, rotation_RLJ), rotate(k_RLHJ, rotation_RLJ)
    return q_RLHJ, k_RLHJ, v_RLHJ


def _same_text(text_index_RL):
    """[R, 1, L, L]: which tokens see each other. Padding sees padding (index -1 equals itself):
    finite numbers that nobody reads."""
    return (text_index_RL[:, :, None] == text_index_RL[:, None, :])[:, None]


def _side_by_side(context_RLHJ):
    return context_RLHJ.reshape(*context_RLHJ.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention_by_rows(qkv_RLU, text_index_RL, rotation_RLJ, heads: int):
    """`attention` for CPUs.

    Without gradients it computes a few rows at a time, whose scores stay in the cache: half the
    time for 16 rows of 512 tokens. With gradients it computes all rows at once, because the scores
    must be saved in any case.
    """
    rows, length, _ = qkv_RLU.shape
    most = max(SCORES_AT_A_TIME // (heads * length**2), 1)
    piece = next(size for size in range(min(most, rows), 0, -1) if rows % size == 0)
    if piece == rows:
        return attention(qkv_RLU, text_index_RL, rotation_RLJ, heads)
    pieces = jax.tree.map(
        lambda array: array.reshape(-1, piece, *array.shape[1:]),
        (qkv_RLU, text_index_RL, rotation_RLJ),
    )
    context_PRLD = jax.lax.map(lambda of_piece: attention(*of_piece, heads), pieces)
    return context_PRLD.reshape(rows, length, -1)


def _fwd(qkv_RLU, text_index_RL, rotation_RLJ, heads):
    def whole(qkv_RLU):
        return attention(qkv_RLU, text_index_RL, rotation_RLJ, heads)

    return jax.vjp(whole, qkv_RLU)


def _bwd(heads, vjp, dcontext_RLD):
    return *vjp(dcontext_RLD), None, None


attention_by_rows.defvjp(_fwd, _bwd)


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
    return attention_by_rows if platform() == "cpu" else attention


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
        return self.out(function(self.qkv(x_RLD), text_index_RL, rotation_RLJ, self.num_heads))
