"""What is hidden: shares, reproducibility, and what is never touched."""

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_embed_jax.data.masking import Masking, make_masking, most_hidden
from moe_embed_jax.errors import UserError

SIZE, PAD, MASK = 1000, 1, 999
VOCABULARY = types.SimpleNamespace(
    size=SIZE, bos_id=0, pad_id=PAD, eos_id=2, unk_id=3, mask_id=MASK
)
MASKING = make_masking(VOCABULARY, 0.3, 0.8, 0.1)
SPECIALS = (0, 1, 2, 3, MASK)


def make_row(rng, length=512, padding=40):
    token_L = rng.integers(4, MASK, length).astype(np.int32)
    token_L[::50] = 0
    token_L[49::50] = 2
    token_L[7::100] = 3
    token_L[length - padding :] = PAD
    return token_L


def test_shares_and_expected_counts():
    """A thousand rows: 30 % of the ordinary tokens, of which 80 / 10 / 10 %, within 5 sigma."""
    rng = np.random.default_rng(0)
    chosen = masked = replaced = kept = ordinary = 0
    tokens = []
    for row in range(1000):
        token_L = make_row(rng)
        hidden_L, column_P, target_P = MASKING.hide(token_L, 7, 3, row)
        columns = column_P[target_P >= 0]
        assert (np.diff(columns) > 0).all()
        np.testing.assert_array_equal(token_L[columns], target_P[target_P >= 0])
        assert not np.isin(token_L[columns], SPECIALS).any()
        others = np.setdiff1d(np.arange(512), columns)
        np.testing.assert_array_equal(hidden_L[others], token_L[others])
        now = hidden_L[columns]
        ordinary += int((~np.isin(token_L, SPECIALS)).sum())
        chosen += len(columns)
        masked += int((now == MASK).sum())
        kept += int((now == token_L[columns]).sum())
        changed = (now != MASK) & (now != token_L[columns])
        replaced += int(changed.sum())
        tokens += now[changed].tolist()
        # A row's own count is its share, rounded up or down.
        assert abs(len(columns) - 0.3 * (~np.isin(token_L, SPECIALS)).sum()) < 1
    assert abs(chosen / ordinary - 0.3) < 1e-3
    for count, share in ((masked, 0.8), (replaced, 0.1), (kept, 0.1)):
        sigma = np.sqrt(share * (1 - share) / chosen)
        assert abs(count / chosen - share) < 5 * sigma
    # Random tokens are uniform over the ordinary ones.
    assert not np.isin(tokens, SPECIALS).any()
    counts = np.bincount(tokens, minlength=SIZE)[4:MASK]
    chi_squared = np.sum((counts - counts.mean()) ** 2 / counts.mean())
    assert abs(chi_squared - len(counts)) < 5 * np.sqrt(2 * len(counts))


def test_every_position_is_equally_likely():
    token_L = make_row(np.random.default_rng(1), length=64, padding=0)
    hits = np.zeros(64)
    for row in range(4000):
        _, column_P, target_P = MASKING.hide(token_L, 0, 0, row)
        hits[column_P[target_P >= 0]] += 1
    ordinary = ~np.isin(token_L, SPECIALS)
    assert (hits[~ordinary] == 0).all()
    sigma = np.sqrt(0.3 * 0.7 / 4000)
    assert np.abs(hits[ordinary] / 4000 - 0.3).max() < 5 * sigma


def test_a_row_depends_on_seed_step_and_row_alone():
    token_L = make_row(np.random.default_rng(2))
    one = MASKING.hide(token_L, 5, 9, 11)
    again = make_masking(VOCABULARY, 0.3, 0.8, 0.1).hide(token_L.copy(), 5, 9, 11)
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
    for other in ((6, 9, 11), (5, 10, 11), (5, 9, 12)):
        assert not np.array_equal(one[0], MASKING.hide(token_L, *other)[0])


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 80),
    rate=st.floats(0.01, 0.99),
    row=st.integers(0, 2**31),
    seed=st.integers(0, 2**31),
)
def test_no_row_has_more_than_there_is_room_for(length, rate, row, seed):
    masking = Masking(rate, 0.8, 0.1, MASKING.ordinary, MASK)
    token_L = np.random.default_rng(seed).integers(0, SIZE, length).astype(np.int32)
    hidden_L, column_P, target_P = masking.hide(token_L, seed, 0, row)
    assert column_P.shape == target_P.shape == (most_hidden(length, rate),)
    there = target_P >= 0
    assert there.sum() <= np.ceil(rate * length + 1e-6)
    restored = hidden_L.copy()
    restored[column_P[there]] = target_P[there]
    np.testing.assert_array_equal(restored, token_L)


def test_a_tokenizer_without_a_mask_is_refused():
    vocabulary = types.SimpleNamespace(**{**vars(VOCABULARY), "mask_id": None})
    with pytest.raises(UserError, match="no mask token"):
        make_masking(vocabulary, 0.3, 0.8, 0.1)
