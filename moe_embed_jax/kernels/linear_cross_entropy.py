"""Cross entropy of the logits of a linear layer as TPU kernels, which never write logits to HBM.

The logits of T tokens over V outputs are x_TD w_VD^T + bias_V. The forward kernel visits all blocks
of outputs for a block of tokens with a running softmax (Milakov and Gimelshein 2018), and sums the
rows of w by their softmax: that is the gradient of x, but for the target's row. The backward kernel
computes the logits again, all tokens for a block of outputs, and sums their gradient times x. A
logit is computed twice and takes four products; XLA's three products pass over [T, V] in HBM
several times.

The target's own term is kept apart from the others: softmax - 1 would lose all digits in bfloat16
where a prediction is nearly certain.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_embed_jax.kernels.head_lanes import LANES, MASK_VALUE
from moe_embed_jax.kernels.mxu import dot
from moe_embed_jax.mesh import vmem_limit_bytes

BLOCKS = (1024, 512, 256)  # tokens, and outputs, of a program: the largest that fit VMEM
LOGITS = 5  # [block, block] float32 in VMEM at a time


def supports(width: int, dtype) -> bool:
    """Whether the kernels take states of this width on the TPUs of the mesh in context."""
    return width % LANES == 0 and _block(width, dtype) is not None


def _block(width: int, dtype) -> int | None:
    item = jnp.dtype(dtype).itemsize
    # x and w (float32) of this program and the next, w converted, two float32 sums.
    row = width * (2 * (item + 4) + item + 2 * 4)
    fitting = [b for b in BLOCKS if b * (row + LOGITS * b * 4) <= vmem_limit_bytes()]
    return fitting[0] if fitting else None


def linear_cross_entropy(x_TD, w_VD, bias_V, target_T, block=None, interpret: bool = False):
    """(loss_T, own_T, best_T), float32: cross entropy in nats, the target's logit, the largest one.

    Only `loss_T` has a gradient.

    Args:
      x_TD: products are in its dtype.
      w_VD, bias_V: float32, as their gradients.
      target_T: int32; -1 (padding): own is 0 and loss means nothing, but is finite. Its gradient
        must be 0.
      block: tokens and outputs of a program, a multiple of 128; None: what fits VMEM.
    """
    block = block or _block(x_TD.shape[1], x_TD.dtype)
    return _cross_entropy(x_TD, w_VD, bias_V, target_T, block, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(x_TD, w_VD, bias_V, target_T, block, interpret):
    return _fwd(x_TD, w_VD, bias_V, target_T, block, interpret)[0]


def _fwd(x_TD, w_VD, bias_V, target_T, block, interpret):
    tokens, spare = len(x_TD), -len(x_TD) % block
    x_tD = jnp.pad(x_TD, ((0, spare), (0, 0)))
    target_t1 = jnp.pad(target_T, (0, spare), constant_values=-1)[:, None]
    others_tD, own_t1, best_t1, sum_t1 = _forward(
        x_tD, w_VD, bias_V[None], target_t1, block, interpret
    )
    there_t1 = target_t1 >= 0
    # The softmax's denominator without and with the target, over exp(best).
    total_t1 = sum_t1 + jnp.where(there_t1, jnp.exp(own_t1 - best_t1), 0.0)
    log_sum_t1 = best_t1 + jnp.log(total_t1)
    share_t1 = jnp.where(there_t1, sum_t1 / total_t1, 0.0)  # 1 - softmax of the target
    own_row_tD = w_VD[jnp.maximum(target_t1[:, 0], 0)].astype(x_TD.dtype)
    dx_tD = others_tD / total_t1 - share_t1 * own_row_tD
    results = (log_sum_t1 - own_t1, own_t1, best_t1)
    dx_TD = dx_tD[:tokens].astype(x_TD.dtype)
    saved = (x_tD, w_VD, bias_V, target_t1, log_sum_t1, share_t1, dx_TD)
    return tuple(result_t1[:tokens, 0] for result_t1 in results), saved


def _bwd(block, interpret, saved, cotangents):
    x_tD, w_VD, bias_V, target_t1, log_sum_t1, share_t1, dx_TD = saved
    dloss_T1 = cotangents[0][:, None]
    dloss_t1 = jnp.pad(dloss_T1, ((0, len(x_tD) - len(dx_TD)), (0, 0)))
    rows = (target_t1, log_sum_t1, dloss_t1, -share_t1 * dloss_t1)
    dw_VD, dbias_1V = _backward(
        x_tD, w_VD, bias_V[None], [row_t1.T for row_t1 in rows], block, interpret
    )
    return (dloss_T1 * dx_TD).astype(dx_TD.dtype), dw_VD, dbias_1V[0], None


_cross_entropy.defvjp(_fwd, _bwd)


def _forward(x_TD, w_VD, bias_1V, target_T1, block: int, interpret: bool):
    """Of each token: the other outputs' rows of w summed by exp(logit - largest), [T, D]; the
    target's logit; the largest logit; the sum of exp(logit - largest) over the others, [T, 1]."""
    tokens, width = x_TD.shape
    of_tokens = pl.BlockSpec((block, width), lambda t, v: (t, 0))
    of_token = pl.BlockSpec((block, 1), lambda t, v: (t, 0))
    grid = (tokens // block, pl.cdiv(len(w_VD), block))
    results = [((tokens, width), of_tokens), *[((tokens, 1), of_token)] * 3]
    return pl.pallas_call(
        functools.partial(_forward_kernel, outputs=len(w_VD)),
        grid=grid,
        in_specs=[
            of_tokens,
            pl.BlockSpec((block, width), lambda t, v: (v, 0)),
            pl.BlockSpec((1, block), lambda t, v: (0, v)),
            of_token,
        ],
        out_specs=[spec for _, spec in results],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in results],
        scratch_shapes=[pltpu.VMEM((block, width), x_TD.dtype)],
        cost_estimate=_cost(
            x_TD, w_VD, read=x_TD.nbytes + grid[0] * w_VD.nbytes, written=x_TD.size
        ),
        compiler_params=_parameters(),
        interpret=interpret,
        name="linear_cross_entropy",
    )(x_TD, w_VD, bias_1V, target_T1)


def _forward_kernel(
    x_ref,
    w_ref,
    bias_ref,
    target_ref,
    others_ref,
    own_ref,
    best_ref,
    sum_ref,
    w_VD_ref,
    *,
    outputs: int,
):
    v, block = pl.program_id(1), w_ref.shape[0]

    @pl.when(v == 0)
    def _():
        best_ref[...] = jnp.full(best_ref.shape, MASK_VALUE, jnp.float32)
        for ref in (others_ref, own_ref, sum_ref):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    w_VD_ref[...] = w_ref[...].astype(w_VD_ref.dtype)
    bias_1V = bias_ref[...]
    if outputs % block:  # the last block reads what lies behind w and bias
        is_last = v == pl.num_programs(1) - 1
        left = jnp.where(is_last, outputs % block, block)
        bias_1V = jnp.where(_iota((1, block), 1) < left, bias_1V, MASK_VALUE)

        @pl.when(is_last)
        def _():
            w_VD_ref[outputs % block :] = jnp.zeros_like(w_VD_ref[outputs % block :])

    w_VD = w_VD_ref[...]
    logit_TV = dot(x_ref[...], w_VD, 1, 1) + bias_1V
    is_target_TV = _iota(logit_TV.shape, 1) == target_ref[...] - v * block
    own_ref[...] += jnp.where(is_target_TV, logit_TV, 0.0).sum(axis=1, keepdims=True)
    before_T1 = best_ref[...]
    best_T1 = jnp.maximum(before_T1, logit_TV.max(axis=1, keepdims=True))
    shrink_T1 = jnp.exp(before_T1 - best_T1)
    weight_TV = jnp.where(is_target_TV, 0.0, jnp.exp(logit_TV - best_T1))
    best_ref[...] = best_T1
    sum_ref[...] = sum_ref[...] * shrink_T1 + weight_TV.sum(axis=1, keepdims=True)
    others_ref[...] = others_ref[...] * shrink_T1 + dot(weight_TV.astype(w_VD.dtype), w_VD, 1, 0)


def _backward(x_TD, w_VD, bias_1V, rows, block: int, interpret: bool):
    """dw [V, D] and dbias [1, V]. What the last block reads behind w is written nowhere.

    `rows`: [1, T] target, logarithm of the softmax's denominator, gradient of the loss, gradient of
    the target's logit.
    """
    tokens, width = x_TD.shape
    of_outputs = pl.BlockSpec((block, width), lambda v, t: (v, 0))
    of_output = pl.BlockSpec((1, block), lambda v, t: (0, v))
    grid = (pl.cdiv(len(w_VD), block), tokens // block)
    return pl.pallas_call(
        _backward_kernel,
        grid=grid,
        in_specs=[
            pl.BlockSpec((block, width), lambda v, t: (t, 0)),
            of_outputs,
            of_output,
            *[pl.BlockSpec((1, block), lambda v, t: (0, t))] * len(rows),
        ],
        out_specs=[of_outputs, of_output],
        out_shape=[
            jax.ShapeDtypeStruct(w_VD.shape, jnp.float32),
            jax.ShapeDtypeStruct(bias_1V.shape, jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((block, width), x_TD.dtype),
            *[pltpu.VMEM((block, LANES), jnp.float32)] * 2,
        ],
        cost_estimate=_cost(
            x_TD, w_VD, read=w_VD.nbytes + grid[0] * x_TD.nbytes, written=w_VD.size
        ),
        compiler_params=_parameters(),
        interpret=interpret,
        name="linear_cross_entropy_backward",
    )(x_TD, w_VD, bias_1V, *rows)


def _backward_kernel(
    x_ref,
    w_ref,
    bias_ref,
    target_ref,
    log_sum_ref,
    dloss_ref,
    dtarget_ref,
    dw_ref,
    dbias_ref,
    w_VD_ref,
    bias_VL_ref,
    dbias_VL_ref,
):
    v, t = pl.program_id(0), pl.program_id(1)
    block = x_ref.shape[0]

    @pl.when(t == 0)
    def _():
        w_VD_ref[...] = w_ref[...].astype(w_VD_ref.dtype)
        bias_VL_ref[...] = jnp.broadcast_to(bias_ref[...], (LANES, block)).T
        for ref in (dw_ref, dbias_VL_ref):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    x_TD = x_ref[...]
    logit_VT = dot(w_VD_ref[...], x_TD, 1, 1) + bias_VL_ref[:, :1]
    is_target_VT = _iota(logit_VT.shape, 0) == target_ref[...] - v * block
    softmax_VT = jnp.exp(logit_VT - log_sum_ref[...])
    dlogit_VT = jnp.where(is_target_VT, dtarget_ref[...], softmax_VT * dloss_ref[...])
    dw_ref[...] += dot(dlogit_VT.astype(x_TD.dtype), x_TD, 1, 0)
    dbias_VL_ref[...] += sum(dlogit_VT[:, i : i + LANES] for i in range(0, block, LANES))

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        dbias_ref[...] = dbias_VL_ref[...].T.sum(axis=0, keepdims=True)


def _iota(shape: tuple[int, int], axis: int):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _cost(x_TD, w_VD, read: int, written: int) -> pl.CostEstimate:
    logits = len(x_TD) * len(w_VD)
    return pl.CostEstimate(
        flops=2 * 2 * logits * x_TD.shape[1],  # two products
        bytes_accessed=read + 4 * written,
        transcendentals=logits,
    )


def _parameters():
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit_bytes()
    )
