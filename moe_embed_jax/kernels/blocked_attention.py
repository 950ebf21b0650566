"""Attention over long packed rows in one TPU kernel: rotary positions, scores, softmax, context.

A program has one block of queries, and the keys and values of its row, for one group of heads
(head_lanes.py) in VMEM. Scores [block, block] never reach HBM. q, k, v are read where the
projection left them, without transposes. A program visits the blocks of keys with a running softmax
(Milakov and Gimelshein 2018; Dao et al. 2022), from the first to the last block that has a token of
a text of its queries: packed rows of short texts have few. The backward pass computes the scores
again from the logarithms of the softmax's denominators, which are saved beside arguments and
result.

Scores are transposed, keys down and queries across. Values per query (maximum, denominator) then
lie along lanes, take no lanes in HBM, and no sum crosses lanes.
"""

import functools

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
from moe_embed_jax.kernels.text_blocks import blocks_to_visit, number_padding_last
from moe_embed_jax.mesh import vmem_limit_bytes

BLOCK = 256  # queries of a program
KEYS = 512  # that the forward pass visits at a time where they divide the row; backward: BLOCK
SPARE_BYTES = 2**20  # of VMEM, for what does not grow with the row


def supports(row_length: int, width: int, heads: int, dtype) -> bool:
    """Whether the kernel takes rows of this length and heads of this size on the TPUs of the mesh
    in context: a row has to fit their VMEM."""
    if not supports_heads(width, heads) or width // heads % 16 or row_length % BLOCK:
        return False
    lanes, item = max(width // heads, LANES), jnp.dtype(dtype).itemsize
    arriving = 2 * 2 * lanes * (item + 4)  # k, v, cos and sin of this row and of the next
    kept = 2 * lanes * (item + 4) + LANES * 4  # keys twice, dk, dv; which text
    return row_length * (arriving + kept) + SPARE_BYTES <= vmem_limit_bytes()


def blocked_attention(qkv_RLU, text_index_RL, rotation_RLJ, heads: int, interpret: bool = False):
    """Context vectors [R, L, D] of every head, side by side.

    Args: see `fused_attention.fused_attention`.
    """
    head = qkv_RLU.shape[-1] // 3 // heads
    index_R1L = number_padding_last(text_index_RL)[:, None]
    tables = rotation_lanes(rotation_RLJ, text_index_RL, head)
    return _attention(qkv_RLU, index_R1L, *tables, heads, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(qkv_RLU, index_R1L, cos_RLW, sin_RLW, heads, interpret):
    arguments = (qkv_RLU, index_R1L, cos_RLW, sin_RLW)
    return _AttentionGrid(*arguments, heads, interpret).forward()[0]


def _attention_fwd(qkv_RLU, index_R1L, cos_RLW, sin_RLW, heads, interpret):
    arguments = (qkv_RLU, index_R1L, cos_RLW, sin_RLW)
    results = _AttentionGrid(*arguments, heads, interpret).forward()
    return results[0], (arguments, results)


def _attention_bwd(heads, interpret, saved, dcontext_RLD):
    arguments, results = saved
    dqkv_RLU = _AttentionGrid(*arguments, heads, interpret).backward(*results, dcontext_RLD)
    return dqkv_RLU, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


class _AttentionGrid:
    """The kernels over a grid of rows R, groups of heads G, and blocks of queries N."""

    def __init__(self, qkv_RLU, index_R1L, cos_RLW, sin_RLW, heads: int, interpret: bool):
        self.rows, self.length, features = qkv_RLU.shape
        self.width, self.lanes = features // 3, cos_RLW.shape[-1]
        self.blocks, self.groups = self.length // BLOCK, self.width // self.lanes
        self.heads, self.dtype, self.interpret = heads, qkv_RLU.dtype, interpret
        self.heads_of_group = heads // self.groups
        self.index_RL = index_R1L[:, 0]
        self.inputs = [
            (qkv_RLU, self._queries()),
            *((qkv_RLU, self._row_of_group(part)) for part in (1, 2)),
            *((array, self._row(array)) for array in (index_R1L, cos_RLW, sin_RLW)),
        ]

    def forward(self):
        """(context [R, L, D], binary logarithms of denominators [R, G, heads of a group, L])."""
        log_sum = (self.rows, self.groups, self.heads_of_group, self.length)
        keys = BLOCK if self.length % KEYS else KEYS
        return self._run(
            _forward_kernel,
            keys=keys,
            inputs=self.inputs,
            grid_steps=self.blocks,
            out_specs=[self._queries(), self._statistics()],
            out_shape=[
                jax.ShapeDtypeStruct((self.rows, self.length, self.width), self.dtype),
                jax.ShapeDtypeStruct(log_sum, jnp.float32),
            ],
            scratch=self._keys(keys),
            products=2,
            name="blocked_attention",
        )

    def backward(self, context_RLD, log_sum_RGHL, dcontext_RLD):
        """dqkv [R, L, U].

        Of the 3 N programs of a row and group the first N have a block of queries each and write
        its dq; then the sums over queries are complete, and N write dk of a block each, N dv.
        """
        blocks, groups = self.blocks, self.groups
        shape = (self.rows, self.length, 3 * self.width)
        (dqkv_RLU,) = self._run(
            functools.partial(_backward_kernel, blocks=blocks),
            keys=BLOCK,
            inputs=[
                *self.inputs,
                (context_RLD, self._queries()),
                (log_sum_RGHL, self._statistics()),
                (dcontext_RLD, self._queries()),
            ],
            grid_steps=3 * blocks,
            out_specs=[
                pl.BlockSpec(
                    (1, BLOCK, self.lanes),
                    lambda r, g, i, *_: (r, i % blocks, i // blocks * groups + g),
                )
            ],
            out_shape=[jax.ShapeDtypeStruct(shape, self.dtype)],
            scratch=[
                *self._keys(BLOCK),
                *[pltpu.VMEM((blocks, BLOCK, self.lanes), jnp.float32)] * 2,
            ],
            products=5,
            name="blocked_attention_backward",
        )
        return dqkv_RLU

    def _queries(self):
        """A block of queries, lanes of the group; the last one for programs that have none."""
        last = self.blocks - 1
        block = (1, BLOCK, self.lanes)
        return pl.BlockSpec(block, lambda r, g, i, *_: (r, jnp.minimum(i, last), g))

    def _statistics(self):
        last = self.blocks - 1
        block = (1, 1, self.heads_of_group, BLOCK)
        return pl.BlockSpec(block, lambda r, g, i, *_: (r, g, 0, jnp.minimum(i, last)))

    def _row_of_group(self, part: int):
        """All of a row, lanes of the group in part 1 (k) or 2 (v) of qkv."""
        groups = self.groups
        block = (1, self.length, self.lanes)
        return pl.BlockSpec(block, lambda r, g, i, *_: (r, 0, part * groups + g))

    def _row(self, array):
        return pl.BlockSpec((1, *array.shape[1:]), lambda r, g, i, *_: (r, 0, 0))

    def _keys(self, keys: int):
        """Scratch for `_prepare_keys`, `keys` at a time."""
        blocks = self.length // keys
        return [
            pltpu.VMEM((blocks, keys, self.lanes), self.dtype),
            pltpu.VMEM((blocks, self.lanes, keys), self.dtype),
            pltpu.VMEM((blocks, keys, LANES), jnp.int32),
        ]

    def _run(
        self, kernel, *, keys, inputs, grid_steps, out_specs, out_shape, scratch, products, name
    ):
        visited = blocks_to_visit(self.index_RL, BLOCK, keys)
        # qkv is named three times for its three parts, and read once.
        arrays = [array for array, _ in inputs]
        scores = self.rows * self.heads * self.length**2
        return pl.pallas_call(
            functools.partial(kernel, head=self.width // self.heads),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(self.rows, self.groups, grid_steps),
                in_specs=[spec for _, spec in inputs],
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=out_shape,
            # As if every block visited every other one, zeroed lanes included.
            cost_estimate=pl.CostEstimate(
                flops=products * 2 * scores * self.lanes,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays[2:], *out_shape)),
                transcendentals=scores,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=vmem_limit_bytes(),
            ),
            interpret=self.interpret,
            name=name,
        )(*(block_RN.reshape(-1) for block_RN in visited), *arrays)


def _forward_kernel(
    first_ref,
    stop_ref,
    q_ref,
    k_ref,
    v_ref,
    index_ref,
    cos_ref,
    sin_ref,
    context_ref,
    log_sum_ref,
    key_ref,
    value_WK_ref,
    key_index_ref,
    *,
    head,
):
    row, block, blocks = pl.program_id(0), pl.program_id(2), pl.num_programs(2)

    @pl.when(block == 0)
    def _():
        def prepare(n):
            keys = _prepare_keys(
                n, k_ref, index_ref, cos_ref, sin_ref, key_ref, key_index_ref, head
            )
            value_WK_ref[n] = v_ref[0, keys].T

        _for_each(len(key_ref), prepare)

    q_QW = _queries(q_ref, cos_ref, sin_ref, block, head, LOG2_E)
    q_hQW = [apply_mask(mask_QW, q_QW) for mask_QW in head_masks(q_QW.shape, head)]
    index_1Q = index_ref[0, :, _slots(block)]

    def add_block(n, states):
        same_KQ = key_index_ref[n][:, :1] == index_1Q
        # Products of all heads first: the matrix units then work while a softmax is computed.
        score_hKQ = [dot(key_ref[n], q_QW, 1, 1) for q_QW in q_hQW]
        results = []
        for h, (score_KQ, (max_1Q, sum_1Q, total_JQ)) in enumerate(
            zip(score_hKQ, states, strict=True)
        ):
            score_KQ = jnp.where(same_KQ, score_KQ, MASK_VALUE)
            before_1Q, max_1Q = max_1Q, jnp.maximum(max_1Q, score_KQ.max(axis=0, keepdims=True))
            # What masked keys add before the query's first own key, that key shrinks to zero.
            shrink_1Q, weight_KQ = jnp.exp2(before_1Q - max_1Q), jnp.exp2(score_KQ - max_1Q)
            sum_1Q = sum_1Q * shrink_1Q + weight_KQ.sum(axis=0, keepdims=True)
            value_JK = value_WK_ref[n, h * head : (h + 1) * head]
            context_JQ = dot(value_JK, weight_KQ.astype(value_JK.dtype), 1, 0)
            results.append((max_1Q, sum_1Q, total_JQ * shrink_1Q + context_JQ))
        return tuple(results)

    start = (
        jnp.full((1, BLOCK), MASK_VALUE, jnp.float32),
        jnp.zeros((1, BLOCK), jnp.float32),
        jnp.zeros((head, BLOCK), jnp.float32),
    )
    here = row * blocks + block
    states = jax.lax.fori_loop(first_ref[here], stop_ref[here], add_block, (start,) * len(q_hQW))
    context_WQ = jnp.concatenate([total_JQ / sum_1Q for _, sum_1Q, total_JQ in states])
    context_ref[0] = context_WQ.T.astype(context_ref.dtype)
    for h, (max_1Q, sum_1Q, _) in enumerate(states):
        log_sum_ref[0, 0, h : h + 1] = max_1Q + jnp.log2(sum_1Q)


def _backward_kernel(
    first_ref,
    stop_ref,
    q_ref,
    k_ref,
    v_ref,
    index_ref,
    cos_ref,
    sin_ref,
    context_ref,
    log_sum_ref,
    dcontext_ref,
    dqkv_ref,
    key_ref,
    key_WK_ref,
    key_index_ref,
    dkey_ref,
    dvalue_ref,
    *,
    head,
    blocks,
):
    row, step = pl.program_id(0), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        def prepare(n):
            _prepare_keys(n, k_ref, index_ref, cos_ref, sin_ref, key_ref, key_index_ref, head)
            key_WK_ref[n] = key_ref[n].T
            dkey_ref[n] = dvalue_ref[n] = jnp.zeros(dkey_ref.shape[1:], jnp.float32)

        _for_each(blocks, prepare)

    @pl.when(step < blocks)
    def _():
        q_QW = _queries(q_ref, cos_ref, sin_ref, step, head, LOG2_E)
        dcontext_QW = dcontext_ref[0]
        index_1Q = index_ref[0, :, _slots(step)]
        dot_WQ = (context_ref[0].astype(jnp.float32) * dcontext_QW.astype(jnp.float32)).T

        def add_block(n, dq_hJQ):
            same_KQ = key_index_ref[n][:, :1] == index_1Q
            value_KW = v_ref[0, _slots(n)]
            dkey_KW = dvalue_KW = jnp.zeros(value_KW.shape, jnp.float32)
            heads = [
                (apply_mask(mask_QW, q_QW), apply_mask(mask_QW, dcontext_QW))
                for mask_QW in head_masks(q_QW.shape, head)
            ]
            products = [
                (dot(key_ref[n], head_q_QW, 1, 1), dot(value_KW, dhead_QW, 1, 1))
                for head_q_QW, dhead_QW in heads
            ]
            results = []
            for h, (head_q_QW, dhead_QW) in enumerate(heads):
                lanes = slice(h * head, (h + 1) * head)
                score_KQ, dweight_KQ = products[h]
                log_sum_1Q = log_sum_ref[0, 0, h : h + 1]
                mean_1Q = dot_WQ[lanes].sum(axis=0, keepdims=True)
                weight_KQ, dscore_KQ = softmax_gradient(
                    score_KQ, dweight_KQ, same_KQ, log_sum_1Q, mean_1Q
                )
                dscore_KQ = dscore_KQ.astype(q_QW.dtype)
                dvalue_KW += dot(weight_KQ.astype(q_QW.dtype), dhead_QW, 1, 0)
                dkey_KW += dot(dscore_KQ, head_q_QW, 1, 0)
                results.append(dq_hJQ[h] + dot(key_WK_ref[n, lanes], dscore_KQ, 1, 0))
            dkey_ref[n] += dkey_KW
            dvalue_ref[n] += dvalue_KW
            return tuple(results)

        here = row * blocks + step
        start = (jnp.zeros((head, BLOCK), jnp.float32),) * (q_QW.shape[1] // head)
        dq_hJQ = jax.lax.fori_loop(first_ref[here], stop_ref[here], add_block, start)
        dq_QW = jnp.concatenate(dq_hJQ).T * head**-0.5
        rotation = cos_ref[0, _slots(step)], sin_ref[0, _slots(step)]
        dqkv_ref[0] = rotate_back(dq_QW, *rotation, head).astype(dqkv_ref.dtype)

    @pl.when((step >= blocks) & (step < 2 * blocks))
    def _():
        n = step - blocks
        rotation = cos_ref[0, _slots(n)], sin_ref[0, _slots(n)]
        dkey_KW = dkey_ref[n] / LOG2_E  # queries had this factor
        dqkv_ref[0] = rotate_back(dkey_KW, *rotation, head).astype(dqkv_ref.dtype)

    @pl.when(step >= 2 * blocks)
    def _():
        dqkv_ref[0] = dvalue_ref[step - 2 * blocks].astype(dqkv_ref.dtype)


def _slots(block, size: int | None = None):
    """The slots of a block in its row."""
    size = size or BLOCK
    return pl.ds(pl.multiple_of(block * size, size), size)


def _for_each(blocks, body):
    def step(n, carry):
        body(n)
        return carry

    jax.lax.fori_loop(0, blocks, step, 0)


def _queries(q_ref, cos_ref, sin_ref, block, head: int, factor: float = 1.0):
    """Rotated and scaled."""
    rotation = cos_ref[0, _slots(block)], sin_ref[0, _slots(block)]
    return (rotate(q_ref[0], *rotation, head) * (factor * head**-0.5)).astype(q_ref.dtype)


def _prepare_keys(n, k_ref, index_ref, cos_ref, sin_ref, key_ref, key_index_ref, head: int):
    """Block n of the rotated keys, and of their texts, one per sublane; returns its slots."""
    keys = key_ref.shape[1]
    slots = _slots(n, keys)
    key_KW = rotate(k_ref[0, slots], cos_ref[0, slots], sin_ref[0, slots], head)
    key_ref[n] = key_KW.astype(key_ref.dtype)
    key_index_ref[n] = jnp.broadcast_to(index_ref[0, :, slots], (LANES, keys)).T
    return slots
