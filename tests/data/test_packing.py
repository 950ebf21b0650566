import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_embed_jax.data.packing import fill_rows, pack


@given(
    st.lists(st.integers(1, 48), max_size=80),
    st.integers(1, 9),
)
def test_texts_never_overlap_and_nothing_is_lost(lengths, slots):
    packing = pack(lengths, 48, slots)
    sequences = [np.full(n, 100 + i) for i, n in enumerate(lengths)]
    rows = packing.rows + 2
    token, text_index, position = fill_rows(packing, sequences, rows, 48, pad_id=1)
    assert (text_index >= 0).sum() == sum(lengths)
    assert (token[text_index < 0] == 1).all()
    assert text_index.max(initial=-1) < slots
    for i, n in enumerate(lengths):
        row, index = divmod(int(packing.slot(slots)[i]), slots)
        mine = text_index[row] == index
        np.testing.assert_array_equal(token[row, mine], np.full(n, 100 + i))
        np.testing.assert_array_equal(position[row, mine], np.arange(n))


def test_packs_well():
    """Best-fit decreasing on lengths like queries and documents leaves less than 3 % empty."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(3, 33, 256), rng.integers(20, 257, 256)])
    packing = pack(lengths, 256, 32)
    assert lengths.sum() / (packing.rows * 256) > 0.97


def test_too_long_text_is_named():
    with pytest.raises(ValueError, match=r"text 1 has 9 tokens: a row takes 1 to 8"):
        pack([3, 9], 8, 4)
    with pytest.raises(ValueError, match="text 0 has 0 tokens"):
        pack([0], 8, 4)
