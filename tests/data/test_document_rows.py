"""Rows of documents: every token once, attention's borders, and which rows a step draws."""

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_embed_jax.data.document_rows import WINDOW, row_table
from moe_embed_jax.data.schedule import Group, MixedSchedule, Schedule

VOCABULARY = types.SimpleNamespace(bos_id=0, pad_id=1, eos_id=2)


def make_documents(lengths):
    """Ids that name their document and place: 1000 * document + place."""
    return {i: 1000 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)}


def groups_of(sizes):
    stops = np.cumsum(sizes)
    return [
        {"task": f"t{i % 2}", "language": f"l{i // 2}", "start": int(stop - n), "stop": int(stop)}
        for i, (n, stop) in enumerate(zip(sizes, stops, strict=True))
    ]


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    row_length=st.integers(3, 40),
    across=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_rows_hold_every_token_once(sizes, row_length, across, seed, data):
    total = sum(sizes)
    lengths = np.array(data.draw(st.lists(st.integers(1, 130), min_size=total, max_size=total)))
    documents = make_documents(lengths)
    groups = groups_of(sizes)
    table = row_table(lengths, groups, row_length, seed, across)
    assert [g.stop for g in table.groups][-1] == len(table)
    language_of = {n: g["language"] for g in groups for n in range(g["start"], g["stop"])}
    seen = []
    for group in table.groups:
        for row in range(group.start, group.stop):
            token_L, text_index_L, position_L = table.fill(row, documents, VOCABULARY)
            there = text_index_L >= 0
            assert there.sum() == table.tokens([row]) > 0
            assert (token_L[~there] == 1).all()
            content = token_L[token_L >= 1000]
            assert {language_of[int(t) // 1000 - 1] for t in content} <= {group.language}
            seen += content.tolist()
            if across:
                assert set(text_index_L[there].tolist()) == {0}
                np.testing.assert_array_equal(position_L[there], np.arange(there.sum()))
                continue
            for index in range(text_index_L.max() + 1):
                piece = text_index_L == index
                ids = token_L[piece]
                assert (ids[0], ids[-1]) == (0, 2)
                np.testing.assert_array_equal(position_L[piece], np.arange(len(ids)))
                assert len({int(t) // 1000 for t in ids[1:-1]}) == 1
                np.testing.assert_array_equal(np.diff(ids[1:-1]), 1)
    assert sorted(seen) == sorted(np.concatenate(list(documents.values())).tolist())


def test_the_reference_s_rows_are_full_and_cross_documents():
    lengths = np.array([30, 5, 17, 9, 44])
    table = row_table(lengths, groups_of([5]), 16, 0, across_documents=True)
    assert len(table) == -(-(lengths.sum() + 10) // 16)
    stream = []
    for row in range(len(table)):
        token_L, text_index_L, _ = table.fill(row, make_documents(lengths), VOCABULARY)
        stream += token_L[text_index_L >= 0].tolist()
        assert row == len(table) - 1 or (text_index_L == 0).all()
    assert len(stream) == lengths.sum() + 10
    text = "".join("<" if t == 0 else ">" if t == 2 else "." for t in stream)
    assert sorted(map(len, text.strip("<>").split("><"))) == sorted(lengths)


def test_rows_are_filled_and_a_function_of_lengths_and_seed():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5, 1, 3 * WINDOW).astype(int) + 1, 5000)
    groups = [{"task": "t", "language": "xx", "start": 0, "stop": len(lengths)}]
    table = row_table(lengths, groups, 512, 3, False)
    again = row_table(lengths.copy(), groups, 512, 3, False)
    other = row_table(lengths, groups, 512, 4, False)
    np.testing.assert_array_equal(table.document, again.document)
    assert not np.array_equal(table.document, other.document)
    assert table.tokens(np.arange(len(table))) / (len(table) * 512) > 0.97


GROUPS = [
    Group("documents", "de", 0, 100, 1.0),
    Group("documents", "fr", 100, 130, 1.0),
    Group("documents", "yo", 130, 137, 1.0),
]


@pytest.mark.parametrize("exponent", [0.3, 1.0])
def test_a_mixed_schedule_is_the_plain_one_row_by_row(exponent):
    mixed = MixedSchedule(GROUPS, 16, steps=60, seed=4, language_exponent=exponent)
    plain = Schedule(GROUPS, 1, steps=60 * 16, seed=4, language_exponent=exponent)
    for step in (0, 1, 7, 31, 59, 2):
        expected = [plain.rows(16 * step + i)[0] for i in range(16)]
        np.testing.assert_array_equal(mixed.rows(step), expected)
    drawn = np.concatenate([mixed.rows(step) for step in range(60)])
    sizes = np.array([100, 30, 7]) ** exponent
    counts = [((drawn >= g.start) & (drawn < g.stop)).sum() for g in GROUPS]
    np.testing.assert_allclose(counts, 960 * sizes / sizes.sum(), atol=3)
