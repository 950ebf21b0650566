import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_embed_jax.data.packing import fill_rows
from moe_embed_jax.inference_batches import SLOTS, TOKENS_PER_CALL, call_rows, plan_calls


@given(
    lengths=st.lists(st.integers(0, 700), max_size=150),
    devices=st.sampled_from([1, 3, 8]),
    batch_size=st.sampled_from([None, 1, 7]),
    budget=st.sampled_from([TOKENS_PER_CALL, 2_048]),
)
def test_every_text_is_in_one_call_and_fits(lengths, devices, batch_size, budget):
    sequences = [np.full(n, 100 + i) for i, n in enumerate(lengths)]
    seen = []
    for call in plan_calls(lengths, devices, batch_size, budget):
        assert call.rows % devices == 0
        assert call.rows * call.row_length <= max(budget, call.row_length) * devices
        assert batch_size is None or len(call.members) <= batch_size
        own = [sequences[i] for i in call.members]
        token_RL, text_index_RL, _ = fill_rows(call.packing, own, call.rows, call.row_length, 1)
        assert text_index_RL.max() < SLOTS
        for i, slot in zip(call.members, call.packing.slot(SLOTS), strict=True):
            row, index = divmod(int(slot), SLOTS)
            mine = token_RL[row, text_index_RL[row] == index]
            np.testing.assert_array_equal(mine, sequences[i])
        seen += call.members.tolist()
    assert sorted(seen) == [i for i, n in enumerate(lengths) if n > 0]


def test_little_is_left_empty_and_shapes_are_few():
    rng = np.random.default_rng(0)
    cases = ((160, 0.85, TOKENS_PER_CALL), (1_000, 0.9, TOKENS_PER_CALL))
    for count, least, budget in (*cases, (5_000, 0.95, TOKENS_PER_CALL), (160, 0.9, 2_048)):
        lengths = np.exp(rng.uniform(np.log(4), np.log(257), count)).astype(int)
        calls = list(plan_calls(lengths, 1, tokens_per_call=budget))
        slots = sum(call.rows * call.row_length for call in calls)
        assert lengths.sum() / slots > least, (count, lengths.sum() / slots)
        assert len({(call.rows, call.row_length) for call in calls}) <= 6


@given(
    st.integers(0, 3_000),
    st.sampled_from([64, 256, 4_096, 16_384]),
    st.sampled_from([1, 8]),
    st.sampled_from([TOKENS_PER_CALL, 2_048]),
)
def test_a_call_is_at_least_half_full(rows, row_length, devices, budget):
    sizes = call_rows(rows, row_length, devices, budget)
    assert sum(sizes) >= rows > sum(sizes[:-1]) or rows == sum(sizes) == 0
    if rows:
        spare = sum(sizes) - rows
        assert spare < devices or 2 * spare <= sizes[-1]


@given(st.integers(1, 3_000), st.sampled_from([1, 8]))
def test_a_text_alone_has_a_row_of_its_own_size(length, devices):
    (call,) = plan_calls([length], devices)
    assert call.rows == devices and call.members.tolist() == [0]
    assert length <= call.row_length < max(17, 2 * length)
    tokens = np.arange(100, 100 + length)
    token_RL, text_index_RL, _ = fill_rows(call.packing, [tokens], devices, call.row_length, 1)
    row, index = divmod(int(call.packing.slot(SLOTS)[0]), SLOTS)
    np.testing.assert_array_equal(token_RL[row, text_index_RL[row] == index], tokens)
    assert (text_index_RL >= 0).sum() == length


def test_many_texts_are_planned_in_parts():
    lengths = np.full(70_000, 3)
    calls = list(plan_calls(lengths, 1))
    members = np.concatenate([call.members for call in calls])
    assert np.unique(members).size == members.size == 70_000


SHAPES = {  # rows of a device and slots of a row
    *((1, 16), (1, 32), (1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (1, 2048)),
    *((8, 64), (64, 64), (128, 64), (8, 256), (32, 256), (8, 512), (16, 512), (8, 1024)),
    (4, 2048),
}


@given(
    st.lists(st.integers(0, 2_048), max_size=300),
    st.sampled_from([None, 1, 7, 100]),
    st.sampled_from([1, 8]),
)
def test_there_are_17_programs_at_most(lengths, batch_size, devices):
    """For texts of up to 2,048 tokens, as docs/efficiency.md says."""
    calls = plan_calls(lengths, devices, batch_size)
    assert {(call.rows // devices, call.row_length) for call in calls} <= SHAPES


def test_each_of_the_17_programs_is_needed_by_some_texts():
    used = set()
    for length in (10, 20, 40, 70, 200, 400, 800, 2_000):
        for count in (1, 2, 40, 60, 240, 4_000, 100_000):
            for call in plan_calls(np.full(min(count, 9_000), length), 1):
                used.add((call.rows, call.row_length))
    assert used == SHAPES and len(SHAPES) == 17
