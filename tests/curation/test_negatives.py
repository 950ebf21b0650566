"""Hard-negative mining against a NumPy oracle, its folders, and kill and resume."""

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
from helpers.commands import files_of, launch
from helpers.forked import start_forked
from helpers.stand_in_teacher import StandInTeacher
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_embed_jax.curation import negatives
from moe_embed_jax.curation import teacher as teacher_module
from moe_embed_jax.curation.negatives import (
    NegativeMining,
    NegativesRule,
    mine_group,
    score_limit,
)
from moe_embed_jax.curation.pair_texts import Embedding, PairTexts, distinct
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.pairs.normal_form import normal_form
from moe_embed_jax.pairs.row import PairRow
from moe_embed_jax.preparation.pair_writer import PairWriter

# Several spellings of few texts: duplicates, exact and normalised, and queries that are documents.
TEXTS = [*"abcdefgh", "A", " b", "c ", "D"]


class Table:
    """A teacher that looks vectors of small whole numbers up: scores are exact, with many ties."""

    def __init__(self, vector_of: dict[tuple[str | None, str], list[int]]):
        self.vector_of = vector_of

    def encode(self, texts, prompt):
        found = [self.vector_of[prompt, normal_form(text)] for text in texts]
        return np.array(found, np.float32).reshape(-1, 3)

    def identity(self, prompt):
        return {"table": sorted((str(key), value) for key, value in self.vector_of.items())}


def oracle(pairs, vector_of, rule):
    """{query: negatives} by loops, in float64."""
    documents = {}
    for _, document in pairs:
        documents.setdefault(normal_form(document), document)
    found = {}
    for query in {normal_form(query) for query, _ in pairs}:
        score = {
            d: float(np.dot(vector_of["query", query], vector_of["document", d])) for d in documents
        }
        own = {normal_form(d) for q, d in pairs if normal_form(q) == query}
        lowest = min(score[d] for d in own)
        candidates = [
            d for d in sorted(documents, key=lambda d: -score[d]) if d not in own | {query}
        ]
        candidates = candidates[: rule.search][rule.skip :]
        if rule.relative is not None:
            limit = lowest - (1 - rule.relative) * abs(lowest)
            candidates = [d for d in candidates if score[d] < limit]
        if rule.absolute is not None:
            candidates = [d for d in candidates if score[d] < lowest - rule.absolute]
        found[query] = [documents[d] for d in candidates[: rule.count]]
    return found


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_equals_oracle(tmp_path_factory, data):
    text = st.sampled_from(TEXTS)
    pairs = data.draw(st.lists(st.tuples(text, text), min_size=1, max_size=14))
    skip = data.draw(st.integers(0, 3))
    rule = NegativesRule(
        count=data.draw(st.integers(1, 4)),
        relative=data.draw(st.sampled_from([None, 0.5, 0.95, 1.0])),
        absolute=data.draw(st.sampled_from([None, 0.0, 1.0, 2.5])),
        skip=skip,
        search=skip + data.draw(st.integers(1, 6)),
    )
    vector = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
    forms = sorted({normal_form(text) for text in TEXTS})
    vector_of = {(p, form): data.draw(vector) for p in ("query", "document") for form in forms}
    texts = PairTexts(distinct(q for q, _ in pairs), distinct(d for _, d in pairs))
    folder = tmp_path_factory.mktemp("mined")
    mined = mine_group(folder, texts, Embedding(Table(vector_of)), rule)
    expected = oracle(pairs, vector_of, rule)
    for row, query in enumerate(texts.queries.texts):
        chosen = mined.document_QN[row]
        count = int((chosen >= 0).sum())
        assert (chosen[count:] == -1).all() and np.isneginf(mined.score_QN[row, count:]).all()
        found = [texts.documents.texts[i] for i in chosen[:count]]
        assert found == expected[normal_form(query)]
        scores = [
            np.dot(vector_of["query", normal_form(query)], vector_of["document", normal_form(d)])
            for d in found
        ]
        assert mined.score_QN[row, :count].tolist() == scores


def test_a_negative_positive_asks_for_a_lower_score():
    limits = score_limit(NegativesRule(relative=0.95), np.array([0.8, -0.8, 0.0], np.float32))
    np.testing.assert_allclose(limits, [0.76, -0.84, 0.0], rtol=1e-6)
    rule = NegativesRule(relative=0.5, absolute=0.1)
    both = score_limit(rule, np.array([0.8, 0.1], np.float32))
    np.testing.assert_allclose(both, [0.4, 0.0], atol=1e-7)


ROWS = [
    *(PairRow(f"red apple{i}", f"red apple{i} pie", (), "food", "en") for i in range(12)),
    PairRow("red apple0", "apple0 tart", ("old negative",), "food", "en"),
    PairRow("Red  Apple0", "RED apple0 pie", (), "food", "en"),
    PairRow("rouge", "pomme rouge", (), "food", "fr"),
    PairRow("solo", "alone", (), "lonely", "en"),
]


def write_pairs(folder):
    with PairWriter(folder, {"made": "by hand"}) as writer:
        for row in ROWS:
            writer.write(row)
    return PairFolder(folder)


def test_mines_a_folder(tmp_path):
    pairs = write_pairs(tmp_path / "pairs")
    rule = NegativesRule(count=4, relative=0.95)
    curation = NegativeMining(pairs, tmp_path / "work", Embedding(StandInTeacher()), rule)
    report = curation.run(tmp_path / "out")
    output = PairFolder(tmp_path / "out")
    rows = output.read(range(len(output)))
    alone = dict(negatives=(), scores=())
    assert [row._replace(**alone) for row in rows] == [r._replace(**alone) for r in ROWS]
    encode = StandInTeacher().encode
    for row in rows:  # the teacher's scores of the document and of each negative, in their order
        expected = encode([row.document, *row.negatives]) @ encode([row.query])[0]
        np.testing.assert_allclose(row.scores, expected, rtol=1e-5)
    assert output.manifest["format"] == 2
    assert rows[0].negatives == rows[12].negatives == rows[13].negatives
    own = {"red apple0 pie", "apple0 tart"}
    assert not own & {normal_form(text) for text in rows[0].negatives}
    assert len(rows[1].negatives) == 4 and len(set(rows[1].negatives)) == 4
    assert rows[14].negatives == () and rows[15].negatives == ()  # kept, and counted
    assert report.total["queries"] == 14 and report.total["documents"] == 15
    assert report.total["empty"] == 2 and report.total["filled"] + report.total["short"] == 12
    assert report.total["negatives"] == len(rows[0].negatives) + sum(
        len(row.negatives) for row in rows[1:12]
    )
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["about"]["rule"] == {
        "count": 4,
        "relative": 0.95,
        "absolute": None,
        "skip": 0,
        "search": 1000,
    }
    example = stored["groups"][0]["examples"][0]
    assert all(score < 0.95 * example["score"] for _, score in example["others"])
    assert "apple" in (tmp_path / "out" / "report.md").read_text()
    assert curation.kept().all()


def test_parts_and_another_rule(tmp_path, monkeypatch):
    pairs = write_pairs(tmp_path / "pairs")
    run = lambda name, rule, work="work": NegativeMining(  # noqa: E731
        pairs, tmp_path / work, Embedding(StandInTeacher()), rule
    ).run(tmp_path / name)
    monkeypatch.setattr(negatives, "QUERIES_AT_ONCE", 5)
    run("parts", NegativesRule(count=3))
    first, second, _ = sorted((tmp_path / "work").glob("00000-*/negatives-*.npz"))
    first.rename(tmp_path / "first")  # each is whole, and is not what its name says
    second.rename(first)
    (tmp_path / "first").rename(second)
    first.with_name("unit.json").unlink()
    run("swapped", NegativesRule(count=3))
    monkeypatch.undo()
    run("whole", NegativesRule(count=3), "w")
    read = lambda name: PairFolder(tmp_path / name).content_hash  # noqa: E731
    assert read("parts") == read("swapped") == read("whole")
    run("other", NegativesRule(count=1, skip=1))  # with the parts of the first rule beside it
    rows = PairFolder(tmp_path / "whole").read([3]), PairFolder(tmp_path / "other").read([3])
    assert rows[1][0].negatives == rows[0][0].negatives[1:2]


def test_kill_9_and_resume(tmp_path):
    pairs = write_pairs(tmp_path / "pairs")
    process = start_forked([__file__, tmp_path, 0.5])
    for _ in range(1200):
        if list((tmp_path / "work").glob("00000-*/negatives-00000.npz")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    teacher = StandInTeacher()
    NegativeMining(pairs, tmp_path / "work", Embedding(teacher), NegativesRule()).run(
        tmp_path / "out"
    )
    assert teacher.texts <= 4  # the first group's texts were kept
    NegativeMining(pairs, tmp_path / "w", Embedding(teacher), NegativesRule()).run(tmp_path / "b")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "b")


def test_as_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teacher_module.Embedder, "load", lambda name, **_: StandInTeacher())
    write_pairs(tmp_path / "pairs")
    flags = (f"--pairs={tmp_path}/pairs", f"--teacher={tmp_path}", f"--output={tmp_path}/out")
    assert launch(monkeypatch, "mine", *flags, "--count=2", "--relative=none") == 0
    printed = capsys.readouterr().out
    assert "for 14 queries, 2 of them with fewer than 2" in printed
    assert (
        launch(monkeypatch, "mine", *flags, "--count=2", "--relative=none") == 0
    )  # as after a kill at the very end
    assert f"done before: {tmp_path}/out" in capsys.readouterr().out
    (tmp_path / "else").mkdir()
    for more, message in [
        (("--count=1",), "out exists, and is not what this command makes: choose another"),
        ((f"--output={tmp_path}/else",), "else exists: choose another folder"),
        (("--count=0",), "count=0, skip=0, search=1000: expected count > 0"),
        (("--skip=9", "--search=9"), "0 <= skip < search"),
        (("--relative=inf",), "relative=inf must be a number or none"),
        (("--relative=some",), "argument --relative"),
    ]:
        assert launch(monkeypatch, "mine", *flags, *more) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error


if __name__ == "__main__":
    tmp = Path(sys.argv[1])
    slow = Embedding(StandInTeacher(slowness=float(sys.argv[2])))
    NegativeMining(PairFolder(tmp / "pairs"), tmp / "work", slow, NegativesRule()).run(tmp / "out")
