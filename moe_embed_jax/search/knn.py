"""Exact nearest neighbours by inner product, by brute force, with the documents over a mesh.

Documents are streamed: a load of them is on the mesh while the next is read, from memory or from a
store of vectors larger than memory. Every device walks over its slice of the load in blocks and
keeps the best k so far, so that the B x N scores never exist at once; the k of each device are
merged after each load. Arrays are padded to a few sizes, so that a hundred small sets share a
handful of compilations; the walk stops after the last real block, so padding costs memory, not
time. `selection` is how a block's best are found.
"""

import concurrent.futures
import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_embed_jax.mesh import replicated, single_device_mesh
from moe_embed_jax.processes import to_devices
from moe_embed_jax.search.selection import Best, merge, merge_block, nothing

QUERY_BLOCK = 1024
BLOCK = 8192  # documents scored at once on a device
LOAD = 131_072  # documents on a device at a time
SMALLEST_QUERIES = 64
SMALLEST_DOCUMENTS = 256


class Documents(Protocol):
    """[N, D] rows that can be sliced: an array, or a `search.vectors.VectorStore`."""

    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Layout:
    """How documents lie on a mesh.

    block: scored at once on a device. rows: of a load, over all devices, a multiple of `block` on
    each. loads: how many there are.
    """

    block: int
    rows: int
    loads: int


def document_layout(
    count: int, devices: int, block: int = BLOCK, load: int | None = LOAD
) -> Layout:
    """The layout of `count` documents; `load`: at most on a device at a time, None: all."""
    most = -(-count // devices)
    per_device = most if load is None else min(most, load)
    block = min(block, _bucket(per_device, SMALLEST_DOCUMENTS))
    rows = devices * block * _round_up_blocks(-(-per_device // block))
    return Layout(block, rows, -(-count // rows))


def top_k(
    query_BD: np.ndarray,
    document_ND: Documents,
    k: int,
    mesh: jax.sharding.Mesh | None = None,
    block: int = BLOCK,
    load: int | None = LOAD,
    recall: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `min(k, N)` documents of highest inner product with each query, best first.

    Args:
      query_BD: queries, any real dtype, computed in float32 at the highest matmul precision.
      document_ND: documents, read in slices, each once; split over all axes of `mesh` (default:
        one device). Where the mesh spans processes, all of them call this with the same arrays.
      k: how many; more than N gives N.
      block: documents scored at once on a device; at most QUERY_BLOCK x block scores exist there.
      load: documents on a device at a time (a second load is under way meanwhile); None: all.
      recall: None is exact; else, for speed on TPUs, the expected share of the k that is found
        (`jax.lax.approx_max_k` in each block; elsewhere than on TPUs the result is exact).

    Returns:
      scores [B, min(k, N)] float32, descending, and document indices [B, min(k, N)] int32. Equal
      scores are ordered by the lower index.

    Raises:
      ValueError: shapes that do not fit, k, block or load below 1, a recall outside (0, 1), values
        that are not finite.
    """
    query_BD = _checked(query_BD, "query")
    B, (N, width) = len(query_BD), _shape(document_ND, "document")
    if query_BD.shape[1] != width:
        raise ValueError(f"queries {query_BD.shape} and documents {(N, width)}: other width")
    if k < 1 or block < 1 or (load is not None and load < 1):
        raise ValueError(f"k={k}, block={block} and load={load} must be at least 1")
    if recall is not None and not 0 < recall < 1:
        raise ValueError(f"recall={recall} must be between 0 and 1")
    wanted = min(k, N)
    if B == 0 or wanted == 0:
        return np.zeros((B, wanted), np.float32), np.zeros((B, wanted), np.int32)

    mesh = single_device_mesh() if mesh is None else mesh
    layout = document_layout(N, mesh.size, block, load)
    starts = range(0, B, QUERY_BLOCK)
    counts = [min(QUERY_BLOCK, B - start) for start in starts]
    queries, best = [], []
    for start, count in zip(starts, counts, strict=True):
        rows = _bucket(count, SMALLEST_QUERIES)
        padded_BD = _pad_rows(query_BD[start : start + count], rows)
        queries.append(to_devices(padded_BD, replicated(mesh)))
        best.append(_start(rows, k, mesh))
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        pending = reader.submit(_load, document_ND, 0, layout.rows, mesh)
        for i in range(layout.loads):
            first = i * layout.rows
            loaded_ND = pending.result()
            if i + 1 < layout.loads:
                pending = reader.submit(_load, document_ND, first + layout.rows, layout.rows, mesh)
            jax.block_until_ready(best)  # or all loads would wait on the devices at a time
            best = [
                search(part_BD, loaded_ND, first, N, part, layout.block, recall, mesh)
                for part_BD, part in zip(queries, best, strict=True)
            ]
    scores = [np.asarray(s)[:n, :wanted] for n, (s, _) in zip(counts, best, strict=True)]
    indices = [np.asarray(i)[:n, :wanted] for n, (_, i) in zip(counts, best, strict=True)]
    return np.concatenate(scores), np.concatenate(indices)


@functools.partial(jax.jit, static_argnames=("block", "recall", "mesh"))
def search(
    query_BD, document_ND, first, count, best: Best, block: int, recall: float | None, mesh
) -> Best:
    """`best` and the documents of one load, per device, then over the devices.

    Args:
      query_BD: replicated. document_ND: one load, its rows over all axes of the mesh.
      first: index of the load's first document. count: of all documents; what follows is padding.
      best: of the loads before, replicated.
    """
    k = best[0].shape[1]
    cpu = np.asarray(mesh.devices).flat[0].platform == "cpu"
    walk = jax.shard_map(
        functools.partial(
            _search_shard, k=k, block=block, recall=recall, cpu=cpu, axes=mesh.axis_names
        ),
        mesh=mesh,
        in_specs=(PartitionSpec(), _rows(mesh), PartitionSpec(), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(None, mesh.axis_names),
    )
    found = walk(query_BD, document_ND, first, count, best[0][:, -1])
    # Devices hold rising ranges of documents, so the order of ties survives the merge.
    return jax.lax.with_sharding_constraint(merge([best, found], k, cpu), replicated(mesh))


def _search_shard(
    query_BD, document_nD, first, count, bar_B, *, k, block, recall, cpu, axes
) -> Best:
    """Best k of one device's n documents that score above `bar_B`; the rest has score -inf."""
    n = len(document_nD)
    first = first + jax.lax.axis_index(axes) * n
    valid = jnp.clip(count - first, 0, n)

    def visit(i, best):
        block_nD = jax.lax.dynamic_slice_in_dim(document_nD, i * block, block)
        block_nD = block_nD.astype(jnp.float32)
        score_Bn = jnp.matmul(query_BD, block_nD.T, precision=jax.lax.Precision.HIGHEST)
        start = i * block
        return merge_block(best, score_Bn, first + start, valid - start, bar_B, recall, cpu)

    best = jax.lax.pcast(nothing(len(query_BD), min(k, n)), axes, to="varying")
    bar_B = jax.lax.pcast(bar_B, axes, to="varying")
    return jax.lax.fori_loop(0, (valid + block - 1) // block, visit, best)


@functools.partial(jax.jit, static_argnames=("rows", "k", "mesh"))
def _start(rows: int, k: int, mesh) -> Best:
    return jax.lax.with_sharding_constraint(nothing(rows, k), replicated(mesh))


def _rows(mesh) -> PartitionSpec:
    return PartitionSpec(mesh.axis_names)


def _load(document_ND: Documents, first: int, rows: int, mesh) -> jax.Array:
    x_ND = _checked_values(document_ND[first : first + rows], "document", first)
    return to_devices(_pad_rows(x_ND, rows), NamedSharding(mesh, _rows(mesh)))


def _shape(x_ND, name: str) -> tuple[int, int]:
    shape = tuple(getattr(x_ND, "shape", ())) or np.shape(x_ND)
    if len(shape) != 2:
        raise ValueError(f"{name} array must be [count, width], got shape {shape}")
    return shape


def _checked(x_ND, name: str) -> np.ndarray:
    _shape(x_ND, name)
    return _checked_values(np.asarray(x_ND), name, 0).astype(np.float32, copy=False)


def _checked_values(x_ND, name: str, first: int) -> np.ndarray:
    """Finite values; what is wider than float32, or no float, becomes float32."""
    x_ND = np.asarray(x_ND)
    if x_ND.dtype.itemsize > 2 or x_ND.dtype.kind in "iub":
        x_ND = x_ND.astype(np.float32, copy=False)
    # 0 times what is not finite is not 0: a matrix product is the fastest look at all values.
    with np.errstate(invalid="ignore"):
        finite_N = x_ND @ np.zeros(x_ND.shape[1], x_ND.dtype) == 0
    if not finite_N.all():
        index = first + int(np.argmin(finite_N))
        raise ValueError(f"{name} {index} holds a value that is not finite")
    return x_ND


def _pad_rows(x_ND: np.ndarray, rows: int) -> np.ndarray:
    if len(x_ND) == rows:
        return x_ND
    padded = np.zeros((rows, x_ND.shape[1]), x_ND.dtype)
    padded[: len(x_ND)] = x_ND
    return padded


def _bucket(count: int, smallest: int) -> int:
    """`smallest` times a power of four, at least `count`."""
    while smallest < count:
        smallest *= 4
    return smallest


def _round_up_blocks(blocks: int) -> int:
    """At most a quarter more, in four steps per doubling."""
    step = max(1, 1 << max(0, blocks.bit_length() - 3))
    return -(-blocks // step) * step
