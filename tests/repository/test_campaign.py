"""The campaign: it tells good outcomes from bad ones, and its quick form finds nothing bad."""

import itertools
import json
import random
import re

import numpy as np
import pytest
from campaign import areas, check, damage, outcome

from moe_embed_jax.errors import UserError


def raises(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("action", "is_checked", "kind"),
    [
        (lambda: {"a": np.arange(3)}, True, outcome.SAME),
        (lambda: {"a": np.arange(4)}, True, outcome.LOST),
        (lambda: {"a": np.arange(4)}, False, outcome.ACCEPTED),
        (lambda: {"a": np.arange(3, dtype=np.int8)}, True, outcome.LOST),
        (raises(UserError("file.json: line 3 is no JSON")), True, outcome.REFUSED),
        (raises(UserError("one line", log=["and another"])), True, outcome.TRACE),
        (raises(RecursionError("deep")), False, outcome.TRACE),
        (raises(outcome.Timeout()), False, outcome.HANG),
    ],
)
def test_outcomes(action, is_checked, kind):
    expected = outcome.digest({"a": np.arange(3)})
    assert outcome.judge(action, expected, is_checked).kind == kind


def test_a_difference_is_named():
    assert outcome.difference({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == ""
    said = outcome.difference({"a": "1", "b": "2"}, {"b": "3", ".b.partial": ""})
    assert said == ".b.partial too much, a missing, b differs"


@pytest.mark.parametrize("change", [damage.damage, damage.fuzz])
def test_damage_is_made_of_the_seed_alone(tmp_path, change):
    def damaged(seed: int, number: int):
        folder = tmp_path / str(number) / "input"
        (folder / "inside").mkdir(parents=True)
        (folder / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
        (folder / "inside" / "table.tsv").write_text("a\tb\n1\t2\n")
        (folder / "manifest.json").write_text(json.dumps({"file": "inside/table.tsv", "rows": 2}))
        said = change(random.Random(seed), folder, folder.parent / "outside")
        # A manifest may name the file's new, absolute place.
        found = outcome.files(folder, without=("manifest",))
        return said.replace(str(folder.parent), ""), found

    numbers = itertools.count()
    results = [damaged(seed, next(numbers)) for seed in range(150)]
    assert results == [damaged(seed, next(numbers)) for seed in range(150)]
    assert len({said for said, _ in results}) > 50
    if change is damage.damage:
        assert any("escape: file -> " in said for said, _ in results)


def test_what_others_read_too_stays_where_it_is(tmp_path):
    """A preparation's marker names its input, which is the world's."""
    (folder := tmp_path / "work").mkdir()
    (shared := tmp_path / "rows.jsonl").write_text("{}\n")
    (marker := folder / "marker.json").write_text(json.dumps({"file": str(shared)}))
    said = damage.escape(random.Random(0), marker, folder, tmp_path / "outside")
    assert shared.is_file() and not (tmp_path / "outside").exists() and said


def test_bad_attempts_are_counted_named_and_kept(tmp_path, capsys):
    class Stub:
        scratch = tmp_path / "scratch"

        def attempt(self, area, seed):
            kind = outcome.LOST if seed == 7 else outcome.SAME
            return outcome.Outcome(kind, "progress.json: flip\nanother result")

    Stub.scratch.mkdir()
    (Stub.scratch / "input").write_text("x")
    campaign = check.Campaign(tmp_path / "campaign", 0)
    for seed in (6, 7):
        campaign.run(Stub(), "damage/store", seed)
    campaign.print_table()
    printed = capsys.readouterr().out
    assert "lost: --only=damage/store --seed=7: progress.json: flip | another result" in printed
    assert (
        "damage/store                   2         1         0         0         0         1"
        in printed
    )
    kept = tmp_path / "campaign" / "bad" / "damage-store-7"
    assert (kept / "files" / "input").read_text() == "x"
    assert (kept / "outcome.txt").read_text().startswith("lost\n")


def test_areas_and_flags(capsys):
    assert check.main(["--list", "--only=kill"]) == 0
    assert capsys.readouterr().out.split() == [a for a in areas.AREAS if a.startswith("kill/")]
    assert set(areas.QUICK) <= set(areas.AREAS)
    with pytest.raises(SystemExit):
        check.main(["--only=no/such"])


@pytest.mark.slow
def test_quick_form_finds_nothing_bad(tmp_path, capsys):
    """Half a minute: inputs of every reader, damage to what is written, one kill."""
    status = check.main(["--quick", f"--folder={tmp_path}"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    tried = sum(len(seeds) for seeds in areas.QUICK.values())
    assert re.search(rf"^all +{tried} ", printed, re.MULTILINE), printed
