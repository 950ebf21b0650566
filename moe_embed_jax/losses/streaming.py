"""Log-sum-exp of the scores of anchors with rotating candidates; no B x C array ever exists.

Each device keeps its anchors. The candidates of all devices rotate round a ring over the flattened
mesh. A device scores them in tiles, and keeps a running maximum and sum per anchor (online softmax,
as in FlashAttention, arXiv 2205.14135, and Inf-CL, arXiv 2410.17243). The backward pass rotates the
candidates a second time and scores them again. Their gradients rotate with them until both are back
on the candidates' device. Memory per device is a few copies of its own vectors, and one tile of
scores.

Where the mesh has several slices, every slice has its own ring, and in it the candidates of
all slices: they are gathered over slices once, and their gradients are summed over slices once. No
step of a ring waits for the network between slices.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe_embed_jax.losses.contents import Texts
from moe_embed_jax.mesh import BATCH_SPEC, IN_SLICE

TILE = 2048  # anchors or candidates; a tile of float32 scores has 16 MB
GATHERED_SPEC = P(None, IN_SLICE)  # [I, B / I, ...]
# Of the arguments, candidates gathered.
SPECS = (BATCH_SPEC,) * 3 + (GATHERED_SPEC,) * 2 + (P(),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def streamed_log_sum_exp(
    tile: int,
    answers: bool,
    anchor_BD,
    other: Texts,
    limit_B,
    candidate_BMD,
    candidates: Texts,
    partner_O,
):
    """Log-sum-exp, maximum and number of each anchor's scores with its negatives.

    Args:
      tile: most anchors, and most candidates, that are scored at once.
      answers: take its partners, each once, in place of its negatives.
      anchor_BD: float32; scores are inner products, so the scale must be in here.
      other: [B], the text of each anchor's pair that decides what is no negative: its query where
        documents are scored, its document where queries are (`contents.py`).
      limit_B: scores above it are left out; inf for no limit.
      candidate_BMD, candidates: the texts that are scored, float32 and [B, M].
      partner_O: partner lists, see `Contents`.

    Returns:
      lse_B (-inf where there is no negative), top_B (the same) and count_B, float32. Only lse_B has
      a gradient, to anchor_BD and candidate_BMD. All sharded like the batch; needs a mesh in
      context whose size divides B.
    """
    arguments = anchor_BD, other, limit_B, candidate_BMD, candidates, partner_O
    return _forward(tile, answers, *arguments)[0]


def _forward(tile, answers, anchor_BD, other, limit_B, candidate_BMD, candidates, partner_O):
    gathered = _gather((candidate_BMD, candidates))
    arguments = (anchor_BD, other, limit_B, *gathered, partner_O)

    def local(anchor_bD, other, limit_b, candidate_IbMD, candidates, partner_O):
        anchors = _cut(tile, (anchor_bD, other, limit_b))
        rotating = _cut(tile, _flat((candidate_IbMD, candidates)))

        def add_tiles(stats, rotating):
            def one_anchor_tile(_, tiles):
                anchor, stats = tiles

                def one_candidate_tile(stats, candidate):
                    logits_ac = _logits(answers, anchor, candidate, partner_O)
                    return _accumulate(stats, logits_ac), None

                return None, jax.lax.scan(one_candidate_tile, stats, rotating)[0]

            return jax.lax.scan(one_anchor_tile, None, (anchors, stats))[1]

        def ring_step(carry, _):
            stats, rotating = carry
            # Sent before it is used, so that the transfer can hide behind the matmuls.
            return (add_tiles(stats, rotating), _rotate(rotating)), None

        empty = jnp.zeros_like(anchors[2])
        stats = (jnp.full_like(empty, -jnp.inf), empty, empty)
        carry, _ = jax.lax.scan(ring_step, (stats, rotating), length=jax.lax.axis_size(IN_SLICE))
        top_b, total_b, count_b = (x.reshape(-1)[: len(anchor_bD)] for x in carry[0])
        return top_b + jnp.log(total_b), top_b, count_b

    results = jax.shard_map(local, in_specs=SPECS, out_specs=(BATCH_SPEC,) * 3)(*arguments)
    return results, (arguments, results[0])


def _backward(tile, answers, residuals, cotangents):
    arguments, lse_B = residuals

    def local(anchor_bD, other, limit_b, candidate_IbMD, candidates, partner_O, lse_b, dlse_b):
        anchors = _cut(tile, (anchor_bD, other, limit_b))
        rotating = _cut(tile, _flat((candidate_IbMD, candidates)))
        # An anchor without negatives has lse -inf and logits that are all -inf: 0 keeps exp at 0.
        lse, dlse = _cut(tile, (jnp.where(lse_b == -jnp.inf, 0.0, lse_b), dlse_b))

        def add_gradients(danchors, rotating, drotating):
            def one_candidate_tile(danchors, tiles):
                candidate, dcandidate_cD = tiles

                def one_anchor_tile(dcandidate_cD, tiles):
                    anchor, lse_a, dlse_a, danchor_aD = tiles
                    logits_ac = _logits(answers, anchor, candidate, partner_O)
                    dlogits_ac = jnp.exp(logits_ac - lse_a[:, None]) * dlse_a[:, None]
                    danchor_aD += _matmul("ac,cD->aD", dlogits_ac, candidate[0])
                    dcandidate_cD += _matmul("ac,aD->cD", dlogits_ac, anchor[0])
                    return dcandidate_cD, danchor_aD

                dcandidate_cD, danchors = jax.lax.scan(
                    one_anchor_tile, dcandidate_cD, (anchors, lse, dlse, danchors)
                )
                return danchors, dcandidate_cD

            return jax.lax.scan(one_candidate_tile, danchors, (rotating, drotating))

        def ring_step(carry, _):
            danchors, rotating, drotating = carry
            danchors, drotating = add_gradients(danchors, rotating, drotating)
            return (danchors, *_rotate((rotating, drotating))), None

        # The candidates are the same in each slice, their gradients are not.
        drotating = jax.lax.pcast(jnp.zeros_like(rotating[0]), "slice", to="varying")
        carry = (jnp.zeros_like(anchors[0]), rotating, drotating)
        # After as many steps as a slice has devices, each candidate is on its own device.
        steps = jax.lax.axis_size(IN_SLICE)
        (danchors, _, drotating), _ = jax.lax.scan(ring_step, carry, length=steps)
        shape = candidate_IbMD.shape
        danchor_bD = danchors.reshape(-1, shape[-1])[: len(anchor_bD)]
        dcandidates = drotating.reshape(-1, shape[-1])[: math.prod(shape[:-1])]
        return danchor_bD, _scatter(dcandidates.reshape(shape))

    danchor_BD, dcandidate_BMD = jax.shard_map(
        local, in_specs=SPECS + (BATCH_SPEC,) * 2, out_specs=(BATCH_SPEC, BATCH_SPEC)
    )(*arguments, lse_B, cotangents[0])
    return danchor_BD, None, None, dcandidate_BMD, None, None


streamed_log_sum_exp.defvjp(_forward, _backward)


def _matmul(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, precision="highest")


def _logits(answers: bool, anchor, candidate, partner_O):
    """logits_ac of one tile, -inf where the candidate is no negative of the anchor (no partner, if
    `answers`)."""
    x_aD, other, limit_a = anchor
    y_cD, text = candidate
    # Partners are looked up in the candidates' lists or in the anchors', where the longest list of
    # this tile is shorter. It nearly always has one entry; but a label may answer all queries.
    longest_c = jnp.max(jnp.where(text.counts, text.partners, 0))
    longest_a = jnp.max(other.partners)
    by_candidate = longest_c <= longest_a

    def is_partner(k):
        left_a = jnp.where(by_candidate, other.number, _partner(other, k, partner_O))
        right_c = jnp.where(by_candidate, _partner(text, k, partner_O), text.number)
        return left_a[:, None] == right_c[None, :]

    def or_partners(found_ac):
        return jax.lax.fori_loop(
            1,
            jnp.minimum(longest_c, longest_a),
            lambda k, found_ac: found_ac | is_partner(k),
            found_ac,
        )

    if answers:
        left_out_ac = ~(text.counts & or_partners(is_partner(0)))
    else:
        left_out_ac = ~text.counts | (other.number[:, None] == text.number) | is_partner(0)
        left_out_ac = or_partners(left_out_ac)
    logits_ac = _matmul("aD,cD->ac", x_aD, y_cD)
    return jnp.where(left_out_ac | (logits_ac > limit_a[:, None]), -jnp.inf, logits_ac)


def _partner(texts: Texts, k, partner_O):
    """Number of the k-th partner of each text, -1 for none."""
    number = partner_O.at[texts.first_partner + k].get(mode="clip")
    return jnp.where(k < texts.partners, number, -1)


def _accumulate(stats, logits_ac):
    top_a, total_a, count_a = stats
    new_top_a = jnp.maximum(top_a, jnp.max(logits_ac, axis=1))
    base_a = jnp.where(new_top_a == -jnp.inf, 0.0, new_top_a)  # no negative yet: -inf - -inf
    total_a = total_a * jnp.exp(top_a - base_a)
    total_a += jnp.sum(jnp.exp(logits_ac - base_a[:, None]), axis=1)
    return new_top_a, total_a, count_a + jnp.sum(logits_ac > -jnp.inf, axis=1)


def _rotate(rotating):
    """`rotating` of the previous device of the ring."""
    devices = jax.lax.axis_size(IN_SLICE)
    if devices == 1:
        return rotating
    ring = [(device, (device + 1) % devices) for device in range(devices)]
    return jax.lax.ppermute(rotating, IN_SLICE, ring)


def _gather(tree):
    """[B, ...] -> [I, B / I, ...]: each device has what those in its place in all slices have."""
    slices = jax.sharding.get_abstract_mesh().shape["slice"]
    by_slice = jax.tree.map(lambda x: x.reshape(slices, -1, *x.shape[1:]), tree)
    return jax.lax.with_sharding_constraint(by_slice, GATHERED_SPEC)


def _scatter(gradient_IbMD):
    """[b, M, D], the sum over slices of what they have for this device's part."""
    if len(gradient_IbMD) == 1:
        return gradient_IbMD[0]
    return jax.lax.psum_scatter(gradient_IbMD, "slice")


def _flat(tree):
    """[I, b, M, ...] -> [I * b * M, ...]"""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), tree)


def _cut(tile, tree):
    """[b, ...] -> [n, t, ...], n tiles of t <= `tile` rows, as equal as they can be.

    Padding is zero: such an anchor is cut off in the end, and such a candidate does not count.
    """

    def cut(x):
        tiles = -(-len(x) // tile)
        size = -(-len(x) // tiles)
        padding = [(0, tiles * size - len(x))] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(tiles, size, *x.shape[1:])

    return jax.tree.map(cut, tree)
