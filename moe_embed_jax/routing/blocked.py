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

from moe_embed_jax.kernels.cpu_products import bits, from_bits
from moe_embed_jax.routing.expert_mlp import PRODUCT
from moe_embed_jax.routing.rows import count_experts, in_float32, sum_choices, take
from moe_embed_jax.sharding import is_array
from moe_embed_jax.unstacked import Turned, is_unstacked, piece_of


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


def blocked(
    expert_mlp, x_TD, expert_TK, gate_TK, weights, block=None
) -> tuple[jax.Array, jax.Array]:
    """The signature and result of `reference.reference`; `block` rows are computed at a time
    (None: `block_rows`)."""
    block = block or block_rows(expert_TK.size, count_experts(weights))
    y_TD = _blocked(expert_mlp, block, x_TD, expert_TK, gate_TK, weights)
    return y_TD, jnp.zeros((), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(expert_mlp, block, x_TD, expert_TK, gate_TK, weights):
    def compute(x_sD, weights):
        return expert_mlp(x_sD, weights), []

    return _forward(compute, block, x_TD, expert_TK, gate_TK, weights)[0]


def _blocked_fwd(expert_mlp, block, x_TD, expert_TK, gate_TK, weights):
    def compute(x_sD, weights):
        y_sD, vjp = _vjp(expert_mlp, x_sD, weights)
        return y_sD, [leaf for leaf in jax.tree.leaves(vjp) if _is_saved(leaf, x_sD, weights)]

    y_TD, saved = _forward(compute, block, x_TD, expert_TK, gate_TK, weights)
    return y_TD, jax.tree.map(bits, (x_TD, expert_TK, gate_TK, weights, saved))


def _vjp(expert_mlp, x_sD, weights):
    """`jax.vjp` whose residuals are arguments and the results of `expert_mlp.matmul`."""
    policy = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    return jax.vjp(jax.checkpoint(expert_mlp, policy=policy, prevent_cse=False), x_sD, weights)


def _is_saved(residual, x_sD, weights) -> bool:
    """Whether the forward pass keeps a residual of a block of s rows.

    It keeps what has a value per row and is no argument: the backward pass has those anyway.
    """
    is_argument = any(residual is argument for argument in (x_sD, *jax.tree.leaves(weights)))
    return residual.shape[:1] == x_sD.shape[:1] and not is_argument


def _forward(compute, block, x_TD, expert_TK, gate_TK, weights):
    """(y_TD, (y_SD, residuals, layout)) by `compute` of a block: (y_sD, residuals)."""
    top_k, experts = expert_TK.shape[1], count_experts(weights)
    layout = assignment_S, slot_A, first_block_E, blocks_E = _layout(expert_TK, experts, block)

    def one_expert(buffers, expert):
        weights, first, count = expert
        # int8 weights become arrays here: once, not for every block. A `Turned` one would become a
        # copy, which `product` does not need.
        weights = jax.tree.map(
            lambda w: w if isinstance(w, Turned) else jnp.asarray(w), weights, is_leaf=is_array
        )

        def one_block(i, buffers):
            start = (first + i) * block
            assignment_s = jax.lax.dynamic_slice_in_dim(assignment_S, start, block)
            results = compute(take(x_TD, assignment_s // top_k), weights)
            return _put(buffers, results, start)

        return jax.lax.fori_loop(0, count, one_block, buffers), None

    # Buffers for the results of all blocks.
    x_sD = jax.ShapeDtypeStruct((block, x_TD.shape[1]), x_TD.dtype)
    expert = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), weights, is_leaf=is_array
    )
    buffers = jax.tree.map(
        lambda leaf: bits(jnp.zeros((len(assignment_S), *leaf.shape[1:]), leaf.dtype)),
        jax.eval_shape(compute, x_sD, expert),
    )
    if is_unstacked(weights):
        for e in range(experts):
            expert = piece_of(weights, e), first_block_E[e], blocks_E[e]
            buffers, _ = one_expert(buffers, expert)
    else:
        buffers, _ = jax.lax.scan(one_expert, buffers, (weights, first_block_E, blocks_E))
    y_SD, residuals = buffers
    y_TD = sum_choices(from_bits(y_SD), slot_A.reshape(expert_TK.shape), gate_TK)
    return y_TD, (y_SD, residuals, layout)


def _put(buffers, rows, start):
    """`buffers`, which hold `bits`, with `rows` from `start` on."""
    return jax.tree.map(
        lambda buffer, part: jax.lax.dynamic_update_slice_in_dim(buffer, bits(part), start, 0),
        buffers,
        rows,
    )


def _blocked_bwd(expert_mlp, block, saved, dy_TD):
    *arguments, (y_SD, residuals, layout) = saved
    x_TD, expert_TK, gate_TK, weights = jax.tree.map(from_bits, arguments)
    assignment_S, slot_A, first_block_E, blocks_E = layout
    top_k = expert_TK.shape[1]
    gate_A1 = gate_TK.reshape(-1, 1).astype(x_TD.dtype)

    def one_expert(buffers, expert):
        weights, first, count = expert

        def one_block(i, carry):
            buffers, dweights = carry
            start = (first + i) * block
            assignment_s, y_sD, *kept = (
                from_bits(jax.lax.dynamic_slice_in_dim(array, start, block))
                for array in (assignment_S, y_SD, *residuals)
            )
            token_s = assignment_s // top_k
            x_sD, dy_sD = take(x_TD, token_s), take(dy_TD, token_s)
            _, vjp = _vjp(expert_mlp, x_sD, weights)
            # What the forward pass kept takes the place of what would be computed again.
            computed, structure = jax.tree.flatten(vjp)
            kept = iter(kept)
            merged = [next(kept) if _is_saved(c, x_sD, weights) else c for c in computed]
            vjp = jax.tree.unflatten(structure, merged)
            dx_sD, dweights_of_block = vjp(take(gate_A1, assignment_s) * dy_sD)
            dgate_s = jnp.sum(y_sD.astype(jnp.float32) * dy_sD, axis=-1)
            dweights = jax.tree.map(jnp.add, dweights, dweights_of_block)
            return _put(buffers, (dx_sD, dgate_s), start), dweights

        zeros = jax.tree.map(jnp.zeros_like, weights)
        return jax.lax.fori_loop(0, count, one_block, (buffers, zeros))

    buffers = jnp.zeros_like(y_SD), jnp.zeros(len(y_SD), jnp.float32)
    # Summed over blocks in float32: in bfloat16 every block would add a rounding error.
    experts = in_float32(weights), first_block_E, blocks_E
    (dx_SD, dgate_S), dweights = jax.lax.scan(one_expert, buffers, experts)
    dweights = jax.tree.map(lambda dw, w: dw.astype(w.dtype), dweights, weights)
    dx_TD = take(from_bits(dx_SD), slot_A).reshape(*expert_TK.shape, -1).sum(axis=1)
    dgate_TK = take(dgate_S, slot_A).reshape(gate_TK.shape).astype(gate_TK.dtype)
    return dx_TD, None, dgate_TK, dweights


_blocked.defvjp(_blocked_fwd, _blocked_bwd)
