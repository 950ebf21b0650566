"""Attention over packed rows in one TPU kernel: rotary positions, scores, softmax, context.

A program of the kernel has one row of L slots in VMEM. The scores of a row never reach HBM, forward
or backward, and q, k, v are read where the projection left them, without transposes. The backward
pass computes the scores again; only its arguments are saved. Heads of J features are taken together
in groups of W = 128 lanes (head_lanes.py). Longer rows: blocked_attention.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_embed_jax.kernels.head_lanes import (
    LANES,
    MASK_VALUE,
    apply_mask,
    head_masks,
    rotate,
    rotate_back,
    rotation_lanes,
    supports_heads,
)
from moe_embed_jax.kernels.mxu import dot
from moe_embed_jax.mesh import vmem_limit_bytes

LONGEST_ROW = 512  # longer ones are left to the kernel of blocks
SCORES = 7  # [L, L] float32 in VMEM at a time, in the backward pass; by the compiler: 6.9


def supports(row_length: int, width: int, heads: int, dtype) -> bool:
    """Whether the kernel takes rows of this length and heads of this size on the TPUs of the mesh
    in context: the backward pass of a row has to fit their VMEM."""
    if row_length % LANES or row_length > LONGEST_ROW or not supports_heads(width, heads):
        return False
    lanes, item = max(width // heads, LANES), jnp.dtype(dtype).itemsize
    row = 7 * width * item + 2 * lanes * 4  # q, k, v and gradients, one of the context; cos and sin
    needed = row_length * (2 * row + SCORES * row_length * 4)  # of this row and of the next
    return needed <= vmem_limit_bytes()


def fused_attention(qkv_RLU, text_index_RL, rotation_RLJ, heads: int, interpret: bool = False):
    """Context vectors [R, L, D] of every head, side by side.

    Args:
      qkv_RLU: U = 3 D features [q | k | v], heads contiguous in each.
      text_index_RL: tokens attend to tokens of equal index.
      rotation_RLJ: (cos, signed sin) of `attention.rotation`, or None.
    """
    head = qkv_RLU.shape[-1] // 3 // heads
    cos_RLW, sin_RLW = rotation_lanes(rotation_RLJ, text_index_RL, head)
    return _attention(
        qkv_RLU, text_index_RL[:, None].astype(jnp.int32), cos_RLW, sin_RLW, heads, interpret
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(qkv_RLU, text_index_R1L, cos_RLW, sin_RLW, heads, interpret):
    return _call(_forward_kernel, qkv_RLU, text_index_R1L, cos_RLW, sin_RLW, (), heads, interpret)


def _attention_fwd(qkv_RLU, text_index_R1L, cos_RLW, sin_RLW, heads, interpret):
    arguments = (qkv_RLU, text_index_R1L, cos_RLW, sin_RLW)
    return _attention(*arguments, heads, interpret), arguments


def _attention_bwd(heads, interpret, arguments, dcontext_RLD):
    dqkv_RLU = _call(_backward_kernel, *arguments, (dcontext_RLD,), heads, interpret)
    return dqkv_RLU, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _call(kernel, qkv_RLU, text_index_R1L, cos_RLW, sin_RLW, further, heads, interpret):
    rows, length, features = qkv_RLU.shape
    width, group = features // 3, cos_RLW.shape[-1]
    inputs = (qkv_RLU, text_index_R1L, cos_RLW, sin_RLW, *further)
    out_features = features if further else width
    products = 5 if further else 2  # of [L, W] with [W, L] or [L, L] with [L, W], per head
    moved = sum(x.size * x.dtype.itemsize for x in inputs)
    moved += rows * length * out_features * qkv_RLU.dtype.itemsize
    return pl.pallas_call(
        functools.partial(kernel, heads=heads),
        grid=(rows,),
        in_specs=[pl.BlockSpec((1, *x.shape[1:]), lambda row: (row, 0, 0)) for x in inputs],
        out_specs=pl.BlockSpec((1, length, out_features), lambda row: (row, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, length, out_features), qkv_RLU.dtype),
        cost_estimate=pl.CostEstimate(
            flops=rows * heads * products * 2 * length * length * group,  # zeroed lanes included
            bytes_accessed=moved,
            transcendentals=rows * heads * length * length,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit_bytes()
        ),
        interpret=interpret,
        name="fused_attention_backward" if further else "fused_attention",
    )(*inputs)


def _forward_kernel(qkv_ref, index_ref, cos_ref, sin_ref, context_ref, *, heads):
    same_LL = _same_text(index_ref)
    for group in _groups(qkv_ref, cos_ref, sin_ref, heads):
        context_LW = jnp.zeros(group.v_LW.shape, jnp.float32)
        for mask_LW in group.heads():
            weight_LL = _softmax(group, mask_LW, same_LL)
            context_LW += dot(
                weight_LL.astype(group.v_LW.dtype), apply_mask(mask_LW, group.v_LW), 1, 0
            )
        context_ref[0, :, group.lanes] = context_LW.astype(context_ref.dtype)


def _backward_kernel(qkv_ref, index_ref, cos_ref, sin_ref, dcontext_ref, dqkv_ref, *, heads):
    same_LL = _same_text(index_ref)
    width = qkv_ref.shape[-1] // 3
    for group in _groups(qkv_ref, cos_ref, sin_ref, heads):
        dtype = group.v_LW.dtype
        dcontext_LW = dcontext_ref[0, :, group.lanes]
        dq_LW = dk_LW = dv_LW = jnp.zeros(group.v_LW.shape, jnp.float32)
        for mask_LW in group.heads():
            weight_LL = _softmax(group, mask_LW, same_LL)
            dhead_LW = apply_mask(mask_LW, dcontext_LW)
            dv_LW += dot(weight_LL.astype(dtype), dhead_LW, 0, 0)
            dweight_LL = dot(dhead_LW, group.v_LW, 1, 1)
            mean_L1 = jnp.sum(weight_LL * dweight_LL, axis=-1, keepdims=True)
            dscore_LL = (weight_LL * (dweight_LL - mean_L1)).astype(dtype)
            dq_LW += dot(dscore_LL, apply_mask(mask_LW, group.k_LW), 1, 0)
            dk_LW += dot(dscore_LL, apply_mask(mask_LW, group.q_LW), 0, 0)
        dq_LW = group.rotate_back(dq_LW * group.scale)
        for part, gradient_LW in enumerate((dq_LW, group.rotate_back(dk_LW), dv_LW)):
            start = part * width + group.lanes.start
            lanes = slice(start, start + group.lanes.stop - group.lanes.start)
            dqkv_ref[0, :, lanes] = gradient_LW.astype(dqkv_ref.dtype)


class _Group:
    """q (rotated, scaled), k (rotated) and v of the heads in one group of lanes, [L, W] each."""

    def __init__(self, qkv_ref, cos_ref, sin_ref, lanes: slice, head: int):
        width = qkv_ref.shape[-1] // 3
        self.lanes, self.head = lanes, head
        self._rotation = cos_ref[0], sin_ref[0], head
        self.scale = head**-0.5
        q_LW, k_LW, self.v_LW = (
            qkv_ref[0, :, part * width + lanes.start : part * width + lanes.stop]
            for part in range(3)
        )
        self.q_LW = (rotate(q_LW, *self._rotation) * self.scale).astype(q_LW.dtype)
        self.k_LW = rotate(k_LW, *self._rotation).astype(k_LW.dtype)

    def heads(self):
        """[L, W] masks of the lanes of each head."""
        return head_masks(self.v_LW.shape, self.head)

    def rotate_back(self, x_LW):
        return rotate_back(x_LW, *self._rotation)


def _groups(qkv_ref, cos_ref, sin_ref, heads: int):
    width, lanes = qkv_ref.shape[-1] // 3, cos_ref.shape[-1]
    for start in range(0, width, lanes):
        yield _Group(qkv_ref, cos_ref, sin_ref, slice(start, start + lanes), width // heads)


def _same_text(index_ref):
    index_1L = index_ref[0]
    row_LL = jnp.broadcast_to(index_1L, (index_1L.shape[1],) * 2)
    return row_LL == row_LL.T


def _softmax(group: _Group, mask_LW, same_LL):
    score_LL = dot(apply_mask(mask_LW, group.q_LW), group.k_LW, 1, 1)
    score_LL = jnp.where(same_LL, score_LL, MASK_VALUE)
    weight_LL = jnp.exp(score_LL - jnp.max(score_LL, axis=-1, keepdims=True))
    return weight_LL / jnp.sum(weight_LL, axis=-1, keepdims=True)
