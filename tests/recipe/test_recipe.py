"""The chain of launch/recipe.py: what it skips, refuses, passes on; and all of it, once, small."""

import dataclasses
import io
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from helpers import synthetic_data
from helpers.forked import Forked, run_forked, start_forked
from rich.console import Console

from moe_embed_jax.embedder import Embedder
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.beir import find_files
from moe_embed_jax.evaluation.heldout_documents import geometric_mean
from moe_embed_jax.recipe import inputs, records, run, steps
from moe_embed_jax.recipe.view import View

# A step: counts its starts, then writes its output, or does what the test wants.
SCRIPT = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
with (folder / "starts").open("a") as file:
    file.write("x")
print("working on", folder.name)
{more}
(folder / "done").write_text("")
"""
# Goes on for a while, and saves when it is told to stop.
SLOW = """
import signal, time
def stop(*_):
    (folder / "saved").write_text("")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
if not (folder / "saved").exists():
    (folder / "ready").write_text("")
    time.sleep(60)
"""


def stand_in(workdir, name, needs=(), more="", **arguments) -> steps.Step:
    folder = workdir / name
    argv = (sys.executable, "-c", SCRIPT.format(more=more), str(folder))
    command = steps.Command(argv, folder / "done")
    return steps.Step(name, folder, (command,), tuple(needs), {"of": {"rule": 1, **arguments}})


def chain(workdir, **changes) -> list[steps.Step]:
    """a -> b -> c, d from a; `changes`: keyword arguments of `stand_in` by step."""
    needs = {"a": (), "b": ("a",), "c": ("b",), "d": ("a",)}
    return [stand_in(workdir, n, of, **changes.get(n, {})) for n, of in needs.items()]


def run_chain(chain_, workdir) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    run.run_steps(chain_, workdir, View([step.name for step in chain_], console))
    return console.file.getvalue()


def starts(workdir) -> dict[str, int]:
    return {path.parent.name: len(path.read_text()) for path in workdir.glob("*/starts")}


def test_runs_each_step_once(tmp_path):
    said = run_chain(chain(tmp_path), tmp_path)
    assert starts(tmp_path) == {"a": 1, "b": 1, "c": 1, "d": 1}
    log = (tmp_path / "logs/c.log").read_text()
    assert log.startswith(f"$ {sys.executable} -c ") and "working on c" in log
    assert run.last_lines(tmp_path / "logs/c.log", 1) == ["working on c"]
    assert [line.split()[:2] for line in said.splitlines() if " done " in line] == [
        [name, "done"] for name in "abcd"
    ]
    before = {name: (tmp_path / f"recipe/{name}.json").read_text() for name in "abcd"}
    assert "done before" in run_chain(chain(tmp_path), tmp_path)
    assert set(starts(tmp_path).values()) == {1}
    assert {n: (tmp_path / f"recipe/{n}.json").read_text() for n in "abcd"} == before


def test_the_last_lines_of_a_log_say_something(tmp_path):
    log = tmp_path / "x.log"
    text = "$ command\nfirst\n│ 0.5 │\n└──────┘\n  1%\r  2%\r\n\n"
    log.write_text(text)
    assert run.last_lines(log, 9) == ["first", "│ 0.5 │", "1%", "2%"]
    assert run.last_lines(log, 2) == ["1%", "2%"]
    assert run.last_lines(log, 9, start=len(text.encode()) - 5) == ["2%"]


def test_a_missing_output_is_made_again(tmp_path):
    run_chain(chain(tmp_path), tmp_path)
    (tmp_path / "c" / "done").unlink()
    run_chain(chain(tmp_path), tmp_path)
    assert starts(tmp_path) == {"a": 1, "b": 1, "c": 2, "d": 1}


def test_another_setting_of_a_finished_step_is_refused(tmp_path):
    run_chain(chain(tmp_path), tmp_path)
    changed = chain(tmp_path, b={"rule": 2})
    with pytest.raises(UserError) as error:
        run_chain(changed, tmp_path)
    message = str(error.value)
    assert "step b was made with other settings (of.rule: 1 -> 2)" in message
    assert f"delete {tmp_path}/b {tmp_path}/c" in message and f"{tmp_path}/d" not in message
    assert set(starts(tmp_path).values()) == {1}
    for name in "bc":
        shutil.rmtree(tmp_path / name)
    run_chain(changed, tmp_path)  # as the message says
    assert starts(tmp_path) == {"a": 1, "b": 1, "c": 1, "d": 1}
    run_chain(changed, tmp_path)


def test_inputs_are_looked_for_before_the_first_step(tmp_path):
    """But not those of a step that is done."""
    given = inputs.Input("evaluate.beir", f"{tmp_path}/no", find_files)
    chain_ = chain(tmp_path)
    chain_[-1] = dataclasses.replace(chain_[-1], inputs=(given,))
    with pytest.raises(UserError, match=f"evaluate.beir={tmp_path}/no: .*no such folder"):
        run_chain(chain_, tmp_path)
    assert starts(tmp_path) == {}
    run_chain(chain(tmp_path), tmp_path)
    run_chain(chain_, tmp_path)
    assert starts(tmp_path) == dict.fromkeys("abcd", 1)


def test_a_step_made_from_another_one_is_refused(tmp_path):
    run_chain(chain(tmp_path), tmp_path)
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(UserError, match=r"step c was made from another b .* delete \S+/c$"):
        run_chain(chain(tmp_path), tmp_path)


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="a is there, and no record of this recipe"):
        run_chain(chain(tmp_path), tmp_path)


def test_a_failing_step_is_named_with_its_log(tmp_path):
    failing = chain(tmp_path, b={"more": "print('note'); sys.exit('error: no more paper')"})
    with pytest.raises(UserError) as error:
        run_chain(failing, tmp_path)
    message = str(error.value)
    assert "step b failed (exit status 1)" in message and f"{tmp_path}/logs/b.log" in message
    assert message.endswith("note\n  error: no more paper")
    assert "c" not in starts(tmp_path)
    run_chain(chain(tmp_path), tmp_path)
    assert starts(tmp_path) == {"a": 1, "b": 2, "c": 1, "d": 1}


def test_a_record_that_was_changed_is_named(tmp_path):
    run_chain(chain(tmp_path), tmp_path)
    path = tmp_path / "recipe/b.json"
    whole = json.loads(path.read_text())
    changes = [dict(after=[]), dict(seconds="1"), dict(arguments={}), dict(id=3), dict(crc32=0)]
    damaged = [whole | change for change in changes]
    damaged += [{k: v for k, v in whole.items() if k != key} for key in whole if key != "crc32"]
    for content in damaged:
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"b\.json is damaged .*remove it and"):
            run_chain(chain(tmp_path), tmp_path)
    assert set(starts(tmp_path).values()) == {1}


def test_a_step_that_ends_without_its_output_is_not_done(tmp_path):
    with pytest.raises(UserError, match=r"step b ended before it was finished .*b.log"):
        run_chain(chain(tmp_path, b={"more": "sys.exit(0)"}), tmp_path)


def test_the_time_of_a_step_that_was_begun_before_counts(tmp_path):
    slow_failure = chain(tmp_path, a={"more": "import time; time.sleep(0.6); sys.exit(1)"})
    for _ in range(2):
        with pytest.raises(UserError):
            run_chain(slow_failure, tmp_path)
        shutil.rmtree(tmp_path / "a")  # a step whose folder appears whole has none yet
    identity = records.Records(tmp_path).read("a")["id"]
    run_chain(chain(tmp_path), tmp_path)
    record = records.Records(tmp_path).read("a")
    assert record["finished"] and record["id"] == identity and record["seconds"] >= 1.2
    for name in "abcd":
        shutil.rmtree(tmp_path / name)
    run_chain(chain(tmp_path), tmp_path)
    assert records.Records(tmp_path).read("a")["id"] != identity  # made anew


def test_a_terminal_gets_a_table():
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    with View(["a", "b"], console) as view:
        view.update("a", "done", 75.0, "all of it")
        view.update("b", "running", 3.2, "a line that is longer than the terminal is wide")
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    words = [line.split() for line in lines]
    assert ["a", "done", "1:15", "min", "all", "of", "it"] in words
    running = next(line for line in lines if line.startswith("b "))
    assert running.split()[1:6] == ["running", "3", "s", "a", "line"] and running.endswith("…")


def test_only_what_is_left_of_a_step_is_run(tmp_path):
    (step,) = [stand_in(tmp_path, "a")]
    other = steps.Command((sys.executable, "-c", "import sys; sys.exit(3)"), tmp_path / "a/other")
    step = dataclasses.replace(step, commands=(*step.commands, other))
    for _ in range(2):
        with pytest.raises(UserError, match="exit status 3"):
            run_chain([step], tmp_path)
    assert starts(tmp_path) == {"a": 1}


# ---- Signals: the recipe as a process of its own -------------------------------------------------


def start_chain(tmp_path) -> Forked:
    code = (
        f"import pathlib, sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        "import test_recipe as t\n"
        "from moe_embed_jax import launching\n"
        "from moe_embed_jax.recipe.run import Stopped\n"
        f"d = pathlib.Path({str(tmp_path)!r})\n"
        "def main():\n"
        "    try: t.run_chain(t.chain(d, b={'more': t.SLOW}), d)\n"
        "    except Stopped as stopped: print('stopped in', stopped)\n"
        "raise SystemExit(launching.run(main))\n"
    )
    return start_forked(["-c", code], stderr=subprocess.STDOUT)


def wait_for(path, seconds=60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        (signal.SIGTERM, 0, "stopped in b"),
        (signal.SIGINT, 130, "interrupted: in step b: the same command continues there"),
    ],
)
def test_a_signal_reaches_the_step_which_saves(tmp_path, number, status, line):
    process = start_chain(tmp_path)
    wait_for(tmp_path / "b/ready")
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status and out.splitlines() == [line]
    assert (tmp_path / "b/saved").exists() and "c" not in starts(tmp_path)
    run_chain(chain(tmp_path), tmp_path)
    assert starts(tmp_path) == {"a": 1, "b": 2, "c": 1, "d": 1}


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process of its parent's end"
)
def test_a_killed_recipe_takes_its_step_along_and_continues(tmp_path):
    process = start_chain(tmp_path)
    wait_for(tmp_path / "b/ready")
    process.kill()
    process.communicate(timeout=60)
    run_chain(chain(tmp_path), tmp_path)  # waits for the step, if it still saves
    assert (tmp_path / "b/saved").exists()
    assert starts(tmp_path) == {"a": 1, "b": 2, "c": 1, "d": 1}


def test_two_recipes_do_not_work_in_one_place(tmp_path):
    said = []
    with (
        records.lock(tmp_path),
        pytest.raises(UserError, match="another process works in"),
        records.lock(tmp_path, say=said.append, longest_wait=0.3),
    ):
        pass
    assert said == [f"waiting for another process that works in {tmp_path}"]
    with records.lock(tmp_path):
        pass


# ---- All of it -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(data_dir, tmp_path_factory):
    """run() -> the finished process of the modern chain on synthetic pairs; its work directory. The
    paper's has the same steps but two."""
    folder = tmp_path_factory.mktemp("recipe")
    sources = []
    for task in ("translations", "descriptions"):
        for language in synthetic_data.LANGUAGES[:2]:
            path = folder / f"{task}-{language}.jsonl"
            pairs = synthetic_data.pairs(task, language, 60, seed=1)
            lines = [json.dumps({"query": q, "document": d}) for q, d in pairs]
            path.write_text("\n".join(lines) + "\n")
        path = {name: str(folder / f"{task}-{name}.jsonl") for name in synthetic_data.LANGUAGES[:2]}
        sources.append({"name": task, "format": "pairs", "path": path})
    (folder / "sources.json").write_text(json.dumps(sources))
    flags = [
        f"--config={ROOT}/configs/recipe.py:modern_smoke",
        f"--workdir={folder / 'run'}",
        f"--config.data_dir={data_dir}",
        "--config.prepare.mixture=''",
        f"--config.prepare.sources={folder / 'sources.json'}",
        "--config.stage1.set.data.vocabulary.size=512",
        "--config.stage1.set.model.vocab_size=512",
        "--config.stage2.set.data.query_length=16",
        "--config.stage2.set.data.document_length=24",
        # Chunks and several row counts have tests of their own, and take their time to compile.
        "--config.stage2.set.data.chunk_rows=0",
        "--config.stage2.set.model.remat_rows=0",
        "--config.stage3.set.model.remat_rows=0",
        "--config.stage4.set.model.remat_rows=0",
        "--config.stage3.set.data.row_buckets=1",
        "--config.stage4.set.data.row_buckets=1",
    ]
    arguments = [str(ROOT / "launch/recipe.py"), *flags]
    # A chain of 15 processes: 600 s are too few where others share the processors.
    return (lambda *more: run_forked([*arguments, *more], timeout=800)), folder / "run"


@pytest.mark.slow
def test_the_whole_chain(smoke):
    pytest.importorskip("apache_beam")
    run_recipe, workdir = smoke
    result = run_recipe()
    assert result.returncode == 0, result.stdout + result.stderr
    names = ["prepare", "stage1", "filter", "stage2", "mine", "stage3", "merge", "stage4"]
    names += ["evaluate", "export"]
    states = [line.split()[:2] for line in result.stdout.splitlines()]
    assert [name for name, *state in states if state == ["done"]] == names

    # The stages are one model: its vocabulary, its architecture with experts, its lengths.
    cards = [json.loads((workdir / f"stage{i}/config.json").read_text()) for i in (1, 2, 3)]
    assert [card["model"]["moe_every"] for card in cards] == [0, 2, 2]
    vocabularies = {(workdir / f"stage{i}/sentencepiece.model").read_bytes() for i in (1, 2, 3)}
    assert len(vocabularies) == 1
    assert Embedder.load(workdir / "export").encode(["a b"], dim=16).shape == (1, 16)

    report = (workdir / "report.md").read_text()
    assert (workdir / "report.png").stat().st_size > 20_000
    manifests = (workdir / name / "manifest.json" for name in ("pairs", "filtered"))
    read, kept = (json.loads(path.read_text())["rows"] for path in manifests)
    assert f"{kept:,} of {read:,} pairs kept" in report
    results = json.loads((workdir / "stage1/results.json").read_text())
    before, after = (geometric_mean(results[name].values()) for name in ("untrained", "trained"))
    assert f"pseudo-perplexity {before:,.1f} -> {after:,.1f}" in report
    assert "| merge | " in report and "checkpoints 1, 2 of stage 3 as one" in report
    evaluation = json.loads((workdir / "evaluation/stage4.json").read_text())
    forms = ("", " int8", " binary")
    assert [*evaluation] == [f"{dim}{form}" for dim in (32, 16) for form in forms]
    assert any(line.startswith("| translations | 3 | 16 binary |") for line in report.splitlines())
    of_set = [v["ndcg_at_10"] for k, v in evaluation["16"].items() if k.startswith("translations")]
    row = next(line for line in report.splitlines() if line.startswith("| translations | 3 | 16 |"))
    assert row.split("|")[-2].strip() == f"{sum(of_set) / 3:.3f}"
    bm25 = json.loads((workdir / "evaluation/bm25.json").read_text())
    values = [v["ndcg_at_10"] for k, v in bm25.items() if k.startswith("translations")]
    assert row.split("|")[4].strip() == f"{sum(values) / 3:.3f}"

    # What the modern chain adds was trained, and the merged model is between its two.
    metrics = [
        json.loads((workdir / f"stage{i}/metrics.jsonl").read_text().splitlines()[-1])
        for i in (2, 3, 4)
    ]
    assert 0 < metrics[0]["distillation_vectors"] < 2
    assert metrics[1]["distillation_scores"] > 0 and "loss_at_16_binary" not in metrics[1]
    assert metrics[2]["loss_at_16_binary"] > 0
    origin = json.loads((workdir / "merged/config.json").read_text())["origin"]
    assert origin.startswith("average of ") and "stage3@1" in origin and "stage3@2" in origin

    # Beside another recipe, here itself, the report has one more table.
    beside = run_recipe(f"--config.evaluate.beside={workdir}")
    assert beside.returncode == 0, beside.stderr
    compared = (workdir / "report.md").read_text()
    assert f"## Beside {workdir}/stage4" in compared and "| +0.000 |" in compared

    # Once more: nothing is left to do, and the numbers are the same.
    result = run_recipe()
    assert result.returncode == 0 and result.stdout.count("done before") == len(names)
    assert (workdir / "report.md").read_text() == report

    # Another rule for a step that is done.
    result = run_recipe("--config.filter.k=1")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: step filter was made with other settings (k: 2 -> 1)" in result.stderr
    assert f"{workdir}/filtered {workdir}/stage2 {workdir}/mined" in result.stderr
