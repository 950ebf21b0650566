"""Attention over long packed rows on GPUs (Triton): scores, softmax and context in one kernel.

A program has one block of queries of one head. It visits the blocks of keys with a running softmax
(Milakov and Gimelshein 2018; Dao et al. 2022), from the first to the last that has a token of a
text of its queries: packed rows of short texts have few. Scores never reach memory. The backward
pass computes them again from the logarithms of the softmax's denominators: one kernel visits the
keys of each block of queries for dq, another one the queries of each block of keys for dk and dv,
so that every sum has one owner and one order.

Exponentials are to the base 2, which GPUs compute; the factor is part of the scale.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moe_embed_jax.kernels.head_lanes import MASK_VALUE
from moe_embed_jax.kernels.text_blocks import blocks_to_visit, number_padding_last
from moe_embed_jax.kernels.triton_dot import dot

QUERIES = 128  # of a program of the forward pass
KEYS = 64  # at a time; of queries too in the backward pass, which has twice the sums
WARPS = 4


def supports(row_length: int, width: int, heads: int, dtype) -> bool:
    """Whether the kernels take rows of this length and heads of this size."""
    head = width // heads
    fits = head * jnp.dtype(dtype).itemsize <= 256  # shared memory, of an L4
    return row_length % QUERIES == 0 and head in (16, 32, 64, 128) and fits


def triton_attention(q_RLHJ, k_RLHJ, v_RLHJ, text_index_RL, interpret: bool = False):
    """Context [R, L, H, J]; tokens attend to tokens of equal index."""
    return _attention(q_RLHJ, k_RLHJ, v_RLHJ, number_padding_last(text_index_RL), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_RLHJ, k_RLHJ, v_RLHJ, index_RL, interpret):
    return _attention_fwd(q_RLHJ, k_RLHJ, v_RLHJ, index_RL, interpret)[0]


def _attention_fwd(q_RLHJ, k_RLHJ, v_RLHJ, index_RL, interpret):
    grid = _Grid(index_RL, q_RLHJ, QUERIES, KEYS, interpret)
    inputs = [grid.of_block(q_RLHJ), grid.of_row(k_RLHJ), grid.of_row(v_RLHJ)]
    context_RLHJ, log_sum_RHL = grid.run(
        _forward_kernel, inputs, [grid.result(q_RLHJ), grid.statistic()], "attention"
    )
    return context_RLHJ, (q_RLHJ, k_RLHJ, v_RLHJ, index_RL, context_RLHJ, log_sum_RHL)


def _attention_bwd(interpret, saved, dcontext_RLHJ):
    q_RLHJ, k_RLHJ, v_RLHJ, index_RL, context_RLHJ, log_sum_RHL = saved
    mean_RHL = jnp.einsum(
        "RLHJ,RLHJ->RHL", context_RLHJ, dcontext_RLHJ, preferred_element_type=jnp.float32
    )
    grid = _Grid(index_RL, q_RLHJ, KEYS, KEYS, interpret)
    of_queries, of_keys = (q_RLHJ, dcontext_RLHJ), (k_RLHJ, v_RLHJ)
    statistics = (log_sum_RHL, mean_RHL)
    (dq_RLHJ,) = grid.run(
        _query_gradient_kernel,
        [*map(grid.of_block, (*of_queries, *statistics)), *map(grid.of_row, of_keys)],
        [grid.result(q_RLHJ)],
        "attention_query_gradient",
    )
    dk_RLHJ, dv_RLHJ = grid.run(
        _key_gradient_kernel,
        [*map(grid.of_block, of_keys), *map(grid.of_row, (*of_queries, *statistics))],
        [grid.result(k_RLHJ), grid.result(v_RLHJ)],
        "attention_key_gradient",
    )
    return dq_RLHJ, dk_RLHJ, dv_RLHJ, None


_attention.defvjp(_attention_fwd, _attention_bwd)


class _Grid:
    """Programs over blocks of a row, heads and rows; each visits blocks of `other` tokens."""

    def __init__(self, index_RL, like_RLHJ, block: int, other: int, interpret: bool):
        self.rows, self.length, self.heads, self.head = like_RLHJ.shape
        self.block, self.other, self.interpret = block, other, interpret
        self.inputs = [(index_RL, pl.BlockSpec((None, self.length), lambda n, h, r: (r, 0)))]
        self.inputs += [
            (first_or_stop_RN, pl.BlockSpec((None, None), lambda n, h, r: (r, n)))
            for first_or_stop_RN in blocks_to_visit(index_RL, block, other)
        ]

    def of_block(self, array):
        """An input of which a program has its own block: [R, L, H, J], or a statistic [R, H, L]."""
        return array, self._statistic if array.ndim == 3 else self._block

    def of_row(self, array):
        """An input of which a program has the whole row."""
        if array.ndim == 3:
            return array, pl.BlockSpec((None, None, self.length), lambda n, h, r: (r, h, 0))
        shape = (None, self.length, None, self.head)
        return array, pl.BlockSpec(shape, lambda n, h, r: (r, 0, h, 0))

    def result(self, like_RLHJ):
        return jax.ShapeDtypeStruct(like_RLHJ.shape, like_RLHJ.dtype), self._block

    def statistic(self):
        shape = (self.rows, self.heads, self.length)
        return jax.ShapeDtypeStruct(shape, jnp.float32), self._statistic

    @property
    def _block(self):
        return pl.BlockSpec((None, self.block, None, self.head), lambda n, h, r: (r, n, h, 0))

    @property
    def _statistic(self):
        return pl.BlockSpec((None, None, self.block), lambda n, h, r: (r, h, n))

    def run(self, kernel, inputs, results, name: str):
        inputs = [*self.inputs, *inputs]
        return pl.pallas_call(
            functools.partial(kernel, block=self.block, other=self.other),
            grid=(self.length // self.block, self.heads, self.rows),
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in results],
            out_shape=[shape for shape, _ in results],
            compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=2),
            interpret=self.interpret,
            name=name,
        )(*(array for array, _ in inputs))


def _forward_kernel(
    index_ref, first_ref, stop_ref, q_ref, k_ref, v_ref, context_ref, log_sum_ref, *, block, other
):
    q_QJ = q_ref[...]
    index_Q = index_ref[pl.ds(pl.program_id(0) * block, block)]

    def add(n, state):
        max_Q, sum_Q, total_QJ = state
        keys = pl.ds(n * other, other)
        score_QK = _scores(q_QJ, k_ref[keys, :], index_Q, index_ref[keys])
        before_Q, max_Q = max_Q, jnp.maximum(max_Q, score_QK.max(axis=1))
        # What masked keys add before the query's first own key, that key shrinks to zero.
        shrink_Q, weight_QK = jnp.exp2(before_Q - max_Q), jnp.exp2(score_QK - max_Q[:, None])
        sum_Q = sum_Q * shrink_Q + weight_QK.sum(axis=1)
        context_QJ = dot(weight_QK.astype(q_QJ.dtype), v_ref[keys, :], 1, 0)
        return max_Q, sum_Q, total_QJ * shrink_Q[:, None] + context_QJ

    start = (
        jnp.full((block,), MASK_VALUE, jnp.float32),
        jnp.zeros((block,), jnp.float32),
        jnp.zeros(q_QJ.shape, jnp.float32),
    )
    max_Q, sum_Q, total_QJ = jax.lax.fori_loop(first_ref[...], stop_ref[...], add, start)
    context_ref[...] = (total_QJ / sum_Q[:, None]).astype(context_ref.dtype)
    log_sum_ref[...] = max_Q + jnp.log2(sum_Q)


def _query_gradient_kernel(
    index_ref,
    first_ref,
    stop_ref,
    q_ref,
    dcontext_ref,
    log_sum_ref,
    mean_ref,
    k_ref,
    v_ref,
    dq_ref,
    *,
    block,
    other,
):
    q_QJ, dcontext_QJ = q_ref[...], dcontext_ref[...]
    log_sum_Q, mean_Q = log_sum_ref[...], mean_ref[...]
    index_Q = index_ref[pl.ds(pl.program_id(0) * block, block)]

    def add(n, dq_QJ):
        keys = pl.ds(n * other, other)
        k_KJ = k_ref[keys, :]
        score_QK = _scores(q_QJ, k_KJ, index_Q, index_ref[keys])
        _, dscore_QK = _gradient(score_QK, log_sum_Q, mean_Q, dcontext_QJ, v_ref[keys, :])
        return dq_QJ + dot(dscore_QK.astype(k_KJ.dtype), k_KJ, 1, 0)

    start_QJ = jnp.zeros(q_QJ.shape, jnp.float32)
    dq_QJ = jax.lax.fori_loop(first_ref[...], stop_ref[...], add, start_QJ)
    dq_ref[...] = (dq_QJ * q_QJ.shape[1] ** -0.5).astype(dq_ref.dtype)


def _key_gradient_kernel(
    index_ref,
    first_ref,
    stop_ref,
    k_ref,
    v_ref,
    q_ref,
    dcontext_ref,
    log_sum_ref,
    mean_ref,
    dk_ref,
    dv_ref,
    *,
    block,
    other,
):
    k_KJ, v_KJ = k_ref[...], v_ref[...]
    index_K = index_ref[pl.ds(pl.program_id(0) * block, block)]

    def add(n, gradients):
        dk_KJ, dv_KJ = gradients
        queries = pl.ds(n * other, other)
        q_QJ, dcontext_QJ = q_ref[queries, :], dcontext_ref[queries, :]
        score_QK = _scores(q_QJ, k_KJ, index_ref[queries], index_K)
        statistics = log_sum_ref[queries], mean_ref[queries]
        weight_QK, dscore_QK = _gradient(score_QK, *statistics, dcontext_QJ, v_KJ)
        dv_KJ += dot(weight_QK.astype(dcontext_QJ.dtype), dcontext_QJ, 0, 0)
        return dk_KJ + dot(dscore_QK.astype(q_QJ.dtype), q_QJ, 0, 0), dv_KJ

    zeros_KJ = jnp.zeros(k_KJ.shape, jnp.float32)
    dk_KJ, dv_KJ = jax.lax.fori_loop(first_ref[...], stop_ref[...], add, (zeros_KJ, zeros_KJ))
    dk_ref[...] = (dk_KJ * k_KJ.shape[1] ** -0.5).astype(dk_ref.dtype)
    dv_ref[...] = dv_KJ.astype(dv_ref.dtype)


def _scores(q_QJ, k_KJ, index_Q, index_K):
    """Logarithms to the base 2, before the softmax's denominator."""
    scale = q_QJ.shape[1] ** -0.5 * math.log2(math.e)
    score_QK = dot(q_QJ, k_KJ, 1, 1) * scale
    return jnp.where(index_Q[:, None] == index_K[None], score_QK, MASK_VALUE)


def _gradient(score_QK, log_sum_Q, mean_Q, dcontext_QJ, v_KJ):
    """(weights of the softmax, gradient of q k^T times the root of J)."""
    weight_QK = jnp.exp2(score_QK - log_sum_Q[:, None])
    dweight_QK = dot(dcontext_QJ, v_KJ, 1, 1)
    return weight_QK, weight_QK * (dweight_QK - mean_Q[:, None])
