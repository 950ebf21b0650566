"""The chain of launch/recipe.py where its work directory is in a bucket."""

import io
import sys

import pytest
from rich.console import Console

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.recipe import records, run, steps
from moe_embed_jax.recipe.view import View

# A step: writes its output, or fails.
SCRIPT = """
import sys
from moe_embed_jax import storage
print("working on", sys.argv[1])
if {fails}:
    sys.exit("error: no more paper")
storage.write(storage.path(sys.argv[1]) / "done", "")
"""


def chain(workdir, fails: bool) -> list[steps.Step]:
    made = []
    for name, needs in (("a", ()), ("b", ("a",))):
        script = SCRIPT.format(fails=fails and name == "b")
        argv = (sys.executable, "-c", script, str(workdir / name))
        command = steps.Command(argv, workdir / name / "done")
        made.append(steps.Step(name, workdir / name, (command,), needs, {"rule": 1}))
    return made


def run_chain(workdir, fails: bool = False) -> list[list[str]]:
    """[step, state] of every line that was shown."""
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    run.run_steps(chain(workdir, fails), workdir, View(["a", "b"], console))
    return [line.split()[:2] for line in console.file.getvalue().splitlines()]


def test_records_and_logs_are_in_the_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "one"))
    with pytest.raises(UserError, match=r"(?s)step b failed \(exit status 1\).*no more paper"):
        run_chain(bucket, fails=True)
    log = bucket / "logs" / "b.log"
    before = log.read_text()
    assert before.endswith(f"working on {bucket}/b\nerror: no more paper\n")
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "two"))  # as if on another machine
    assert run_chain(bucket) == [["a", "done"], ["b", "running"], ["b", "done"]]
    after = log.read_text()
    assert after.startswith(before) and after.endswith(f"working on {bucket}/b\n")
    recipe = records.Records(bucket)
    assert recipe.read("b")["after"] == {"a": recipe.read("a")["id"]}
    assert run_chain(bucket) == [["a", "done"], ["b", "done"]]
    assert sorted(path.name for path in bucket.iterdir()) == ["a", "b", "logs", "recipe"]


def test_one_recipe_at_a_time(bucket, tmp_path, monkeypatch):
    with records.lock(bucket):
        with pytest.raises(UserError, match="another process works in"):
            records.lock(bucket, longest_wait=0.1).__enter__()
        monkeypatch.setenv(storage.CACHE, str(tmp_path))  # as if on another machine
        with pytest.raises(UserError, match=f"{bucket} is in use by process"):
            records.lock(bucket).__enter__()
