"""Consistency filtering against a NumPy oracle, its folders, and kill and resume."""

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import files_of, launch
from helpers.forked import start_forked
from helpers.stand_in_teacher import StandInTeacher, pair
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_embed_jax.curation import teacher as teacher_module
from moe_embed_jax.curation.consistency import (
    ConsistencyFilter,
    ConsistencyRule,
    chunks,
    find_neighbours,
)
from moe_embed_jax.curation.pair_texts import Embedding, distinct, pair_scores
from moe_embed_jax.errors import UserError
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.pairs.normal_form import normal_form
from moe_embed_jax.preparation.pair_writer import PairWriter

whole = st.integers(-2, 2)


def small_arrays(rows):
    return st.lists(st.lists(whole, min_size=3, max_size=3), min_size=1, max_size=rows).map(
        lambda values: np.array(values, np.float32)
    )


@settings(max_examples=60, deadline=None)
@given(small_arrays(5), small_arrays(9), st.data())
def test_keeps_what_a_loop_over_all_scores_keeps(query_ND, document_ND, data):
    count = data.draw(st.integers(1, 8))
    k, margin = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([-2.0, -1.0, 0.0, 1.0]))
    query_row = data.draw(
        st.lists(st.integers(0, len(query_ND) - 1), min_size=count, max_size=count)
    )
    document_row = data.draw(
        st.lists(st.integers(0, len(document_ND) - 1), min_size=count, max_size=count)
    )
    found = find_neighbours(query_ND, document_ND, np.array(query_row), np.array(document_row), k)
    for p, (query, own) in enumerate(zip(query_row, document_row, strict=True)):
        score_N = query_ND[query] @ document_ND.T
        above = [n for n in range(len(score_N)) if n != own and score_N[n] > score_N[own] + margin]
        assert found.kept(margin)[p] == (len(above) < k)
        assert found.own_P[p] == score_N[own]
        others = sorted((-s, n) for n, s in enumerate(score_N) if n != own)[:k]
        assert [n for _, n in others] == [n for n in found.other_row_Pk[p] if n >= 0]


def test_a_twin_of_the_own_document_does_not_beat_it():
    """Sums of real numbers depend on their order: both scores must be those of the search."""
    rng = np.random.default_rng(0)
    query_ND = rng.normal(size=(64, 96)).astype(np.float32)
    near_ND = query_ND + 0.1 * rng.normal(size=query_ND.shape).astype(np.float32)
    document_ND = np.concatenate([near_ND, near_ND])  # each has a twin in another row
    rows = np.arange(64)
    found = find_neighbours(query_ND, document_ND, rows, rows, 1)
    np.testing.assert_array_equal(found.other_row_Pk[:, 0], rows + 64)
    np.testing.assert_array_equal(found.other_Pk[:, 0], found.own_P)
    assert found.kept(0.0).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 50), st.integers(1, 60), st.integers(1, 20))
def test_chunks_cover_a_group_evenly(start, length, most):
    ranges = chunks(start, start + length, most)
    assert [i for first, last in ranges for i in range(first, last)] == [
        *range(start, start + length)
    ]
    sizes = [last - first for first, last in ranges]
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1 and len(ranges) == -(-length // most)


def test_duplicates_are_one_document():
    assert normal_form(" Ｆｏｏ\tBAR\n") == normal_form("foo bar") != normal_form("foobar")
    found = distinct(["A b", "c", "a  B", "d", "C"])
    assert found.texts == ["A b", "c", "d"] and found.row.tolist() == [0, 1, 0, 2, 1]


def test_pair_scores_reads_documents_in_slices(monkeypatch):
    monkeypatch.setattr("moe_embed_jax.curation.pair_texts.SCORED_AT_ONCE", 7)
    monkeypatch.setattr("moe_embed_jax.curation.pair_texts.READ_AT_ONCE", 3)
    rng = np.random.default_rng(0)
    query_ND, document_ND = rng.normal(size=(2, 20, 4)).astype(np.float32)
    query_row, document_row = rng.integers(0, 20, (2, 50))
    expected = (query_ND[query_row] * document_ND[document_row]).sum(1)
    found = pair_scores(query_ND, document_ND, query_row, document_row)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


WRONG = {3, 11, 12, 31}


def write_pairs(folder):
    """Two near misses for every wrong pair, so that two documents rank above its own."""
    rows = []
    for i in range(40):
        rows.append(pair(i, language="en" if i < 30 else "de", wrong=i in WRONG))
        if i in WRONG:
            rows += [
                pair(i, language=rows[-1].language)._replace(query=f"q{i}", document=text)
                for text in (f"topic{i}a topic{i}b q{i}", f"topic{i}a topic{i}c q{i} more")
            ]
    rows += [pair(i, source="tiny") for i in range(2)]
    with PairWriter(folder, {"made": "by hand"}, 8) as writer:
        for row in rows:
            writer.write(row)
    return PairFolder(folder)


def is_wrong(row):
    return row.document.startswith("unrelated")


def test_filters_a_folder(tmp_path):
    pairs = write_pairs(tmp_path / "pairs")
    teacher = StandInTeacher()
    curation = ConsistencyFilter(pairs, tmp_path / "work", Embedding(teacher), ConsistencyRule())
    report, keep = curation.run(tmp_path / "out"), curation.kept()
    rows = pairs.read(range(len(pairs)))
    assert [row for row, kept in zip(rows, keep, strict=True) if not kept] == [
        row for row in rows if is_wrong(row)
    ]
    output = PairFolder(tmp_path / "out")
    assert output.read(range(len(output))) == [row for row in rows if not is_wrong(row)]
    assert output.manifest["about"]["filter"]["rule"] == {"k": 2, "chunk": 1_000_000, "margin": 0.0}
    assert output.manifest["about"]["from"] == {"made": "by hand"}

    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["total"] == {"pairs": 50, "kept": 46, "dropped": 4} == report.total
    by_group = {(g["source"], g["language"]): g for g in stored["groups"]}
    assert by_group["faq", "en"]["dropped"] == 3 and by_group["faq", "de"]["dropped"] == 1
    example = by_group["faq", "de"]["examples"][0]
    assert example["document"].startswith("unrelated31") and len(example["others"]) == 2
    assert all(score > example["score"] for _, score in example["others"])
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| faq | en | 36 | 33 | 3 | 91.7 |" in markdown and "unrelated31" in markdown

    # Another rule costs no embedding.
    before = teacher.texts
    rule = ConsistencyRule(margin=2.1)
    curation = ConsistencyFilter(pairs, tmp_path / "work", Embedding(teacher), rule)
    curation.run(tmp_path / "all")
    assert curation.kept().all() and teacher.texts == before


def test_another_k_in_one_work_folder_is_as_in_a_fresh_one(tmp_path):
    """Stored neighbours of one k are not those of another."""
    pairs, teacher = write_pairs(tmp_path / "pairs"), StandInTeacher()

    def keep(work, embedded_by, rule):
        curation = ConsistencyFilter(pairs, tmp_path / work, Embedding(embedded_by), rule)
        curation.run(tmp_path / f"{work}{rule.k}")
        return curation.kept()

    assert keep("work", teacher, ConsistencyRule(k=2)).sum() == 46
    texts = teacher.texts
    again = keep("work", teacher, ConsistencyRule(k=5))
    assert teacher.texts == texts  # nothing was embedded again
    np.testing.assert_array_equal(again, keep("fresh", StandInTeacher(), ConsistencyRule(k=5)))
    assert again.sum() > 46


def test_a_group_may_vanish_and_chunks_do_not_see_each_other(tmp_path):
    pairs = write_pairs(tmp_path / "pairs")

    def run(name, rule):
        curation = ConsistencyFilter(
            pairs, tmp_path / f"{name}.work", Embedding(StandInTeacher()), rule
        )
        return curation.run(tmp_path / name).total

    # Nothing competes with the only document of a chunk.
    assert run("o", ConsistencyRule(chunk=1))["kept"] == len(pairs)
    with pytest.raises(UserError, match="nothing is left"):
        run("p", ConsistencyRule(1, 99, -3.0))
    assert not (tmp_path / "p").exists()


def test_another_teacher_is_an_error(tmp_path):
    pairs = write_pairs(tmp_path / "pairs")
    run = lambda out, embedding: ConsistencyFilter(  # noqa: E731
        pairs, tmp_path / "work", embedding, ConsistencyRule()
    ).run(tmp_path / out)
    run("a", Embedding(StandInTeacher()))
    with pytest.raises(UserError, match=r"encoder\.hash: stand-in -> other"):
        run("b", Embedding(StandInTeacher("other")))
    with pytest.raises(UserError, match=r"encoder\.prefix: query -> None"):
        run("b", Embedding(StandInTeacher(), query_prompt=None))
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="b exists, and is not what this command makes"):
        run("b", Embedding(StandInTeacher()))


def test_kill_9_and_resume(tmp_path):
    pairs = write_pairs(tmp_path / "pairs")
    process = start_forked([__file__, tmp_path, 0.3])
    work = tmp_path / "work"
    for _ in range(1200):
        if list(work.glob("*/chunk-00001/neighbours.npz")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    before = {p: p.stat().st_mtime_ns for p in work.glob("*/*/neighbours.npz")}
    assert before and len(before) < 5
    teacher, rule = StandInTeacher(), ConsistencyRule(chunk=20)
    ConsistencyFilter(pairs, work, Embedding(teacher), rule).run(tmp_path / "out")
    assert 0 < teacher.texts < 100
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    ConsistencyFilter(pairs, tmp_path / "w", Embedding(teacher), rule).run(tmp_path / "b")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "b")


def test_as_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teacher_module.Embedder, "load", lambda name, **_: StandInTeacher())
    write_pairs(tmp_path / "pairs")
    flags = (f"--pairs={tmp_path}/pairs", f"--teacher={tmp_path}", f"--output={tmp_path}/out")
    assert launch(monkeypatch, "filter", *flags, "--dtype=float16") == 0
    printed = capsys.readouterr().out
    assert "| all |  | 50 | 46 | 4 | 92.0 |" in printed and "46 of 50 pairs" in printed
    assert (tmp_path / "out.work").is_dir()
    assert (
        launch(monkeypatch, "filter", *flags, "--dtype=float16") == 0
    )  # as after a kill at the very end
    assert f"done before: {tmp_path}/out" in capsys.readouterr().out
    (tmp_path / "else").mkdir()
    for more, message in [
        (("--k=1",), "out exists, and is not what this command makes: choose another"),
        ((f"--output={tmp_path}/else",), "else exists: choose another folder"),
        (("--k=0",), "k=0 and chunk=1000000 must be at least 1"),
        (("--margin=nan",), "margin=nan must be a number"),
        (("--pairs=nothing",), "nothing"),
        (("--pair=x",), "unrecognized arguments: --pair=x"),
    ]:
        assert launch(monkeypatch, "filter", *flags, *more) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error


if __name__ == "__main__":
    tmp = Path(sys.argv[1])
    slow = Embedding(StandInTeacher(slowness=float(sys.argv[2])))
    curation = ConsistencyFilter(
        PairFolder(tmp / "pairs"), tmp / "work", slow, ConsistencyRule(chunk=20)
    )
    curation.run(tmp / "out")
