"""Attention over packed rows in one TPU kernel: rotary positions, scores, softmax, context.

A program of the kernel has one row of L slots in VMEM. The scores of a row never reach HBM, forward
or backward, and q, k, v are read where the projection left them, without transposes. The backward
pass computes the scores again; only its arguments are saved. Heads of J features are taken together
in groups of W = 128 lanes (head_lanes.py). Longer rows: blocked_attention.py.

Scores are transposed, keys down and queries across: then no sum of a softmax crosses lanes, and no
product needs a transposed array of scores.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_embed_jax.kernels.head_lanes import (
    LANES,
    LOG2_E,
    MASK_VALUE,
    apply_mask,
    head_masks,
    rotate,
    rotate_back,
    rotation_lanes,
    softmax_gradient,
    supports_heads,
)
from moe_embed_jax.kernels.mxu import dot
from moe_embed_jax.mesh import vmem_limit_bytes

LONGEST_ROW = 512  # longer ones are left to the kernel of blocks
SCORES = 10  # [L, L] float32 in VMEM at a time, in the backward pass


def supports(row_length: int, width: int, heads: int, dtype) -> bool:
    """Whether the kernel takes rows of this length and heads of this size on the TPUs of the mesh
    in context: the backward pass of a row has to fit their VMEM."""
    if row_length % LANES or row_length > LONGEST_ROW:
        return False
    if not supports_heads(width, heads) or width // heads % 16:  # a tile of bfloat16
        return False
    lanes, item = max(width // heads, LANES), jnp.dtype(dtype).itemsize
    row = 8 * width * item + 2 * lanes * 4  # q, k, v, context and their gradients; cos and sin
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
    arguments = (qkv_RLU, text_index_R1L, cos_RLW, sin_RLW)
    return _forward(arguments, heads, interpret)[0]


def _attention_fwd(qkv_RLU, text_index_R1L, cos_RLW, sin_RLW, heads, interpret):
    arguments = (qkv_RLU, text_index_R1L, cos_RLW, sin_RLW)
    results = _forward(arguments, heads, interpret)
    return results[0], (*arguments, *results)


def _forward(arguments, heads, interpret):
    """(context [R, L, D], binary logarithms of the softmax's denominators [R, H, L])."""
    rows, length, features = arguments[0].shape
    out_shape = [
        jax.ShapeDtypeStruct((rows, length, features // 3), arguments[0].dtype),
        jax.ShapeDtypeStruct((rows, heads, length), jnp.float32),
    ]
    return _call(_forward_kernel, "fused_attention", 2, arguments, out_shape, heads, interpret)


def _attention_bwd(heads, interpret, saved, dcontext_RLD):
    name = "fused_attention_backward"
    out_shape = [jax.ShapeDtypeStruct(saved[0].shape, saved[0].dtype)]
    arguments = (*saved, dcontext_RLD)
    (dqkv_RLU,) = _call(_backward_kernel, name, 5, arguments, out_shape, heads, interpret)
    return dqkv_RLU, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _call(kernel, name, products, arguments, out_shape, heads, interpret):
    """`products`: of [L, W] with [W, L] or [L, L] with [L, W], per head."""
    qkv_RLU, _, cos_RLW, *_ = arguments
    rows, length, _ = qkv_RLU.shape

    def row_of(x):
        return pl.BlockSpec((1, *x.shape[1:]), lambda row: (row, 0, 0))

    return pl.pallas_call(
        functools.partial(kernel, heads=heads),
        grid=(rows,),
        in_specs=[row_of(x) for x in arguments],
        out_specs=[row_of(x) for x in out_shape],
        out_shape=out_shape,
        cost_estimate=pl.CostEstimate(
            # zeroed lanes included
            flops=rows * heads * products * 2 * length * length * cos_RLW.shape[-1],
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arguments, *out_shape)),
            transcendentals=rows * heads * length * length,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit_bytes()
        ),
        interpret=interpret,
        name=name,
    )(*arguments)


def _forward_kernel(qkv_ref, index_ref, cos_ref, sin_ref, context_ref, log_sum_ref, *, heads):
    same_KQ = _same_text(index_ref)
    for group in _groups(qkv_ref, cos_ref, sin_ref, heads):
        value_WK = group.v_KW.T
        context_hJQ = []
        for head, score_KQ in _ahead(group.heads, group.score_of):
            score_KQ = jnp.where(same_KQ, score_KQ, MASK_VALUE)
            max_1Q = jnp.max(score_KQ, axis=0, keepdims=True)
            weight_KQ = jnp.exp2(score_KQ - max_1Q)
            sum_1Q = jnp.sum(weight_KQ, axis=0, keepdims=True)
            context_JQ = dot(value_WK[head.lanes], weight_KQ.astype(value_WK.dtype), 1, 0)
            context_hJQ.append(context_JQ / sum_1Q)
            log_sum_ref[0, head.index : head.index + 1] = max_1Q + jnp.log2(sum_1Q)
        context_QW = jnp.concatenate(context_hJQ).T
        context_ref[0, :, group.lanes] = context_QW.astype(context_ref.dtype)


def _backward_kernel(
    qkv_ref,
    index_ref,
    cos_ref,
    sin_ref,
    context_ref,
    log_sum_ref,
    dcontext_ref,
    dqkv_ref,
    *,
    heads,
):
    same_KQ = _same_text(index_ref)
    width = qkv_ref.shape[-1] // 3
    for group in _groups(qkv_ref, cos_ref, sin_ref, heads):
        dtype = group.v_KW.dtype
        key_WK = group.k_KW.T
        dcontext_QW = dcontext_ref[0, :, group.lanes]
        context_QW = context_ref[0, :, group.lanes]
        dot_WQ = (context_QW.astype(jnp.float32) * dcontext_QW.astype(jnp.float32)).T

        def products_of(head, group=group, dcontext_QW=dcontext_QW):
            dhead_QW = apply_mask(head.mask_QW, dcontext_QW)
            return group.score_of(head), dhead_QW, dot(group.v_KW, dhead_QW, 1, 1)

        dk_KW = dv_KW = jnp.zeros(group.v_KW.shape, jnp.float32)
        dq_hJQ = []
        for head, (score_KQ, dhead_QW, dweight_KQ) in _ahead(group.heads, products_of):
            log_sum_1Q = log_sum_ref[0, head.index : head.index + 1]
            mean_1Q = jnp.sum(dot_WQ[head.lanes], axis=0, keepdims=True)
            weight_KQ, dscore_KQ = softmax_gradient(
                score_KQ, dweight_KQ, same_KQ, log_sum_1Q, mean_1Q
            )
            dscore_KQ = dscore_KQ.astype(dtype)
            dv_KW += dot(weight_KQ.astype(dtype), dhead_QW, 1, 0)
            dk_KW += dot(dscore_KQ, head.q_QW, 1, 0)
            dq_hJQ.append(dot(key_WK[head.lanes], dscore_KQ, 1, 0))
        dq_QW = group.rotate_back(jnp.concatenate(dq_hJQ).T * group.scale)
        dk_KW = group.rotate_back(dk_KW / LOG2_E)  # queries had this factor
        for part, gradient_LW in enumerate((dq_QW, dk_KW, dv_KW)):
            start = part * width + group.lanes.start
            lanes = slice(start, start + group.lanes.stop - group.lanes.start)
            dqkv_ref[0, :, lanes] = gradient_LW.astype(dqkv_ref.dtype)


class _Head(NamedTuple):
    """
    index: among all heads.
    lanes: of the group, that the head has.
    mask_QW: of these lanes.
    q_QW: rotated, scaled; zeros in other lanes.
    """

    index: int
    lanes: slice
    mask_QW: jax.Array
    q_QW: jax.Array


class _Group:
    """The heads in one group of lanes: k (rotated) and v, [L, W] each; q by head."""

    def __init__(self, qkv_ref, cos_ref, sin_ref, lanes: slice, head: int):
        width = qkv_ref.shape[-1] // 3
        self.lanes = lanes
        self._rotation = cos_ref[0], sin_ref[0], head
        self.scale = head**-0.5
        q_QW, k_KW, self.v_KW = (
            qkv_ref[0, :, part * width + lanes.start : part * width + lanes.stop]
            for part in range(3)
        )
        q_QW = (rotate(q_QW, *self._rotation) * (self.scale * LOG2_E)).astype(q_QW.dtype)
        self.k_KW = rotate(k_KW, *self._rotation).astype(k_KW.dtype)
        self.heads = [
            _Head(
                index=lanes.start // head + h,
                lanes=slice(h * head, (h + 1) * head),
                mask_QW=mask_QW,
                q_QW=apply_mask(mask_QW, q_QW),
            )
            for h, mask_QW in enumerate(head_masks(q_QW.shape, head))
        ]

    def score_of(self, head: _Head):
        return dot(self.k_KW, head.q_QW, 1, 1)

    def rotate_back(self, x_LW):
        return rotate_back(x_LW, *self._rotation)


def _ahead(heads: list[_Head], products_of):
    """(head, its products) for each, with those of two heads before the softmax of the first: the
    matrix units then work while it is computed. More would not fit the VMEM."""
    for start in range(0, len(heads), 2):
        pair = heads[start : start + 2]
        yield from zip(pair, [products_of(head) for head in pair], strict=True)


def _groups(qkv_ref, cos_ref, sin_ref, heads: int):
    width, lanes = qkv_ref.shape[-1] // 3, cos_ref.shape[-1]
    for start in range(0, width, lanes):
        yield _Group(qkv_ref, cos_ref, sin_ref, slice(start, start + lanes), width // heads)


def _same_text(index_ref):
    index_1Q = index_ref[0]
    row_KQ = jnp.broadcast_to(index_1Q, (index_1Q.shape[1],) * 2)
    return row_KQ == row_KQ.T
