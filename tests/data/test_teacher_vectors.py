"""A teacher's vectors by rows of a token store, from what launch/filter.py and mine.py keep."""

import numpy as np
import pytest
from helpers.stand_in_teacher import WIDTH, StandInTeacher, pair

from moe_embed_jax.curation.pair_texts import Embedding, PairTexts, distinct
from moe_embed_jax.data.teacher_vectors import INDEX, VECTORS, TeacherVectors, width_of
from moe_embed_jax.data.teaching import Teaching
from moe_embed_jax.errors import UserError
from moe_embed_jax.tokenizers.vocabulary import content_ids

ROWS = [pair(i % 7, wrong=i > 9) for i in range(12)]


def embed(work, rows=ROWS, dtype="float32", chunks=2):
    """A work folder in the layout of the filter (two chunks), or of mining (one)."""
    step = -(-len(rows) // chunks)
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        folder = work / "00000-faq-en"
        folder = folder / f"chunk-{begin}" if chunks > 1 else folder
        texts = PairTexts(distinct(r.query for r in part), distinct(r.document for r in part))
        Embedding(StandInTeacher(), dtype=dtype).embed(folder, texts)
    return work


def ids(rows):
    return np.stack(
        [content_ids([r.query for r in rows]), content_ids([r.document for r in rows])], axis=1
    )


def opened(work, rows=ROWS, used=None, negatives=()):
    used = np.ones(len(rows), bool) if used is None else used
    cache = work.parent / "cache"
    return TeacherVectors(work, cache, ids(rows), used, content_ids(list(negatives)))


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_row_has_the_vectors_of_its_texts_in_any_order(tmp_path, dtype, chunks):
    rows = [ROWS[i] for i in (11, 3, 3, 0, 8)]  # a part of the pairs, as after filtering
    # Other spellings of a text are one text to the teacher, and two to the token store.
    work = embed(tmp_path / "w", [*ROWS, rows[0]._replace(query=rows[0].query.upper())], dtype)
    teacher = opened(work, rows)
    assert teacher.width == width_of(work) == WIDTH
    order = np.array([4, 0, 1])
    for vectors, prompt, name in (
        (teacher.queries(order), "query", "query"),
        (teacher.documents(order), "document", "document"),
    ):
        expected = StandInTeacher().encode([getattr(rows[i], name) for i in order], prompt)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected, atol={"float32": 0}.get(dtype, 4e-3))


def test_a_second_run_copies_nothing_and_other_vectors_are_another_copy(tmp_path, capsys):
    work = embed(tmp_path / "w")
    first = opened(work).content_hash
    assert "copying" in capsys.readouterr().out
    assert opened(work).content_hash == first
    assert "copying" not in capsys.readouterr().out
    assert opened(embed(tmp_path / "w2", dtype="float16")).content_hash != first


def test_rows_without_vectors_are_named_unless_they_are_not_used(tmp_path):
    work = embed(tmp_path / "w")
    rows = [*ROWS, pair(99), pair(98)]
    with pytest.raises(UserError, match=r"has no vector of 2 of the 14 queries .*row 12 of the"):
        opened(work, rows)
    opened(work, rows, used=np.arange(14) < 12)


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no folder: give the folder OUTPUT.work"):
        opened(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no vectors: give the folder"):
        opened(tmp_path / "empty")
    assert width_of(tmp_path / "empty") == width_of(tmp_path / "missing") == 0
    work = embed(tmp_path / "w", chunks=1)
    index = work / "00000-faq-en" / INDEX
    data = index.read_bytes()
    index.write_bytes(data[:-40])
    with pytest.raises(UserError, match=r"texts\.npz is damaged"):
        opened(work)
    index.unlink()
    with pytest.raises(UserError, match=r"texts\.npz is missing: an earlier version made"):
        opened(work)
    embed(work, chunks=1)  # writes it again, and embeds nothing
    assert index.read_bytes() == data


def test_damage_to_the_copy_is_named(tmp_path):
    work = embed(tmp_path / "w")
    opened(work)
    (copy,) = (tmp_path / "cache").glob("teacher-*")
    data = bytearray((copy / VECTORS).read_bytes())
    data[5] ^= 1
    (copy / VECTORS).write_bytes(data)
    teacher = opened(work)
    teacher.queries(np.arange(1, 3))
    with pytest.raises(UserError, match=r"vectors\.bin is damaged \(vector 0\): delete"):
        teacher.queries(np.arange(3))
    (copy / VECTORS).write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"vectors\.bin is damaged"):
        opened(work)


class Store:
    """What `Teaching` reads of a token store: four pairs with 2, 1, 0 and 1 hard negatives."""

    negatives = (ROWS[5].document, "no text of the teacher", ROWS[6].document, ROWS[1].document)
    negative_starts = np.array([0, 2, 3, 3, 4])
    document_scores = np.array([0.9, 0.8, 0.7, np.nan], np.float32)
    negative_scores = np.array([0.5, np.nan, 0.25, 0.125], np.float32)

    def __len__(self):
        return 4


# Of rows 3, 0 and 1: which of at most two hard negatives there are, and where.
TAKEN = np.array([3, 0, 1]), np.array([[1, 0], [1, 1], [1, 0]], bool), np.array([3, 0, 1, 2])


def test_scores_come_from_the_pairs_or_from_vectors(tmp_path):
    store = Store()
    from_pairs = Teaching(store, None, False, "pairs")
    x = np.nan
    np.testing.assert_array_equal(
        from_pairs.scores(*TAKEN), np.float32([[x, 0.125, x], [0.9, 0.5, x], [0.8, 0.25, x]])
    )
    assert [array.shape for array in from_pairs.vectors(TAKEN[0])] == [(3, 0), (3, 0)]
    teacher = opened(embed(tmp_path / "w"), ROWS[:4], negatives=store.negatives)
    assert teacher.has_negative.tolist() == [True, False, True, True]
    scores_BM = Teaching(store, teacher, True, "teacher").scores(*TAKEN)
    stand_in = StandInTeacher()
    for scores_M, row, others in zip(
        scores_BM, TAKEN[0], ([ROWS[1]], [ROWS[5], None], [ROWS[6]]), strict=True
    ):
        query = stand_in.encode([ROWS[row].query])[0]
        known = [ROWS[row], *others]
        for score, pair_ in zip(scores_M, [*known, None, None], strict=False):
            if pair_ is None:
                assert np.isnan(score)
            else:
                expected = query @ stand_in.encode([pair_.document])[0]
                np.testing.assert_allclose(score, expected, rtol=1e-5, atol=1e-6)
    nothing = Teaching(store, teacher, True, "")
    assert nothing.scores(*TAKEN).shape == (3, 0)
    assert [array.shape for array in nothing.vectors(TAKEN[0])] == [(3, WIDTH), (3, WIDTH)]


def test_rows_with_two_scores_are_known(tmp_path):
    store = Store()
    teacher = opened(embed(tmp_path / "w"), ROWS[:4], negatives=store.negatives)
    for source, most, expected in (
        ("pairs", 2, [True, True, False, False]),
        ("pairs", 0, [False] * 4),
        ("teacher", 1, [True, True, False, True]),
    ):
        found = Teaching(store, teacher, False, source).scored_rows(most)
        assert found.tolist() == expected


def test_vectors_in_the_place_of_others_are_refused(tmp_path):
    (group,) = embed(tmp_path / "w", chunks=1).iterdir()
    ours, theirs = (group / f"{name}.zarr" for name in ("queries", "documents"))
    ours.rename(group / "other")
    theirs.rename(ours)
    (group / "other").rename(theirs)
    with pytest.raises(UserError, match=r"queries\.zarr holds other vectors than texts\.npz"):
        opened(tmp_path / "w")
