"""Attention on CPUs: a few rows or heads at a time, whose scores stay in the caches.

Scores are not saved. The backward pass computes them again from the logarithm of each sum of
exponentials (FlashAttention, arXiv 2205.14135, section 3.1), and keeps them keys first, so that no
product needs them turned.
"""

import jax
import jax.numpy as jnp

from moe_embed_jax.kernels.cpu_products import as_it_is, bits, dot, from_bits, turned

SCORES_AT_A_TIME = 1 << 18  # 1 MB of float32
HIDDEN = -1e30  # added to scores of other texts; finite, so that a row of padding is, too


@jax.custom_vjp
def cpu_attention(q_RHLJ, k_RHLJ, v_RHLJ, text_index_RL):
    """Context vectors [R, H, L, J], float32. Tokens attend to those of equal text index.

    q is scaled. All three have one dtype, to which the operands of all products are rounded.
    """
    return _by_pieces(_context, text_index_RL, q_RHLJ, k_RHLJ, v_RHLJ)[0]


def _fwd(q_RHLJ, k_RHLJ, v_RHLJ, text_index_RL):
    heads = q_RHLJ, k_RHLJ, v_RHLJ
    context_RHLJ, log_sum_RHL = _by_pieces(_context, text_index_RL, *heads)
    return context_RHLJ, (text_index_RL, tuple(map(bits, heads)), context_RHLJ, log_sum_RHL)


def _bwd(saved, dcontext_RHLJ):
    text_index_RL, heads, context_RHLJ, log_sum_RHL = saved
    heads = map(from_bits, heads)
    mean_RHL = jnp.sum(dcontext_RHLJ * context_RHLJ, axis=-1)
    arrays = *heads, dcontext_RHLJ, mean_RHL, log_sum_RHL
    return *_by_pieces(_gradients, text_index_RL, *arrays), None


cpu_attention.defvjp(_fwd, _bwd)


def _by_pieces(function, text_index_RL, *arrays_RHX):
    """`function` of (what hides other texts, *arrays), a few rows, or heads of one row, at a
    time."""
    rows, heads, length = arrays_RHX[0].shape[:3]
    is_own_RLk = text_index_RL[:, :, None] == text_index_RL[:, None, :]
    # Outside of the loop, in which XLA would compare once for each score, and slowly. Padding sees
    # padding: numbers that nobody reads.
    hidden_R1Lk = jnp.where(is_own_RLk, 0.0, HIDDEN)[:, None]
    heads_at_a_time = _divisor(heads, SCORES_AT_A_TIME // length**2)
    rows_at_a_time = 1
    if heads_at_a_time == heads:
        rows_at_a_time = _divisor(rows, SCORES_AT_A_TIME // (heads * length**2))
    pieces_of_row = heads // heads_at_a_time
    pieces = rows // rows_at_a_time * pieces_of_row
    if pieces == 1:
        return function(hidden_R1Lk, *arrays_RHX)
    hidden_PR1Lk = hidden_R1Lk.reshape(-1, rows_at_a_time, *hidden_R1Lk.shape[1:])

    def one(piece):
        number, arrays = piece
        results = function(hidden_PR1Lk[number // pieces_of_row], *map(from_bits, arrays))
        return tuple(map(bits, results))

    shape = pieces, rows_at_a_time, heads_at_a_time
    arrays_PRHX = [bits(x_RHX).reshape(*shape, *x_RHX.shape[2:]) for x_RHX in arrays_RHX]
    results_PRHX = jax.lax.map(one, (jnp.arange(pieces), arrays_PRHX))
    return tuple(
        from_bits(x_PRHX.reshape(rows, heads, *x_PRHX.shape[3:])) for x_PRHX in results_PRHX
    )


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`; at least 1."""
    return next((n for n in range(min(most, number), 1, -1) if number % n == 0), 1)


def _context(hidden_R1Lk, q_RHLJ, k_RHLJ, v_RHLJ):
    """(context [R, H, L, J], logarithm of the sums of exponentials [R, H, L])."""
    score_RHLk = dot(q_RHLJ, k_RHLJ, -1) + hidden_R1Lk
    most_RHL = score_RHLk.max(axis=-1)
    weight_RHLk = jnp.exp(score_RHLk - most_RHL[..., None])
    sum_RHL = weight_RHLk.sum(axis=-1)
    context_RHLJ = dot(weight_RHLk.astype(v_RHLJ.dtype), v_RHLJ, -2) / sum_RHL[..., None]
    return context_RHLJ, most_RHL + jnp.log(sum_RHL)


def _gradients(hidden_R1kL, q_RHLJ, k_RHLJ, v_RHLJ, dcontext_RHLJ, mean_RHL, log_sum_RHL):
    """(dq, dk, dv) in the dtype of q. mean_RHL: of the gradients of a token's weights.

    What is hidden is symmetric, so it may be read keys first.
    """
    dtype = q_RHLJ.dtype
    dcontext_RHLJ = dcontext_RHLJ.astype(dtype)
    score_RHkL = dot(k_RHLJ, q_RHLJ, -1) + hidden_R1kL
    weight_RHkL = jnp.exp(score_RHkL - log_sum_RHL[:, :, None])
    dv_RHkJ = dot(weight_RHkL.astype(dtype), dcontext_RHLJ, -2)
    dweight_RHkL = dot(v_RHLJ, dcontext_RHLJ, -1)
    dscore_RHkL = (weight_RHkL * (dweight_RHkL - mean_RHL[:, :, None])).astype(dtype)
    dk_RHkJ = dot(dscore_RHkL, q_RHLJ, -2)
    # As it is: else XLA turns this product round, to one that it does not have in bfloat16.
    dq_RHJL = as_it_is(dot(turned(k_RHLJ), dscore_RHkL, -2))
    return tuple(x.astype(dtype) for x in (dq_RHJL.swapaxes(-1, -2), dk_RHkJ, dv_RHkJ))
