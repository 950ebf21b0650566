"""Log-sum-exp of the scores of anchors against travelling candidates; no B x C array ever exists.

Every device keeps its anchors. The candidates of all devices travel round a ring over the flattened
mesh, and each device meets them in tiles, keeping a running maximum and sum per anchor (online
softmax, as in FlashAttention, arXiv 2205.14135, and Inf-CL, arXiv 2410.17243). The backward pass
sends them round again, scores them again, and their gradients travel with them until both are home.
Memory per device is a few copies of its own vectors, and one tile of scores.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe_embed_jax.mesh import AXES, BATCH_SPEC
from moe_embed_jax.objectives.contents import Candidates

TILE = 2048  # anchors or candidates; a tile of float32 scores has 16 MB

CANDIDATES_SPEC = Candidates(BATCH_SPEC, BATCH_SPEC, BATCH_SPEC, BATCH_SPEC, P())


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Anchors:
    """A device's anchors, cut into n tiles of t: x_ntD, number_nt, limit_nt."""

    x: jax.Array
    number: jax.Array
    limit: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Travellers:
    """A device's candidates, cut into n tiles of t: x_ntD and the fields of `Candidates`_nt."""

    x: jax.Array
    number: jax.Array
    counts: jax.Array
    first_partner: jax.Array
    partners: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def streamed_log_sum_exp(tile, anchor_BD, number_B, limit_B, candidate_BMD, candidates):
    """Log-sum-exp, maximum and number of each anchor's scores with its negatives.

    Args:
      tile: most anchors, and most candidates, that are scored at once.
      anchor_BD: float32; scores are inner products, so the scale must be in here.
      number_B: content number of the other text of each anchor's pair, see `Candidates`.
      limit_B: scores above it are left out; inf for no limit.
      candidate_BMD, candidates: float32 vectors, and what they say.

    Returns:
      lse_B (-inf where there is no negative), top_B (the same) and count_B, float32. Only lse_B has
      a gradient, to anchor_BD and candidate_BMD. All sharded like the batch; needs a mesh in
      context whose size divides B.
    """
    return _forward(tile, anchor_BD, number_B, limit_B, candidate_BMD, candidates)[0]


def _forward(tile, anchor_BD, number_B, limit_B, candidate_BMD, candidates):
    def local(anchor_bD, number_b, limit_b, candidate_bMD, candidates):
        anchors = _cut_anchors(tile, anchor_bD, number_b, limit_b)
        travellers = _cut_candidates(tile, candidate_bMD, candidates)

        def meet(stats, travellers):
            def one_anchor_tile(_, tiles):
                anchor, stats = tiles

                def one_candidate_tile(stats, candidate):
                    logits_ac = _logits(anchor, candidate, candidates.partner_B)
                    return _accumulate(stats, logits_ac), None

                return None, jax.lax.scan(one_candidate_tile, stats, travellers)[0]

            return jax.lax.scan(one_anchor_tile, None, (anchors, stats))[1]

        def step(carry, _):
            stats, travellers = carry
            # Sent before it is used, so that the transfer can hide behind the matmuls.
            return (meet(stats, travellers), _pass_on(travellers)), None

        empty = jnp.zeros_like(anchors.limit)
        stats = (jnp.full_like(empty, -jnp.inf), empty, empty)
        carry, _ = jax.lax.scan(step, (stats, travellers), length=jax.lax.axis_size(AXES))
        top_b, total_b, count_b = (x.reshape(-1)[: len(anchor_bD)] for x in carry[0])
        return top_b + jnp.log(total_b), top_b, count_b

    arguments = (anchor_BD, number_B, limit_B, candidate_BMD, candidates)
    specs = (BATCH_SPEC,) * 4 + (CANDIDATES_SPEC,)
    results = jax.shard_map(local, in_specs=specs, out_specs=(BATCH_SPEC,) * 3)(*arguments)
    return results, (arguments, results[0])


def _backward(tile, residuals, cotangents):
    arguments, lse_B = residuals
    dlse_B = cotangents[0]

    def local(anchor_bD, number_b, limit_b, candidate_bMD, candidates, lse_b, dlse_b):
        anchors = _cut_anchors(tile, anchor_bD, number_b, limit_b)
        travellers = _cut_candidates(tile, candidate_bMD, candidates)
        # An anchor without negatives has lse -inf and logits that are all -inf: 0 keeps exp at 0.
        lse, dlse = (_cut(tile, x) for x in (jnp.where(lse_b == -jnp.inf, 0.0, lse_b), dlse_b))

        def meet(danchors, travellers, dtravellers):
            def one_candidate_tile(danchors, tiles):
                candidate, dcandidate_cD = tiles

                def one_anchor_tile(dcandidate_cD, tiles):
                    anchor, lse_a, dlse_a, danchor_aD = tiles
                    logits_ac = _logits(anchor, candidate, candidates.partner_B)
                    dlogits_ac = jnp.exp(logits_ac - lse_a[:, None]) * dlse_a[:, None]
                    danchor_aD += _matmul("ac,cD->aD", dlogits_ac, candidate.x)
                    dcandidate_cD += _matmul("ac,aD->cD", dlogits_ac, anchor.x)
                    return dcandidate_cD, danchor_aD

                dcandidate_cD, danchors = jax.lax.scan(
                    one_anchor_tile, dcandidate_cD, (anchors, lse, dlse, danchors)
                )
                return danchors, dcandidate_cD

            return jax.lax.scan(one_candidate_tile, danchors, (travellers, dtravellers))

        def step(carry, _):
            danchors, travellers, dtravellers = carry
            danchors, dtravellers = meet(danchors, travellers, dtravellers)
            return (danchors, *_pass_on((travellers, dtravellers))), None

        carry = (jnp.zeros_like(anchors.x), travellers, jnp.zeros_like(travellers.x))
        # As many steps as devices bring everything home.
        (danchors, _, dtravellers), _ = jax.lax.scan(step, carry, length=jax.lax.axis_size(AXES))
        M, D = candidate_bMD.shape[1:]
        danchor_bD = danchors.reshape(-1, D)[: len(anchor_bD)]
        return danchor_bD, dtravellers.reshape(-1, D)[: len(anchor_bD) * M].reshape(-1, M, D)

    specs = (BATCH_SPEC,) * 4 + (CANDIDATES_SPEC,) + (BATCH_SPEC,) * 2
    danchor_BD, dcandidate_BMD = jax.shard_map(
        local, in_specs=specs, out_specs=(BATCH_SPEC, BATCH_SPEC)
    )(*arguments, lse_B, dlse_B)
    return danchor_BD, None, None, dcandidate_BMD, None


streamed_log_sum_exp.defvjp(_forward, _backward)


def _matmul(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, precision="highest")


def _logits(anchor: _Anchors, candidate: _Travellers, partner_B):
    """logits_ac of one tile, -inf where the candidate is no negative of the anchor."""
    number_a1 = anchor.number[:, None]
    logits_ac = _matmul("aD,cD->ac", anchor.x, candidate.x)

    def is_partner(k):
        partner_c = partner_B.at[candidate.first_partner + k].get(mode="clip")
        return number_a1 == jnp.where(k < candidate.partners, partner_c, -1)

    left_out_ac = ~candidate.counts | (number_a1 == candidate.number) | is_partner(0)
    # Few texts have a second partner; the loop is as long as the longest list in this tile.
    left_out_ac = jax.lax.fori_loop(
        1, jnp.max(candidate.partners), lambda k, out_ac: out_ac | is_partner(k), left_out_ac
    )
    return jnp.where(left_out_ac | (logits_ac > anchor.limit[:, None]), -jnp.inf, logits_ac)


def _accumulate(stats, logits_ac):
    top_a, total_a, count_a = stats
    new_top_a = jnp.maximum(top_a, jnp.max(logits_ac, axis=1))
    base_a = jnp.where(new_top_a == -jnp.inf, 0.0, new_top_a)  # no negative yet: -inf - -inf
    total_a = total_a * jnp.exp(top_a - base_a)
    total_a += jnp.sum(jnp.exp(logits_ac - base_a[:, None]), axis=1)
    return new_top_a, total_a, count_a + jnp.sum(logits_ac > -jnp.inf, axis=1)


def _pass_on(travellers):
    """To the next device of the ring."""
    devices = jax.lax.axis_size(AXES)
    if devices == 1:
        return travellers
    ring = [(device, (device + 1) % devices) for device in range(devices)]
    return jax.lax.ppermute(travellers, AXES, ring)


def _cut_anchors(tile, anchor_bD, number_b, limit_b) -> _Anchors:
    return _Anchors(*(_cut(tile, x) for x in (anchor_bD, number_b, limit_b)))


def _cut_candidates(tile, candidate_bMD, candidates) -> _Travellers:
    fields = (
        candidate_bMD,
        candidates.number_BM,
        candidates.counts_BM,
        candidates.first_partner_BM,
        candidates.partners_BM,
    )
    # Padding is zero: such a text does not count.
    return _Travellers(*(_cut(tile, x.reshape(-1, *x.shape[2:])) for x in fields))


def _cut(tile, x_b):
    """[b, ...] -> [n, t, ...] with t <= tile, padded with zeros; tiles are as equal as they can."""
    tiles = -(-len(x_b) // tile)
    size = -(-len(x_b) // tiles)
    padding = [(0, tiles * size - len(x_b))] + [(0, 0)] * (x_b.ndim - 1)
    return jnp.pad(x_b, padding).reshape(tiles, size, *x_b.shape[1:])
