"""Attention over packed rows in one TPU kernel: rotary positions, scores, softmax, context.

A program of the kernel has one row of L slots in VMEM. The scores of a row never reach HBM, forward
or backward, and q, k, v are read where the projection left them, without transposes. The backward
pass computes the scores again; only its arguments are saved. Heads of C features are taken together
in groups of P = 128 lanes (head_lanes.py). Longer rows: blocked_attention.py.
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


def fused_attention(qkv_RLM, text_index_RL, rotation_RLC, heads: int, interpret: bool = False):
    """Context vectors [R, L, D] of every head, side by side.

    Args:
      qkv_RLM: M = 3 D features [q | k | v], heads contiguous in each.
      text_index_RL: tokens attend to tokens of equal index.
      rotation_RLC: (cos, signed sin) of `attention.rotation`, or None.
    """
    head = qkv_RLM.shape[-1] // 3 // heads
    cos_RLP, sin_RLP = rotation_lanes(rotation_RLC, text_index_RL, head)
    return _attention(
        qkv_RLM, text_index_RL[:, None].astype(jnp.int32), cos_RLP, sin_RLP, heads, interpret
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(qkv_RLM, text_index_R1L, cos_RLP, sin_RLP, heads, interpret):
    return _call(_forward_kernel, qkv_RLM, text_index_R1L, cos_RLP, sin_RLP, (), heads, interpret)


def _attention_fwd(qkv_RLM, text_index_R1L, cos_RLP, sin_RLP, heads, interpret):
    arguments = (qkv_RLM, text_index_R1L, cos_RLP, sin_RLP)
    return _attention(*arguments, heads, interpret), arguments


def _attention_bwd(heads, interpret, arguments, dcontext_RLD):
    dqkv_RLM = _call(_backward_kernel, *arguments, (dcontext_RLD,), heads, interpret)
    return dqkv_RLM, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _call(kernel, qkv_RLM, text_index_R1L, cos_RLP, sin_RLP, further, heads, interpret):
    rows, length, features = qkv_RLM.shape
    width, group = features // 3, cos_RLP.shape[-1]
    inputs = (qkv_RLM, text_index_R1L, cos_RLP, sin_RLP, *further)
    out_features = features if further else width
    products = 5 if further else 2  # of [L, P] with [P, L] or [L, L] with [L, P], per head
    moved = sum(x.size * x.dtype.itemsize for x in inputs)
    moved += rows * length * out_features * qkv_RLM.dtype.itemsize
    return pl.pallas_call(
        functools.partial(kernel, heads=heads),
        grid=(rows,),
        in_specs=[pl.BlockSpec((1, *x.shape[1:]), lambda row: (row, 0, 0)) for x in inputs],
        out_specs=pl.BlockSpec((1, length, out_features), lambda row: (row, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, length, out_features), qkv_RLM.dtype),
        cost_estimate=pl.CostEstimate(
            flops=rows * heads * products * 2 * length * length * group,  # zeroed lanes included
            bytes_accessed=moved,
            transcendentals=rows * heads * length * length,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit_bytes()
        ),
        interpret=interpret,
        name="attention_backward" if further else "attention",
    )(*inputs)


def _forward_kernel(qkv_ref, index_ref, cos_ref, sin_ref, context_ref, *, heads):
    same_LL = _same_text(index_ref)
    for group in _groups(qkv_ref, cos_ref, sin_ref, heads):
        context_LP = jnp.zeros(group.v_LP.shape, jnp.float32)
        for mask_LP in group.heads():
            weight_LL = _softmax(group, mask_LP, same_LL)
            context_LP += dot(
                weight_LL.astype(group.v_LP.dtype), apply_mask(mask_LP, group.v_LP), 1, 0
            )
        context_ref[0, :, group.lanes] = context_LP.astype(context_ref.dtype)


def _backward_kernel(qkv_ref, index_ref, cos_ref, sin_ref, dcontext_ref, dqkv_ref, *, heads):
    same_LL = _same_text(index_ref)
    width = qkv_ref.shape[-1] // 3
    for group in _groups(qkv_ref, cos_ref, sin_ref, heads):
        dtype = group.v_LP.dtype
        dcontext_LP = dcontext_ref[0, :, group.lanes]
        dq_LP = dk_LP = dv_LP = jnp.zeros(group.v_LP.shape, jnp.float32)
        for mask_LP in group.heads():
            weight_LL = _softmax(group, mask_LP, same_LL)
            dhead_LP = apply_mask(mask_LP, dcontext_LP)
            dv_LP += dot(weight_LL.astype(dtype), dhead_LP, 0, 0)
            dweight_LL = dot(dhead_LP, group.v_LP, 1, 1)
            mean_L1 = jnp.sum(weight_LL * dweight_LL, axis=-1, keepdims=True)
            dscore_LL = (weight_LL * (dweight_LL - mean_L1)).astype(dtype)
            dq_LP += dot(dscore_LL, apply_mask(mask_LP, group.k_LP), 1, 0)
            dk_LP += dot(dscore_LL, apply_mask(mask_LP, group.q_LP), 0, 0)
        dq_LP = group.rotate_back(dq_LP * group.scale)
        for part, gradient_LP in enumerate((dq_LP, group.rotate_back(dk_LP), dv_LP)):
            start = part * width + group.lanes.start
            lanes = slice(start, start + group.lanes.stop - group.lanes.start)
            dqkv_ref[0, :, lanes] = gradient_LP.astype(dqkv_ref.dtype)


class _Group:
    """q (rotated, scaled), k (rotated) and v of the heads in one group of lanes, [L, P] each."""

    def __init__(self, qkv_ref, cos_ref, sin_ref, lanes: slice, head: int):
        width = qkv_ref.shape[-1] // 3
        self.lanes, self.head = lanes, head
        self._rotation = cos_ref[0], sin_ref[0], head
        self.scale = head**-0.5
        q_LP, k_LP, self.v_LP = (
            qkv_ref[0, :, part * width + lanes.start : part * width + lanes.stop]
            for part in range(3)
        )
        self.q_LP = (rotate(q_LP, *self._rotation) * self.scale).astype(q_LP.dtype)
        self.k_LP = rotate(k_LP, *self._rotation).astype(k_LP.dtype)

    def heads(self):
        """[L, P] masks of the lanes of each head."""
        return head_masks(self.v_LP.shape, self.head)

    def rotate_back(self, x_LP):
        return rotate_back(x_LP, *self._rotation)


def _groups(qkv_ref, cos_ref, sin_ref, heads: int):
    width, lanes = qkv_ref.shape[-1] // 3, cos_ref.shape[-1]
    for start in range(0, width, lanes):
        yield _Group(qkv_ref, cos_ref, sin_ref, slice(start, start + lanes), width // heads)


def _same_text(index_ref):
    index_1L = index_ref[0]
    row_LL = jnp.broadcast_to(index_1L, (index_1L.shape[1],) * 2)
    return row_LL == row_LL.T


def _softmax(group: _Group, mask_LP, same_LL):
    score_LL = dot(apply_mask(mask_LP, group.q_LP), group.k_LP, 1, 1)
    score_LL = jnp.where(same_LL, score_LL, MASK_VALUE)
    weight_LL = jnp.exp(score_LL - jnp.max(score_LL, axis=-1, keepdims=True))
    return weight_LL / jnp.sum(weight_LL, axis=-1, keepdims=True)
