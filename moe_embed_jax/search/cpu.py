"""The walk over a load of documents on CPUs: exact, at little more than the price of the products.

XLA's top-k on CPUs costs half of what the products cost, so the documents of a block are looked at
in groups of 16. A document among the best k lies in a group whose peak is above the k-th best so
far; after a few blocks few groups are, and only those are ranked. Where many are, the k groups with
the highest peaks are enough (else each of those k groups would hold a better document).

The host drives the walk: XLA for CPUs runs what is inside a loop or a condition on one thread, and
the host can see how many groups there are to rank.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moe_embed_jax.mesh import replicated
from moe_embed_jax.search.selection import Best, masked, merge, nothing

BLOCK = 16_384  # documents scored at once on a device
LOAD = BLOCK  # documents on a device at a time
GROUP = 16  # documents with one peak: d, d + G, d + 2 G, ... where a block has G groups
FEW = (32, 64, 192)  # groups that are ranked where no query has more above its bar
# XLA's top-k on CPUs runs on one thread: as independent parts it runs on several.
PARTS = 4
SMALLEST_PART = 64  # queries


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def start(B: int, k: int, mesh) -> Best:
    """Nothing found yet: the best k of each device, side by side, [B, devices x k]."""
    placed = NamedSharding(mesh, _columns(mesh))
    return jax.lax.with_sharding_constraint(nothing(B, k * mesh.size), placed)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def score_memory(B: int, block: int, mesh) -> jax.Array:
    """[B, devices x block]: memory for scores. Fresh memory for each block would cost a tenth of
    the time of its products."""
    placed = NamedSharding(mesh, _columns(mesh))
    zeros = jnp.zeros((B, block * mesh.size), jnp.float32)
    return jax.lax.with_sharding_constraint(zeros, placed)


def visit(
    found: Best, score_Bn, query_BD, document_ND, first: int, count: int, block: int, mesh
) -> tuple[Best, jax.Array]:
    """(`found` and the documents of one load, `score_Bn` for the next call).

    Other arguments as of `knn.search`. When this returns, `document_ND` is not read any more.
    """
    rows = len(document_ND) // mesh.size
    groups = block // _group_size(block)
    for offset in range(0, min(rows, count - first), block):
        place = (offset, first, count)
        # Products and peaks are two programs: in one, XLA copies the scores in between.
        score_Bn = _products(query_BD, document_ND, score_Bn, offset, block, mesh)
        is_full = first + (mesh.size - 1) * rows + offset + block <= count
        peak_BG, most = _peaks(score_Bn, found, place, rows, is_full, block, mesh)
        most = int(most)  # groups above the bar, of the query that has most of them
        if most:
            few = next((size for size in FEW if most <= size < groups), None)
            found = _rank(found, score_Bn, peak_BG, place, rows, few, is_full, block, mesh)
    return found, score_Bn


@functools.partial(jax.jit, static_argnums=(1, 2))
def finish(found: Best, k: int, mesh) -> Best:
    """The best k over all devices."""
    if mesh.size > 1:  # which hold documents in no order; of equal scores the lower index is first
        order_Bm = jnp.argsort(found[1], axis=1)
        found = tuple(jnp.take_along_axis(array, order_Bm, axis=1) for array in found)
        found = merge([found], k, _top_k)
    return jax.lax.with_sharding_constraint(found, replicated(mesh))


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=2, keep_unused=True)
def _products(query_BD, document_ND, score_Bn, offset, block: int, mesh):
    """The scores of a block of each device, in the place of `score_Bn`."""
    del score_Bn

    def local(query_BD, document_nD, offset):
        block_nD = jax.lax.dynamic_slice_in_dim(document_nD, offset, block).astype(jnp.float32)
        return jnp.matmul(query_BD, block_nD.T, precision=jax.lax.Precision.HIGHEST)

    everywhere, rows = PartitionSpec(), PartitionSpec(mesh.axis_names)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(everywhere, rows, everywhere), out_specs=_columns(mesh)
    )(query_BD, document_ND, offset)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _peaks(score_Bn, found: Best, place, rows: int, is_full: bool, block: int, mesh):
    """(peaks of the groups [B, devices x G], how many clear the bar where most do).

    is_full: no device's block has padding; to look for it costs more than all else here.
    """
    size = _group_size(block)

    def local(score_Bn, found, place):
        score_BtG = score_Bn.reshape(-1, size, block // size)
        if not is_full:
            _, valid = _start_and_valid(place, rows, block, mesh)
            score_BtG = masked(score_BtG, jnp.arange(block).reshape(size, -1), valid)
        peak_BG = score_BtG.max(axis=1)
        if is_full:
            peak_BG = masked(peak_BG, 0, 1)
        above_B = (peak_BG > _bar(found)).sum(axis=1)
        return peak_BG, jax.lax.pmax(above_B.max(), mesh.axis_names)

    columns, everywhere = _columns(mesh), PartitionSpec()
    return jax.shard_map(
        local, mesh=mesh, in_specs=(columns, columns, everywhere), out_specs=(columns, everywhere)
    )(score_Bn, found, place)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7, 8))
def _rank(
    found, score_Bn, peak_BG, place, rows: int, few: int | None, is_full: bool, block: int, mesh
) -> Best:
    """`found` and the documents of a block, per device.

    rows: of the load on a device. few: no query has more groups above its bar; None: it may have
    any number. is_full: as of `_peaks`.
    """

    def local(found, score_Bn, peak_BG, place):
        k = found[0].shape[1]
        start, valid = _start_and_valid(place, rows, block, mesh)
        if few is None:
            if not is_full:
                score_Bn = masked(score_Bn, jnp.arange(block), valid)
            score_Bm, at_Bm = _best_groups(score_Bn, k)
        else:
            score_Bm, at_Bm = _groups_above(score_Bn, peak_BG, _bar(found), few)
        score_Bm = masked(score_Bm, at_Bm, valid)
        return merge([found, (score_Bm, start + at_Bm)], k, _top_k)

    columns, everywhere = _columns(mesh), PartitionSpec()
    return jax.shard_map(
        local, mesh=mesh, in_specs=(columns, columns, columns, everywhere), out_specs=columns
    )(found, score_Bn, peak_BG, place)


def _groups_above(score_Bn, peak_BG, bar_B1, few: int):
    """(scores, places in the block) of the groups above the bar, at most `few` a query: in the
    order of the documents, on which the order of equal scores rests."""
    (B, n), G = score_Bn.shape, peak_BG.shape[1]
    counted_BG = _running_count(peak_BG > bar_B1)
    group_Bg = jax.vmap(lambda n_G: jnp.searchsorted(n_G, 1 + jnp.arange(few)))(counted_BG)
    at_Btg = jnp.arange(n // G)[:, None] * G + group_Bg[:, None]
    # Where a query has fewer, `G` stands; a place behind the block is masked as padding is.
    at_Bm = jnp.where(group_Bg[:, None] < G, at_Btg, n).reshape(B, -1)
    return jax.vmap(lambda score_n, at_m: score_n[at_m])(score_Bn, at_Bm), at_Bm


def _best_groups(score_Bn, k: int):
    """(scores, places in the block) of k groups of neighbours that hold the best k.

    Neighbours, because among groups with the same peak the first ones must hold the first
    documents.
    """
    (B, n), size = score_Bn.shape, _group_size(score_Bn.shape[1])
    G = n // size
    if k >= G:
        return score_Bn, jnp.broadcast_to(jnp.arange(n), (B, n))
    score_BGt = score_Bn.reshape(B, G, size)
    peak_BG = masked(score_BGt.max(axis=2), 0, 1)  # -0 as 0; groups of padding are the last
    group_Bg = jnp.sort(_top_k(peak_BG, k)[1], axis=1)
    score_Bgt = jax.vmap(lambda score_Gt, at_g: score_Gt[at_g])(score_BGt, group_Bg)
    at_Bgt = group_Bg[:, :, None] * size + jnp.arange(size)
    return score_Bgt.reshape(B, -1), at_Bgt.reshape(B, -1)


def _columns(mesh) -> PartitionSpec:
    """Of arrays [B, devices x ...]: what each device has for all queries."""
    return PartitionSpec(None, mesh.axis_names)


def _start_and_valid(place, rows: int, block: int, mesh):
    """(index of the first document of this device's block, how many documents are in it)."""
    offset, first, count = place
    start = first + jax.lax.axis_index(mesh.axis_names) * rows + offset
    return start, jnp.clip(count - start, 0, block)


def _bar(found: Best):
    """A later document has to score above it to be among the best k. [B, 1]"""
    return found[0][:, -1:]


def _group_size(block: int) -> int:
    return GROUP if block % GROUP == 0 else 1


def _running_count(mask_BG):
    """cumsum over G, as products with a triangle: XLA's own takes four times as long here."""
    B, G = mask_BG.shape
    width = 64 if G % 64 == 0 else G
    part_BWg = mask_BG.astype(jnp.float32).reshape(B, G // width, width)
    part_BWg = part_BWg @ jnp.triu(jnp.ones((width, width), jnp.float32))
    total_BW = part_BWg[:, :, -1]
    before_BW = jnp.cumsum(total_BW, axis=1) - total_BW
    return (part_BWg + before_BW[:, :, None]).reshape(B, G)


def _top_k(score_Bm, k: int):
    B = score_Bm.shape[0]
    parts = PARTS if B % (PARTS * SMALLEST_PART) == 0 else 1
    found = [jax.lax.top_k(part, k) for part in jnp.split(score_Bm, parts)]
    return tuple(jnp.concatenate(arrays) for arrays in zip(*found, strict=True))
