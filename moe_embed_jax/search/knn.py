"""Exact nearest neighbours by inner product, by brute force, with the documents over a mesh.

Documents are streamed: a load of them is on the mesh while the next is read, from memory or from a
store of vectors larger than memory. Every device walks over its slice of the load in blocks and
keeps the best k so far, so that the B x N scores never exist at once; the k of each device are
merged after each load. Arrays are padded to a few sizes, so that a hundred small sets share a
handful of compilations; the walk stops after the last real block, so padding costs memory, not
time. CPUs walk in their own way (`search.cpu`).
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_embed_jax.errors import UserError
from moe_embed_jax.kernels.cpu_products import bfloat16_is_faster
from moe_embed_jax.mesh import replicated, single_device_mesh
from moe_embed_jax.processes import share_of_process, to_devices, true_anywhere
from moe_embed_jax.search import cpu, exact
from moe_embed_jax.search.selection import Best, empty_top_k, masked, merge

QUERY_BLOCK = 1024
BLOCK = 8192  # documents scored at once on a device
LOAD = 131_072  # documents on a device at a time
SMALLEST_QUERIES = 64
ALIGNMENT = 64  # bytes; JAX on CPUs computes on NumPy's memory where it is aligned so, else copies
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
    block: int | None = None,
    load: int | None = None,
    recall: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `min(k, N)` documents of highest inner product with each query, best first.

    Args:
      query_BD: queries, any real dtype, taken as float32.
      document_ND: documents, read in slices, each once; split over all axes of `mesh` (default:
        one device), on CPUs over its processes. Where the mesh spans processes, all of them call
        this with the same arrays.
      k: how many; more than N gives N.
      block: documents scored at once on a device; at most QUERY_BLOCK x block scores exist there,
        on CPUs twice as many.
      load: documents on a device at a time; a second load is under way meanwhile. On CPUs three
        blocks are in memory. Both have defaults that suit the device.
      recall: None is exact; else, for speed on TPUs, the expected share of the k that is found
        (`jax.lax.approx_max_k` in each block; elsewhere than on TPUs the result is exact).

    Returns:
      scores [B, min(k, N)] float32, descending, and document indices [B, min(k, N)] int32. Equal
      scores are ordered by the lower index. On CPUs a score is the inner product rounded once
      (`search.exact`), so the result has the same bits whatever the blocks, processes and products
      are. Elsewhere it is a float32 product at the highest precision of the device, and documents
      whose scores differ by rounding errors of it may change places.

    Raises:
      ValueError: shapes that do not fit, k, block or load below 1, a recall outside (0, 1), values
        that are not finite.
      UserError: another process of the mesh failed.
    """
    query_BD = _checked(query_BD, "query")
    B, (N, width) = len(query_BD), _shape(document_ND, "document")
    if query_BD.shape[1] != width:
        raise ValueError(f"queries {query_BD.shape} and documents {(N, width)}: other width")
    if k < 1 or (block is not None and block < 1) or (load is not None and load < 1):
        raise ValueError(f"k={k}, block={block} and load={load} must be at least 1")
    if recall is not None and not 0 < recall < 1:
        raise ValueError(f"recall={recall} must be between 0 and 1")
    wanted = min(k, N)
    if B == 0 or wanted == 0:
        return np.zeros((B, wanted), np.float32), np.zeros((B, wanted), np.int32)

    mesh = single_device_mesh() if mesh is None else mesh
    parts = [query_BD[start : start + QUERY_BLOCK] for start in range(0, B, QUERY_BLOCK)]
    if runs_on_cpu(mesh):
        block = min(block or cpu.BLOCK, load or cpu.BLOCK)
        found = _walk_on_cpu(parts, document_ND, wanted, block, mesh)
    else:
        layout = document_layout(N, mesh.size, block or BLOCK, load or LOAD)
        found = _walk(parts, document_ND, k, layout, recall, mesh)
    scores = [np.asarray(score_Bk)[:, :wanted] for score_Bk, _ in found]
    indices = [np.asarray(index_Bk)[:, :wanted] for _, index_Bk in found]
    return np.concatenate(scores)[:B], np.concatenate(indices)[:B]


def _walk(parts, document_ND: Documents, k: int, layout: Layout, recall, mesh) -> list[Best]:
    """The best k of each part of the queries; padding of either side is still there."""
    count = _shape(document_ND, "document")[0]
    queries = [to_devices(_padded_queries(part_BD), replicated(mesh)) for part_BD in parts]
    best = [_start(len(part_BD), k, mesh) for part_BD in queries]
    for first, load_ND in _in_loads(document_ND, layout.rows, mesh, on_cpu=False):
        jax.block_until_ready(best)  # or all loads would wait on the devices at a time
        best = [
            search(part_BD, load_ND, first, count, part, layout.block, recall, mesh)
            for part_BD, part in zip(queries, best, strict=True)
        ]
    return best


def _walk_on_cpu(parts, document_ND: Documents, k: int, block: int, mesh) -> list[Best]:
    """The same by `search.cpu`. Processes of the mesh share the blocks: each walks its own."""
    count, width = _shape(document_ND, "document")
    work = float(count) * width * sum(map(len, parts))
    is_rounded = work > cpu.WORTH_MEASURING and bfloat16_is_faster()
    dtype = jnp.bfloat16 if is_rounded else jnp.float32
    queries = [cpu.Queries.start(_padded_queries(x_BD), len(x_BD), k, dtype) for x_BD in parts]
    block = document_layout(count, 1, block, block).rows
    process, processes = share_of_process(mesh)
    loads = _in_loads(document_ND, block, single_device_mesh(), True, process, processes)
    blocks = ((first, np.asarray(x_nD), min(block, count - first)) for first, x_nD in loads)
    if processes == 1:
        cpu.walk(queries, blocks, dtype)
        return [exact.unpacked(part.found_Bk) for part in queries]
    error = None
    try:
        cpu.walk(queries, blocks, dtype)
    except Exception as raised:  # the others would wait for this process
        error = raised
    if true_anywhere(error is not None):
        raise error or UserError("another process failed to search; its message says why")
    return [exact.unpacked(exact.best_of_all(part.found_Bk)) for part in queries]


def _padded_queries(query_BD: np.ndarray) -> np.ndarray:
    return pad_rows(query_BD, _bucket(len(query_BD), SMALLEST_QUERIES))


def runs_on_cpu(mesh: jax.sharding.Mesh) -> bool:
    return np.asarray(mesh.devices).flat[0].platform == "cpu"


@functools.partial(jax.jit, static_argnames=("block", "recall", "mesh"))
def search(
    query_BD, document_ND, first, count, best: Best, block: int, recall: float | None, mesh
) -> Best:
    """`best` and the documents of one load, per device, then over the devices.

    Args:
      query_BD: replicated. document_ND: one load, its rows over all axes of the mesh.
      first: index of the load's first document. count: of all documents; what follows is padding.
      best: of the loads before, replicated.
      recall: as of `top_k`.
    """
    k = best[0].shape[1]
    walk = jax.shard_map(
        functools.partial(_search_shard, k=k, block=block, recall=recall, axes=mesh.axis_names),
        mesh=mesh,
        in_specs=(PartitionSpec(), _rows(mesh), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(None, mesh.axis_names),
    )
    found = walk(query_BD, document_ND, first, count)
    # Devices hold rising ranges of documents, so the order of ties survives the merge.
    return jax.lax.with_sharding_constraint(merge([best, found], k), replicated(mesh))


def _search_shard(query_BD, document_nD, first, count, *, k, block, recall, axes) -> Best:
    """Best k of one device's n documents."""
    n = len(document_nD)
    first = first + jax.lax.axis_index(axes) * n
    valid = jnp.clip(count - first, 0, n)

    def visit(i, best):
        block_nD = jax.lax.dynamic_slice_in_dim(document_nD, i * block, block)
        block_nD = block_nD.astype(jnp.float32)
        score_Bn = jnp.matmul(query_BD, block_nD.T, precision=jax.lax.Precision.HIGHEST)
        start = i * block
        score_Bn = masked(score_Bn, jnp.arange(block), valid - start)
        if recall is None:
            score_Bk, at_Bk = jax.lax.top_k(score_Bn, min(k, block))
        else:
            score_Bk, at_Bk = jax.lax.approx_max_k(score_Bn, min(k, block), recall_target=recall)
        return merge([best, (score_Bk, first + start + at_Bk)], best[0].shape[1])

    best = jax.lax.pcast(empty_top_k(len(query_BD), min(k, n)), axes, to="varying")
    return jax.lax.fori_loop(0, (valid + block - 1) // block, visit, best)


@functools.partial(jax.jit, static_argnames=("rows", "k", "mesh"))
def _start(rows: int, k: int, mesh) -> Best:
    return jax.lax.with_sharding_constraint(empty_top_k(rows, k), replicated(mesh))


def _rows(mesh) -> PartitionSpec:
    return PartitionSpec(mesh.axis_names)


def _in_loads(
    document_ND: Documents, rows: int, mesh, on_cpu: bool, share: int = 0, shares: int = 1
) -> Iterator[tuple[int, jax.Array]]:
    """(index of its first document, load) of each load, or of every `shares`-th one, beginning with
    number `share`; the next one is read in a thread meanwhile.

    on_cpu: the last load may have fewer rows; and memory of a load is written over when the load
    after the next but one is read, because new memory costs more than the copy into it.
    """
    count = _shape(document_ND, "document")[0]
    memory = {}

    def read(number: int) -> jax.Array:
        first = number * rows
        x_ND = _checked_values(document_ND[first : first + rows], "document", first)
        size = min(rows, _bucket(len(x_ND), SMALLEST_DOCUMENTS)) if on_cpu else rows
        if on_cpu and not (len(x_ND) == size and _is_aligned(x_ND)):
            turn = number // shares % 3
            if turn not in memory:
                memory[turn] = _aligned_empty((rows, x_ND.shape[1]), x_ND.dtype)
            memory[turn][: len(x_ND)] = x_ND
            memory[turn][len(x_ND) : size] = 0
            x_ND = memory[turn][:size]
        return to_devices(pad_rows(x_ND, size), NamedSharding(mesh, _rows(mesh)))

    numbers = range(share, -(-count // rows), shares)
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        pending = [reader.submit(read, number) for number in numbers[:1]]
        for number, after in itertools.zip_longest(numbers, numbers[1:]):
            load_ND = pending.pop().result()
            if after is not None:
                pending.append(reader.submit(read, after))
            yield number * rows, load_ND


def _is_aligned(x_ND: np.ndarray) -> bool:
    return x_ND.flags.c_contiguous and x_ND.ctypes.data % ALIGNMENT == 0


def _aligned_empty(shape, dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


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
    with np.errstate(invalid="ignore", over="ignore"):
        doubtful = np.flatnonzero(~np.isfinite(x_ND.sum(axis=1)))  # fast; finite sums may overflow
    for index in doubtful:
        if not np.isfinite(x_ND[index]).all():
            raise ValueError(f"{name} {first + index} holds a value that is not finite")
    return x_ND


def pad_rows(x_ND: np.ndarray, rows: int) -> np.ndarray:
    """`rows` rows: `x_ND`, then zeros."""
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
