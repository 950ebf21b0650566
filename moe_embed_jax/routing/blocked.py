"""Dropless expert layer for CPU: assignments sorted by expert and cut into blocks of one expert.

Every expert's rows are rounded up to whole blocks, so shapes are static while the number of blocks
that really run is not: the loops have dynamic bounds, which reverse-mode differentiation cannot
see through, hence the hand-written VJP. No token is dropped and at most `block - 1` rows per expert
are wasted. The weighted sum over K reads by inverse permutation instead of scattering, so results
do not depend on the order of additions.
"""

import functools

import jax
import jax.numpy as jnp

from moe_embed_jax.routing.rows import sum_choices, take


def block_rows(assignments: int, experts: int) -> int:
    """Rows of a block: a quarter of an expert's share, so that its last, half-empty block costs
    little, but 16 at least and 256 at most, where a CPU multiplies well."""
    share = assignments // (4 * experts)
    return min(max(16, 1 << max(share.bit_length() - 1, 0)), 256)


def _layout(expert_TK, experts: int, block: int):
    """Where each assignment goes.

    Returns `assignment_S` (slot -> flat assignment T*K, or A where the slot is empty), `slot_A`
    (assignment -> slot, or S if not routed), and per expert its first block and number of blocks.
    """
    expert_A = expert_TK.reshape(-1)
    assignments = expert_A.shape[0]
    slots = (-(-assignments // block) + experts) * block
    count_E = jnp.bincount(expert_A, length=experts + 1)[:experts]
    blocks_E = -(-count_E // block)
    first_block_E = jnp.cumsum(blocks_E) - blocks_E
    start_E = jnp.cumsum(count_E) - count_E

    order_A = jnp.argsort(expert_A, stable=True)
    sorted_expert_A = expert_A[order_A]
    safe_A = jnp.minimum(sorted_expert_A, experts - 1)
    slot_sorted_A = first_block_E[safe_A] * block + jnp.arange(assignments) - start_E[safe_A]
    slot_sorted_A = jnp.where(sorted_expert_A < experts, slot_sorted_A, slots)
    assignment_S = jnp.full(slots, assignments).at[slot_sorted_A].set(order_A, mode="drop")
    slot_A = jnp.zeros(assignments, jnp.int32).at[order_A].set(slot_sorted_A.astype(jnp.int32))
    return assignment_S, slot_A, first_block_E, blocks_E


def _rows(array_AX, index, per_row: int = 1):
    """Rows of `array` at `index // per_row`, zero where the index is past the end."""
    return take(array_AX, index // per_row)


def _forward(
    x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD, activation, block, keep_hidden
):
    experts, _, ffn = w_in_EDF.shape
    top_k = expert_TK.shape[1]
    block = block or block_rows(expert_TK.size, experts)
    layout = _layout(expert_TK, experts, block)
    assignment_S, slot_A, first_block_E, blocks_E = layout
    slots = assignment_S.shape[0]

    def one_expert(buffers, expert):
        w_in_DF, bias_in_F, w_out_FD, first, count = expert
        # Weights that are kept as int8 become arrays here: once, not for every block.
        w_in_DF, w_out_FD = jnp.asarray(w_in_DF), jnp.asarray(w_out_FD)

        def one_block(i, buffers):
            y_SD, pre_SF = buffers
            start = (first + i) * block
            assignment = jax.lax.dynamic_slice_in_dim(assignment_S, start, block)
            pre = _rows(x_TD, assignment, top_k) @ w_in_DF
            if bias_in_F is not None:
                pre += bias_in_F
            y = activation(pre) @ w_out_FD
            y_SD = jax.lax.dynamic_update_slice_in_dim(y_SD, y, start, 0)
            if keep_hidden:
                pre_SF = jax.lax.dynamic_update_slice_in_dim(pre_SF, pre, start, 0)
            return y_SD, pre_SF

        return jax.lax.fori_loop(0, count, one_block, buffers), None

    buffers = (
        jnp.zeros((slots, x_TD.shape[1]), x_TD.dtype),
        jnp.zeros((slots if keep_hidden else 0, ffn), x_TD.dtype),
    )
    (y_SD, pre_SF), _ = jax.lax.scan(
        one_expert, buffers, (w_in_EDF, bias_in_EF, w_out_EFD, first_block_E, blocks_E)
    )
    y_TD = sum_choices(y_SD, slot_A.reshape(expert_TK.shape), gate_TK)
    return y_TD, (pre_SF, layout)


def blocked(
    x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD, activation, block=None
) -> tuple[jax.Array, jax.Array]:
    """The signature and result of `reference.reference`; `block` rows are computed at a time
    (None: `block_rows`)."""
    args = (x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD)
    return _blocked(*args, activation, block), jnp.zeros((), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _blocked(x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD, activation, block):
    args = (x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD)
    return _forward(*args, activation, block, keep_hidden=False)[0]


def _blocked_fwd(x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD, activation, block):
    args = (x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD)
    y_TD, saved = _forward(*args, activation, block, keep_hidden=True)
    return y_TD, (args, saved)


def _blocked_bwd(activation, block, residuals, dy_TD):
    (x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD), (pre_SF, layout) = residuals
    assignment_S, slot_A, first_block_E, blocks_E = layout
    top_k = expert_TK.shape[1]
    slots = assignment_S.shape[0]
    block = block or block_rows(expert_TK.size, len(w_in_EDF))
    gate_A = gate_TK.reshape(-1).astype(x_TD.dtype)
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    def one_expert(buffers, expert):
        w_in_DF, bias_in_F, w_out_FD, first, count = expert

        def one_block(i, carry):
            dx_SD, dgate_S, dw_in_DF, dbias_in_F, dw_out_FD = carry
            start = (first + i) * block
            assignment = jax.lax.dynamic_slice_in_dim(assignment_S, start, block)
            pre = jax.lax.dynamic_slice_in_dim(pre_SF, start, block)
            x = _rows(x_TD, assignment, top_k)
            dy = _rows(dy_TD, assignment, top_k)
            gate = _rows(gate_A, assignment)
            hidden, activation_vjp = jax.vjp(activation, pre)
            dhidden = dy @ w_out_FD.T  # of the unweighted expert output
            dgate = jnp.sum(hidden * dhidden, axis=-1)
            (dpre,) = activation_vjp(gate[:, None] * dhidden)
            dw_out_FD += product(hidden.T, gate[:, None] * dy)
            dw_in_DF += product(x.T, dpre)
            if dbias_in_F is not None:
                dbias_in_F += dpre.sum(axis=0, dtype=jnp.float32)
            dx_SD = jax.lax.dynamic_update_slice_in_dim(dx_SD, dpre @ w_in_DF.T, start, 0)
            dgate_S = jax.lax.dynamic_update_slice_in_dim(dgate_S, dgate, start, 0)
            return dx_SD, dgate_S, dw_in_DF, dbias_in_F, dw_out_FD

        # Summed over blocks in float32: in bfloat16 every block would add a rounding error.
        weights = w_in_DF, bias_in_F, w_out_FD
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
        *buffers, dw_in_DF, dbias_in_F, dw_out_FD = jax.lax.fori_loop(
            0, count, one_block, (*buffers, *zeros)
        )
        dweights = dw_in_DF, dbias_in_F, dw_out_FD
        return tuple(buffers), jax.tree.map(lambda dw, w: dw.astype(w.dtype), dweights, weights)

    buffers = (jnp.zeros((slots, x_TD.shape[1]), x_TD.dtype), jnp.zeros(slots, x_TD.dtype))
    (dx_SD, dgate_S), dweights = jax.lax.scan(
        one_expert, buffers, (w_in_EDF, bias_in_EF, w_out_EFD, first_block_E, blocks_E)
    )
    dx_TD = _rows(dx_SD, slot_A).reshape(*expert_TK.shape, -1).sum(axis=1)
    dgate_TK = _rows(dgate_S, slot_A).reshape(gate_TK.shape).astype(gate_TK.dtype)
    return dx_TD, None, dgate_TK, *dweights


_blocked.defvjp(_blocked_fwd, _blocked_bwd)
