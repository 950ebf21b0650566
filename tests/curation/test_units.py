"""Filtering and mining by several processes that know nothing of each other: the same bytes."""

import json
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import files_of, launch
from helpers.forked import start_forked
from helpers.stand_in_teacher import StandInTeacher, pair

from moe_embed_jax.curation import teacher as teacher_module
from moe_embed_jax.curation import units
from moe_embed_jax.curation.consistency import ConsistencyFilter, ConsistencyRule
from moe_embed_jax.curation.negatives import NegativeMining, NegativesRule
from moe_embed_jax.curation.pair_texts import Embedding
from moe_embed_jax.errors import UserError
from moe_embed_jax.ownership import own
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.parts import WHOLE, Part
from moe_embed_jax.preparation.pair_writer import PairWriter


@pytest.fixture
def pairs(tmp_path):
    """Three groups of 12, 8 and 4 pairs. Every other two have each other's document; in the last
    group all."""
    with PairWriter(tmp_path / "pairs", {"made": "by hand"}) as writer:
        for source, language, count in (("faq", "de", 12), ("faq", "en", 8), ("web", "en", 4)):
            rows = [pair(i % 7, source, language) for i in range(count)]
            for i in range(0, count, 2 if source == "web" else 4):
                first, second = rows[i : i + 2]
                rows[i] = first._replace(document=second.document)
                rows[i + 1] = second._replace(document=first.document)
            for row in rows:
                writer.write(row)
    return PairFolder(tmp_path / "pairs")


def filtering(pairs, work, teacher=None, **rule):
    rule = ConsistencyRule(**{"k": 1, "chunk": 2, **rule})
    return ConsistencyFilter(pairs, work, Embedding(teacher or StandInTeacher()), rule)


def mining(pairs, work, teacher=None):
    rule = NegativesRule(count=2, search=5)
    return NegativeMining(pairs, work, Embedding(teacher or StandInTeacher()), rule)


def test_four_parts_of_which_two_are_killed_and_one_is_taken_over(tmp_path, pairs):
    def start(part):
        return start_forked([__file__, tmp_path, part])

    def done(part):
        """Units of a part of 4 that have been made."""
        folders = [unit.folder for unit in curation.units if unit.number % 4 == part]
        return [folder for folder in folders if (folder / "unit.json").is_file()]

    teacher = StandInTeacher()
    curation = filtering(pairs, tmp_path / "work", teacher)
    assert len(curation.units) == 12
    parts = [start(f"{i}/4") for i in range(4)]
    alive, deadline = {1, 2}, time.monotonic() + 100
    while alive:
        assert time.monotonic() < deadline
        for part in [part for part in alive if done(part)]:
            parts[part].kill()
            alive.remove(part)
        time.sleep(0.02)
    assert [process.wait(100) for process in parts] == [0, -9, -9, 0]
    assert parts[3].communicate()[0] == f"part 3/4: 3 of 12 units are done, in {tmp_path}/work\n"
    assert [len(done(part)) == 3 for part in range(4)] == [True, False, False, True]

    assert start("1/4").wait(100) == 0  # takes over what the dead process owned
    missing = [n for n in (2, 6, 10) if curation.units[n].folder not in done(2)]
    with pytest.raises(UserError) as caught:
        curation.run(tmp_path / "out", finish=True)
    numbers = ", ".join(map(str, missing))
    assert f"work: {len(missing)} of 12 units are not done (numbers {numbers})" in str(caught.value)
    assert not (tmp_path / "out").exists() and teacher.texts == 0

    assert curation.make(Part(0, 2)) == 6  # other parts do it as well
    embedded = teacher.texts
    assert 0 < embedded < 20
    curation.run(tmp_path / "out", finish=True)
    assert teacher.texts == embedded
    whole = filtering(pairs, tmp_path / "other")
    whole.run(tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    expected = ([False] * 2 + [True] * 2) * 5 + [False] * 4
    assert curation.kept().tolist() == whole.kept().tolist() == expected
    groups = PairFolder(tmp_path / "out").groups
    assert groups == {("faq", "de"): (0, 6), ("faq", "en"): (6, 10)}  # the last one is gone


@pytest.mark.parametrize(("make", "count"), [(filtering, 3), (filtering, 16), (mining, 2)])
def test_any_number_of_parts_gives_the_same_bytes(tmp_path, pairs, monkeypatch, make, count):
    monkeypatch.setattr(units, "ROWS_PER_SHARD", 5)
    make(pairs, tmp_path / "w").run(tmp_path / "whole")
    for index in reversed(range(count)):
        assert make(pairs, tmp_path / "work").run(tmp_path / "out", Part(index, count)) is None
    assert not (tmp_path / "out").exists()
    report = make(pairs, tmp_path / "work").run(tmp_path / "out", finish=True)
    assert report.total["pairs"] == 24
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    output = PairFolder(tmp_path / "out")
    output.verify()
    assert len(output.manifest["shards"]) > len(output.groups)
    assert output.lengths()[:, 0].sum() == sum(
        group["query_characters"] for group in output.manifest["groups"]
    )


def test_units_of_another_rule_are_made_again(tmp_path, pairs):
    filtering(pairs, tmp_path / "work").run(tmp_path / "first")
    other = filtering(pairs, tmp_path / "work", k=2)
    with pytest.raises(UserError, match="12 of 12 units are not done"):
        other.run(tmp_path / "second", finish=True)
    other.run(tmp_path / "second")
    filtering(pairs, tmp_path / "w", k=2).run(tmp_path / "whole")
    assert files_of(tmp_path / "second") == files_of(tmp_path / "whole")


def test_a_kill_between_shards_and_their_record(tmp_path, pairs, monkeypatch):
    """The shards of another rule are never taken for those that the record describes."""
    filtering(pairs, tmp_path / "work").run(tmp_path / "first")
    monkeypatch.setattr(units, "save_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        filtering(pairs, tmp_path / "work", margin=2.1).make(WHOLE)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"1 of 12 units are not done \(numbers 0\)"):
        filtering(pairs, tmp_path / "work").run(tmp_path / "again", finish=True)


def test_damage_is_named(tmp_path, pairs, capsys):
    curation = mining(pairs, tmp_path / "work")
    curation.make(WHOLE)
    folder = curation.units[1].folder
    (folder / "lengths-00000").write_bytes(b"short")
    with pytest.raises(
        UserError, match=r"lengths-00000 is missing or damaged: delete .*unit\.json"
    ):
        curation.run(tmp_path / "out")
    record = json.loads((folder / "unit.json").read_text())
    record["shards"][0]["rows"] += 1
    (folder / "unit.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"1 of 3 units are not done \(numbers 1\)"):
        curation.run(tmp_path / "out", finish=True)
    assert f"{folder}/unit.json is damaged: made again" in capsys.readouterr().err
    curation.run(tmp_path / "out")
    PairFolder(tmp_path / "out").verify()
    (tmp_path / "out" / "features.json").unlink()
    with pytest.raises(UserError, match=r"features\.json: damaged \(it is missing\)"):
        curation.run(tmp_path / "out")


def test_a_unit_has_one_owner(tmp_path, pairs):
    curation = filtering(pairs, tmp_path / "work")
    with own(curation.units[5].folder, inside=True):
        with pytest.raises(UserError, match="chunk-00005 is in use by process"):
            curation.make(Part(1, 4))
        curation.make(Part(0, 4))


@pytest.mark.parametrize("name", ["filter", "mine"])
def test_as_commands(tmp_path, pairs, monkeypatch, capsys, name):
    monkeypatch.setattr(teacher_module.Embedder, "load", lambda name, **_: StandInTeacher())

    def run(output, *flags):
        where = (f"--pairs={tmp_path}/pairs", f"--teacher={tmp_path}", f"--output={output}")
        return launch(monkeypatch, name, *where, *flags)

    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "out", "--part=0/2") == 0
    assert "part 0/2: 2 of 3 units are done" in capsys.readouterr().out
    assert run(tmp_path / "out", "--finish") == 2
    assert "1 of 3 units are not done (numbers 1)" in capsys.readouterr().err
    assert run(tmp_path / "out", "--part=1/2") == run(tmp_path / "out", "--finish") == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert run(tmp_path / "out", "--part=1/2") == 0
    assert f"done before: {tmp_path}/out" in capsys.readouterr().out
    for path in sorted((tmp_path / "out").glob("*-00000-of-*")):  # records, lengths
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert run(tmp_path / "out", "--finish") == 2
        assert f"{path}: damaged (" in capsys.readouterr().err
        path.write_bytes(content)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    slow = StandInTeacher(slowness=0.4)
    filtering(PairFolder(folder / "pairs"), folder / "work", slow).run(
        folder / "out", Part.parse(sys.argv[2])
    )
