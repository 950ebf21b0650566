"""A ring over the mesh: the anchors of each device meet the candidates of all, tile by tile.

Each device keeps its anchors. The candidates of all devices rotate round a ring over the flattened
mesh. The backward pass rotates the candidates a second time and scores them again; their gradients
rotate with them until both are back on the candidates' device. No B x C array ever exists. Memory
per device is a few copies of its own vectors, and one tile of scores.

Where the mesh has several slices, every slice has its own ring, and in it the candidates of
all slices: they are gathered over slices once, and their gradients are summed over slices once. No
step of a ring waits for the network between slices.

Anchors are a tuple of arrays [B, ...], the vectors anchor_BD first and limit_B third; candidates
one of [B, M, ...], the vectors candidate_BMD first. `shared` is whole on every device.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe_embed_jax.mesh import BATCH_SPEC, IN_SLICE

TILE = 2048  # anchors or candidates; a tile of float32 scores has 16 MB
GATHERED_SPEC = P(None, IN_SLICE)  # [I, B / I, ...]


def gather(candidates):
    """[B, ...] -> [I, B / I, ...]: each device has what those in its place in all slices have."""
    slices = jax.sharding.get_abstract_mesh().shape["slice"]
    by_slice = jax.tree.map(lambda x: x.reshape(slices, -1, *x.shape[1:]), candidates)
    return jax.lax.with_sharding_constraint(by_slice, GATHERED_SPEC)


def reduce_over_candidates(tile: int, update, start, anchors, gathered, shared):
    """Statistics of each anchor over the candidates of all devices, float32 [B] each.

    Args:
      tile: most anchors, and most candidates, that are scored at once.
      update: (statistics [a] each, anchors and candidates of a tile, shared) -> statistics.
      start: the first value of each statistic.
      gathered: candidates, by `gather`.
    """

    def local(anchors, candidates, shared):
        count = len(anchors[0])
        anchors = _cut(tile, anchors)
        rotating = _cut(tile, _flat(candidates))

        def add_tiles(stats, rotating):
            def one_anchor_tile(_, tiles):
                anchor, stats = tiles

                def one_candidate_tile(stats, candidate):
                    return update(stats, anchor, candidate, shared), None

                return None, jax.lax.scan(one_candidate_tile, stats, rotating)[0]

            return jax.lax.scan(one_anchor_tile, None, (anchors, stats))[1]

        def ring_step(carry, _):
            stats, rotating = carry
            # Sent before it is used, so that the transfer can hide behind the matmuls.
            return (add_tiles(stats, rotating), _rotate(rotating)), None

        stats = tuple(jnp.full_like(anchors[2], value) for value in start)
        carry, _ = jax.lax.scan(ring_step, (stats, rotating), length=jax.lax.axis_size(IN_SLICE))
        return tuple(x.reshape(-1)[:count] for x in carry[0])

    specs = BATCH_SPEC, GATHERED_SPEC, P()
    return jax.shard_map(local, in_specs=specs, out_specs=BATCH_SPEC)(anchors, gathered, shared)


def gradients_of_vectors(tile: int, dlogits_of, anchors, gathered, shared, of_anchors):
    """(danchor_BD, dcandidate_BMD), where logits are the inner products of anchors and candidates.

    Args:
      dlogits_of: (anchors, candidates of a tile, shared, of_anchors of the tile) -> dlogits_ac.
      of_anchors: arrays [B] that it needs; what is padded has zeros, and must get zeros.
    """

    def local(anchors, candidates, shared, of_anchors):
        shape, count = candidates[0].shape, len(anchors[0])
        anchors, of_anchors = _cut(tile, anchors), _cut(tile, of_anchors)
        rotating = _cut(tile, _flat(candidates))

        def add_gradients(danchors, rotating, drotating):
            def one_candidate_tile(danchors, tiles):
                candidate, dcandidate_cD = tiles

                def one_anchor_tile(dcandidate_cD, tiles):
                    anchor, of_anchor, danchor_aD = tiles
                    dlogits_ac = dlogits_of(anchor, candidate, shared, of_anchor)
                    danchor_aD += matmul("ac,cD->aD", dlogits_ac, candidate[0])
                    dcandidate_cD += matmul("ac,aD->cD", dlogits_ac, anchor[0])
                    return dcandidate_cD, danchor_aD

                dcandidate_cD, danchors = jax.lax.scan(
                    one_anchor_tile, dcandidate_cD, (anchors, of_anchors, danchors)
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
        danchor_bD = danchors.reshape(-1, shape[-1])[:count]
        dcandidates = drotating.reshape(-1, shape[-1])[: math.prod(shape[:-1])]
        return danchor_bD, _scatter(dcandidates.reshape(shape))

    specs = BATCH_SPEC, GATHERED_SPEC, P(), BATCH_SPEC
    program = jax.shard_map(local, in_specs=specs, out_specs=(BATCH_SPEC, BATCH_SPEC))
    return program(anchors, gathered, shared, of_anchors)


def matmul(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, precision="highest")


def _rotate(rotating):
    """`rotating` of the previous device of the ring."""
    devices = jax.lax.axis_size(IN_SLICE)
    if devices == 1:
        return rotating
    ring = [(device, (device + 1) % devices) for device in range(devices)]
    return jax.lax.ppermute(rotating, IN_SLICE, ring)


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
