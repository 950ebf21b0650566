import math

import jax
import numpy as np
import pytest
from helpers import synthetic_data

from moe_embed_jax.data.batches import PairBatches
from moe_embed_jax.data.buckets import MAX_BUCKETS, choose_buckets, in_chunks, most_buckets
from moe_embed_jax.data.data_spec import planned_store_path
from moe_embed_jax.data.packing import pack
from moe_embed_jax.data.schedule import Group, Schedule
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import single_device_mesh

SLOTS = 6


@pytest.fixture(scope="module")
def store(data_dir):
    return TokenStore.open(planned_store_path(synthetic_data.PREPARATION, data_dir))


def make_batches(store, steps=60, batch_size=16, row_length=48, chunk_rows=0, **limits):
    schedule = Schedule([Group(**group) for group in store.groups], batch_size, steps, seed=0)
    mesh = single_device_mesh()
    return PairBatches(store, schedule, mesh, row_length, SLOTS, 1, chunk_rows, **limits)


@pytest.mark.parametrize("chunk_rows", [0, 4])
def test_a_batch_holds_exactly_its_pairs(store, chunk_rows):
    batches = make_batches(store, chunk_rows=chunk_rows)
    for step in (0, 7, 59):
        batch = batches.at(step)
        rows = batches.schedule.rows(step)
        arrays = {name: np.asarray(array) for name, array in vars(batch.arrays).items()}
        chunks, chunk, length = arrays["token_CRL"].shape
        assert chunk <= chunk_rows or (chunk_rows, chunks) == (0, 1)
        token_RL, text_index_RL, position_RL = (
            arrays[f"{name}_CRL"].reshape(-1, length)
            for name in ("token", "text_index", "position")
        )
        assert batch.tokens == (text_index_RL >= 0).sum()
        assert arrays["valid_BM"].all()
        slots = (arrays["query_slot_B"], arrays["document_slot_BM"][:, 0])
        ids = (arrays["query_id_B2"], arrays["document_id_BM2"][:, 0])
        for side in range(2):
            np.testing.assert_array_equal(ids[side], store.content_ids[rows, side])
            for pair, slot in enumerate(slots[side]):
                row, index = divmod(int(slot), SLOTS)
                mine = text_index_RL[row] == index
                expected = store.read([rows[pair]])[0][side]
                np.testing.assert_array_equal(token_RL[row, mine], expected)
                np.testing.assert_array_equal(position_RL[row, mine], np.arange(len(expected)))


def test_batches_are_a_function_of_the_step(store):
    one, other = make_batches(store), make_batches(store)
    later = list(other.iterate(20, 24))
    assert [batch.step for batch in later] == [20, 21, 22, 23]
    for batch in later:
        again = one.at(batch.step)
        assert again.group == batch.group
        jax.tree.map(np.testing.assert_array_equal, batch.arrays, again.arrays)


def test_few_shapes(store):
    batches = make_batches(store, steps=200)
    shapes = {batches.at(step).arrays.token_CRL.shape for step in range(0, 200, 3)}
    assert len(shapes) <= MAX_BUCKETS
    assert {shape[0] * shape[1] for shape in shapes} <= set(batches.buckets)


def test_one_shape_where_a_compilation_costs_more_than_the_run(store):
    """A short run on a TPU or GPU, and any run whose config says so."""
    assert [most_buckets(999, platform) for platform in ("cpu", "gpu", "tpu")] == [
        MAX_BUCKETS,
        1,
        1,
    ]
    assert most_buckets(1000, "gpu") == MAX_BUCKETS
    many, one = make_batches(store), make_batches(store, row_buckets=1)
    assert len(many.buckets) > 1
    needed = max(one._rows_needed(one._packings(one.schedule.rows(step))) for step in range(60))
    assert one.buckets == (needed,)
    # Steps of which some were not seen: one row count for them, and one that every step fits.
    assert choose_buckets([40, 100, 60], most_rows=512, most=1) == (103, 512)


def test_buckets_are_few_sorted_and_cover_everything():
    rng = np.random.default_rng(0)
    needed = np.concatenate([rng.integers(40, 48, 30), rng.integers(200, 230, 30)])
    buckets = choose_buckets(needed, most_rows=512)
    assert len(buckets) <= MAX_BUCKETS and list(buckets) == sorted(buckets)
    assert buckets[-1] == 512
    slots = sum(next(b for b in buckets if b >= n) for n in needed)
    assert needed.sum() / slots > 0.9
    every_step = choose_buckets(needed)
    assert len(every_step) <= MAX_BUCKETS and every_step[-1] == needed.max()
    # A threshold that would save next to nothing is not worth a compilation.
    assert len(choose_buckets([100, 101, 100, 101], most_rows=512)) == 2


def test_what_the_mesh_cannot_do_is_refused(store):
    with pytest.raises(UserError, match="row_length=16 is shorter than the longest prepared text"):
        make_batches(store, row_length=16)


@pytest.mark.parametrize("chunk_rows", [0, 8, 32])
@pytest.mark.parametrize("pairs", [128, 1024])
@pytest.mark.parametrize("known", [24, 48])
def test_rows_are_well_filled(pairs, chunk_rows, known):
    """Queries of 3 to 32 and documents of 20 to 256 tokens: at least 0.9 of the slots are real,
    whether all 48 steps could be packed to choose the buckets, or half of them."""
    rng = np.random.default_rng(0)
    needed, tokens = [], 0
    for _ in range(48):
        lengths = np.concatenate([rng.integers(3, 33, pairs), rng.integers(20, 257, pairs)])
        needed.append(pack(lengths, 256, 16).rows)
        tokens += lengths.sum()
    buckets = choose_buckets(needed[:known], 2 * pairs if known < 48 else None, chunk_rows)
    assert len(buckets) <= MAX_BUCKETS
    used = [next(b for b in buckets if b >= rows) for rows in needed]
    assert all(math.prod(in_chunks(rows, chunk_rows)) == rows for rows in used)
    assert tokens / (256 * sum(used)) >= 0.9


@pytest.mark.parametrize(
    ("rows", "chunk_rows", "expected"),
    [(10, 0, (1, 10)), (10, 4, (3, 4)), (8, 4, (2, 4)), (9, 8, (2, 5)), (3, 8, (1, 3))],
)
def test_equal_chunks(rows, chunk_rows, expected):
    assert in_chunks(rows, chunk_rows) == expected
