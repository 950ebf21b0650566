"""Exact nearest neighbours by inner product, by brute force, with the documents over a mesh.

Every device holds a slice of the documents and walks over it in blocks, keeping the best k so far,
so that the B x N scores never exist at once; the k of each device are merged at the end. Arrays
are padded to a few sizes, so that a hundred small sets share a handful of compilations; the walk
stops after the last real block, so padding costs memory, not time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_embed_jax.mesh import replicated, single_device_mesh
from moe_embed_jax.processes import to_devices

QUERY_BLOCK = 1024
SMALLEST_QUERIES = 64
SMALLEST_DOCUMENTS = 256


def top_k(
    query_BD: np.ndarray,
    document_ND: np.ndarray,
    k: int,
    mesh: jax.sharding.Mesh | None = None,
    block: int = 8192,
) -> tuple[np.ndarray, np.ndarray]:
    """The `min(k, N)` documents of highest inner product with each query, best first.

    Args:
      query_BD: queries, any real dtype, computed in float32 at the highest matmul precision.
      document_ND: documents, split over all axes of `mesh` (default: one device). Where the mesh
        spans processes, all of them call this with the same arrays.
      k: how many; more than N gives N.
      block: documents scored at once on a device; at most QUERY_BLOCK x block scores exist there.

    Returns:
      scores [B, min(k, N)] float32, descending, and document indices [B, min(k, N)] int32. Equal
      scores are ordered by the lower index.

    Raises:
      ValueError: shapes that do not fit, k or block below 1, values that are not finite.
    """
    query_BD, document_ND = _checked(query_BD, "query"), _checked(document_ND, "document")
    if query_BD.shape[1] != document_ND.shape[1]:
        raise ValueError(f"queries {query_BD.shape} and documents {document_ND.shape}: other width")
    if k < 1 or block < 1:
        raise ValueError(f"k={k} and block={block} must be at least 1")
    B, N = len(query_BD), len(document_ND)
    wanted = min(k, N)
    if B == 0 or wanted == 0:
        return np.zeros((B, wanted), np.float32), np.zeros((B, wanted), np.int32)

    mesh = single_device_mesh() if mesh is None else mesh
    per_device = -(-N // mesh.size)
    block = min(block, _bucket(per_device, SMALLEST_DOCUMENTS))
    blocks = _round_up_blocks(-(-per_device // block))
    document_ND = _pad_rows(document_ND, mesh.size * blocks * block)
    document_ND = to_devices(document_ND, NamedSharding(mesh, _rows(mesh)))

    found = []
    for start in range(0, B, QUERY_BLOCK):
        part_BD = query_BD[start : start + QUERY_BLOCK]
        rows = _bucket(len(part_BD), SMALLEST_QUERIES)
        padded_BD = to_devices(_pad_rows(part_BD, rows), replicated(mesh))
        found.append((len(part_BD), _search(padded_BD, document_ND, N, k, block, mesh)))
    scores = [np.asarray(s_Bk)[:count, :wanted] for count, (s_Bk, _) in found]
    indices = [np.asarray(i_Bk)[:count, :wanted] for count, (_, i_Bk) in found]
    return np.concatenate(scores), np.concatenate(indices)


@functools.partial(jax.jit, static_argnames=("k", "block", "mesh"))
def _search(query_BD, document_ND, count, k, block, mesh):
    """Top k of the first `count` documents: per device, then over the devices."""
    search = jax.shard_map(
        functools.partial(_search_shard, k=k, block=block, axes=mesh.axis_names),
        mesh=mesh,
        in_specs=(PartitionSpec(), _rows(mesh), PartitionSpec()),
        out_specs=PartitionSpec(None, mesh.axis_names),
    )
    score_Bm, index_Bm = search(query_BD, document_ND, count)
    # Devices hold rising ranges of documents, so the order of ties survives the merge.
    best = _merge(score_Bm, index_Bm, min(k, score_Bm.shape[1]))
    return jax.lax.with_sharding_constraint(best, replicated(mesh))


def _search_shard(query_BD, document_nD, count, *, k, block, axes):
    """Top `min(k, n)` of one device's n documents; what is missing has score -inf."""
    B, n = len(query_BD), len(document_nD)
    k = min(k, n)
    first = jax.lax.axis_index(axes) * n
    valid = jnp.clip(count - first, 0, n)

    def visit(i, best):
        block_nD = jax.lax.dynamic_slice_in_dim(document_nD, i * block, block)
        score_Bn = jnp.matmul(query_BD, block_nD.T, precision=jax.lax.Precision.HIGHEST)
        # An overflow to -inf must still rank above padding.
        score_Bn = jnp.maximum(score_Bn, jnp.finfo(jnp.float32).min)
        position_n = i * block + jnp.arange(block)
        score_Bn = jnp.where(position_n < valid, score_Bn, -jnp.inf)
        score_Bk, at_Bk = jax.lax.top_k(score_Bn, min(k, block))
        index_Bk = first + i * block + at_Bk
        # Earlier blocks come first: `top_k` keeps the order of equal scores.
        joined = [jnp.concatenate(pair, 1) for pair in zip(best, (score_Bk, index_Bk), strict=True)]
        return _merge(*joined, k)

    nothing = jnp.full((B, k), -jnp.inf, jnp.float32), jnp.full((B, k), -1, jnp.int32)
    nothing = jax.lax.pcast(nothing, axes, to="varying")
    return jax.lax.fori_loop(0, (valid + block - 1) // block, visit, nothing)


def _merge(score_Bm, index_Bm, k):
    score_Bk, at_Bk = jax.lax.top_k(score_Bm, k)
    return score_Bk, jnp.take_along_axis(index_Bm, at_Bk, axis=1)


def _rows(mesh) -> PartitionSpec:
    return PartitionSpec(mesh.axis_names)


def _checked(x_ND, name: str) -> np.ndarray:
    x_ND = np.asarray(x_ND)
    if x_ND.ndim != 2:
        raise ValueError(f"{name} array must be [count, width], got shape {x_ND.shape}")
    x_ND = x_ND.astype(np.float32, copy=False)
    finite_N = np.isfinite(x_ND).all(axis=1)
    if not finite_N.all():
        raise ValueError(f"{name} {int(np.argmin(finite_N))} holds a value that is not finite")
    return x_ND


def _pad_rows(x_ND: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(x_ND, ((0, rows - len(x_ND)), (0, 0)))


def _bucket(count: int, smallest: int) -> int:
    """`smallest` times a power of four, at least `count`."""
    while smallest < count:
        smallest *= 4
    return smallest


def _round_up_blocks(blocks: int) -> int:
    """At most a quarter more, in four steps per doubling."""
    step = max(1, 1 << max(0, blocks.bit_length() - 3))
    return -(-blocks // step) * step
