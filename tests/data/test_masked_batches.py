"""Batches of masked language modelling: the rows of the schedule, whatever mesh and chunks."""

import numpy as np
import pytest
from helpers import synthetic_data

from moe_embed_jax.data.batches import MaskedBatches
from moe_embed_jax.data.data_spec import planned_store_path, vocabulary_path
from moe_embed_jax.data.document_rows import row_table
from moe_embed_jax.data.masking import make_masking
from moe_embed_jax.data.schedule import MixedSchedule, Schedule
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.tokenizers.vocabulary import Vocabulary

LENGTH, BATCH, STEPS, SEED = 64, 12, 40, 3
PREPARATION = synthetic_data.DOCUMENTS_PREPARATION


@pytest.fixture(scope="module")
def store(data_dir):
    return TokenStore.open(planned_store_path(PREPARATION, data_dir))


@pytest.fixture(scope="module")
def vocabulary(data_dir):
    return Vocabulary.load(vocabulary_path(PREPARATION, data_dir))


def make_batches(store, vocabulary, chunk_rows=0, schedule=Schedule, batch_size=BATCH, mesh=None):
    table = row_table(store.lengths[:, 0], store.groups, LENGTH, SEED, False)
    masking = make_masking(vocabulary, 0.3, 0.8, 0.1)
    steps = schedule(list(table.groups), batch_size, STEPS, SEED, 0.3)
    mesh = mesh or single_device_mesh()
    return MaskedBatches(store, table, steps, mesh, masking, vocabulary, SEED, chunk_rows)


def arrays_of(batch) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in vars(batch.arrays).items()}


@pytest.mark.parametrize("schedule", [Schedule, MixedSchedule])
def test_a_batch_is_its_rows_with_tokens_hidden(store, vocabulary, schedule):
    batches = make_batches(store, vocabulary, schedule=schedule)
    documents = {n: ids for n, (ids,) in enumerate(store.read(range(len(store))))}
    for step in (0, 7, STEPS - 1):
        batch = batches.at(step)
        arrays = {name: array[0] for name, array in arrays_of(batch).items()}
        restored = arrays["token_CRL"].copy()
        row, place = np.nonzero(arrays["target_CRP"] >= 0)
        columns = arrays["column_CRP"][row, place]
        restored[row, columns] = arrays["target_CRP"][row, place]
        for i, number in enumerate(batches.schedule.rows(step)):
            expected = batches.table.fill(number, documents, vocabulary)
            np.testing.assert_array_equal(restored[i], expected[0])
            np.testing.assert_array_equal(arrays["text_index_CRL"][i], expected[1])
            np.testing.assert_array_equal(arrays["position_CRL"][i], expected[2])
        assert batch.tokens == (arrays["text_index_CRL"] >= 0).sum()
        assert batch.group.name == (
            "documents/mixed" if schedule is MixedSchedule else batches.schedule.group(step).name
        )
        assert (arrays["token_CRL"] == vocabulary.mask_id).sum() > 0.2 * batch.tokens


def test_chunks_and_the_order_of_calls_change_nothing(store, vocabulary):
    """7 rows at a time: two chunks of 6."""
    whole, chunked = (make_batches(store, vocabulary, n) for n in (0, 7))
    for batch in chunked.iterate(5, 9):
        expected = arrays_of(whole.at(batch.step))
        for name, array in arrays_of(batch).items():
            assert array.shape[:2] == (2, 6)
            np.testing.assert_array_equal(array.reshape(expected[name].shape), expected[name])


def test_spare_rows_of_chunks_are_padding(store, vocabulary):
    """5 rows at a time: three chunks of 4 hold 10 rows and 2 spare ones."""
    arrays = arrays_of(make_batches(store, vocabulary, 4, batch_size=10).at(2))
    assert arrays["token_CRL"].shape == (3, 4, LENGTH)
    spare = {name: array.reshape(12, -1)[10:] for name, array in arrays.items()}
    assert (spare["token_CRL"] == vocabulary.pad_id).all()
    assert (spare["text_index_CRL"] == -1).all() and (spare["target_CRP"] == -1).all()


def test_the_same_row_is_hidden_otherwise_in_every_step(store, vocabulary):
    batches = make_batches(store, vocabulary)
    one, two = (batches.masked_rows(np.array([3, 4]), step, first=0).token_CRL for step in (1, 2))
    assert not np.array_equal(one, two)
    later = batches.masked_rows(np.array([4]), 1, first=1).token_CRL
    np.testing.assert_array_equal(one[0, 1], later[0, 0])


def test_a_batch_that_the_devices_do_not_divide_is_refused(store, vocabulary):
    class Three:
        size = 3

    with pytest.raises(UserError, match="choose a multiple of 3"):
        make_batches(store, vocabulary, batch_size=10, mesh=Three())
