"""The mutation check: its faults fit the code as it stands, and its runner tells what happened."""

import pathlib
import subprocess

from conftest import ROOT
from mutations import check
from mutations.fault import Fault, problems

NAMES = {
    *("routing", "losses", "models", "training", "data", "curation"),
    *("search", "evaluation", "interop", "planning", "embedder"),
}


def test_every_fault_fits_the_code_as_it_stands():
    """Its place is there once, its name is its own, and its tests exist."""
    assert problems(ROOT, check.AREAS) == []


def test_there_are_faults_in_every_area():
    assert check.AREAS.keys() == NAMES
    counted = [f for faults in check.AREAS.values() for f in faults if not f.equivalent]
    assert len(counted) >= 120 and all(check.AREAS.values())


def test_a_fault_without_its_place_is_named():
    fault = Fault("gone", "errors.py", "no such text", "", "test_no_such_file.py -k a")
    same = Fault("gone", "errors.py", "class UserError", "class UserError", "-k a")
    moved = Fault("moved", "errors.py", "class UserError", "class A", "test_config.py -k no_such")
    broken = Fault("broken", "errors.py", "class UserError", "class (", "test_config.py")
    *found, last = problems(ROOT, {"area": (fault, same, moved, broken)})
    where = "area: gone: moe_embed_jax/errors.py: "
    assert found == [
        f"{where}tests/test_no_such_file.py does not exist",
        f"{where}the old text stands 0 times in it, not once: 'no such text'",
        f"{where}another fault has this name",
        f"{where}no test file is named: '-k a'",
        f"{where}the new text is the old one: 'class UserError'",
        "area: moved: moe_embed_jax/errors.py: no test is called no_such: "
        "'test_config.py -k no_such'",
    ]
    assert last.startswith("area: broken: moe_embed_jax/errors.py: the result is not Python: ")


def write_repository(root: pathlib.Path) -> None:
    """One module with one test, whose `minimum` nobody tests."""
    files = {
        "moe_embed_jax/__init__.py": "",
        "moe_embed_jax/two.py": "maximum = max\n\n\ndef minimum(a, b):\n    return min(a, b)\n",
        "tests/test_two.py": "from moe_embed_jax.two import maximum\n\n\n"
        "def test_maximum():\n    assert maximum(1, 2) == 2\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *command], cwd=root, check=True)


def test_the_runner_tells_noticed_from_survived_and_broken(tmp_path, capsys):
    """Both edits keep the size of the file: bytecode of the one must not serve the other."""
    write_repository(tmp_path)
    tests = "test_two.py -k maximum"
    faults = (
        Fault("noticed-one", "two.py", "maximum = max", "maximum = min", tests),
        Fault("surviving-one", "two.py", "return min", "return max", tests),
        Fault("same-for-all", "two.py", "(a, b):", "(b, a):", tests, equivalent="it is symmetric"),
    )
    assert check.main(["--jobs=1"], tmp_path, {"numbers": faults}) == 1
    printed = capsys.readouterr().out
    assert "noticed   numbers: noticed-one" in printed
    assert "test_two.py::test_maximum - assert 1 == 2" in printed
    assert "survived: numbers: surviving-one (moe_embed_jax/two.py): test_two.py" in printed
    assert "noticed: 1 of 2 (50.0%)" in printed
    assert "not counted: same-for-all (moe_embed_jax/two.py): it is symmetric" in printed
    assert "maximum = max\n" in (tmp_path / "moe_embed_jax/two.py").read_text()

    nothing = Fault("no-test", "two.py", "return min", "return max", "test_two.py -k 1-2")
    assert check.main(["--jobs=1"], tmp_path, {"numbers": (nothing,)}) == 2
    assert "broken: numbers: no-test" in (printed := capsys.readouterr().out)
    assert "no test is selected" in printed
