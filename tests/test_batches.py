import numpy as np
import pytest
import synthetic_data

from moe_embed_jax.data.batches import MAX_BUCKETS, Batches, choose_buckets
from moe_embed_jax.data.data_spec import planned_store_path
from moe_embed_jax.data.schedule import Group, Schedule
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import single_device_mesh

SLOTS = 6


@pytest.fixture(scope="module")
def store(data_dir):
    return TokenStore.open(planned_store_path(synthetic_data.PREPARATION, data_dir))


def make_batches(store, steps=60, batch_size=16, row_length=48):
    schedule = Schedule([Group(**group) for group in store.groups], batch_size, steps, seed=0)
    return Batches(store, schedule, single_device_mesh(), row_length, SLOTS, pad_id=1)


def test_a_batch_holds_exactly_its_pairs(store):
    batches = make_batches(store)
    for step in (0, 7, 59):
        batch = batches.at(step)
        rows = batches.schedule.rows(step)
        arrays = {name: np.asarray(array) for name, array in batch.arrays.items()}
        assert batch.tokens == (arrays["text_index_RL"] >= 0).sum()
        for side, name in enumerate(("query", "document")):
            np.testing.assert_array_equal(arrays[f"{name}_id_B2"], store.content_ids[rows, side])
            for pair, slot in enumerate(arrays[f"{name}_slot_B"]):
                row, index = divmod(int(slot), SLOTS)
                mine = arrays["text_index_RL"][row] == index
                expected = store.read([rows[pair]])[0][side]
                np.testing.assert_array_equal(arrays["token_RL"][row, mine], expected)
                np.testing.assert_array_equal(
                    arrays["position_RL"][row, mine], np.arange(len(expected))
                )


def test_batches_are_a_function_of_the_step(store):
    one, other = make_batches(store), make_batches(store)
    later = list(other.iterate(20, 24))
    assert [batch.step for batch in later] == [20, 21, 22, 23]
    for batch in later:
        again = one.at(batch.step)
        assert again.group == batch.group
        for name, array in batch.arrays.items():
            np.testing.assert_array_equal(array, again.arrays[name])


def test_few_shapes(store):
    batches = make_batches(store, steps=200)
    shapes = {batches.at(step).arrays["token_RL"].shape for step in range(0, 200, 3)}
    assert len(shapes) <= MAX_BUCKETS
    assert {shape[0] for shape in shapes} <= set(batches.buckets)


def test_buckets_are_few_sorted_and_cover_everything():
    rng = np.random.default_rng(0)
    needed = np.concatenate([rng.integers(40, 48, 30), rng.integers(200, 230, 30)])
    buckets = choose_buckets(needed, most_rows=512)
    assert len(buckets) <= MAX_BUCKETS and list(buckets) == sorted(buckets)
    assert buckets[-1] == 512
    slots = sum(next(b for b in buckets if b >= n) for n in needed)
    assert needed.sum() / slots > 0.9
    # A threshold that would save next to nothing is not worth a compilation.
    assert len(choose_buckets([100, 101, 100, 101], most_rows=512)) == 2


def test_what_the_mesh_cannot_do_is_refused(store):
    with pytest.raises(UserError, match="row_length=16 is shorter than the longest prepared text"):
        make_batches(store, row_length=16)
