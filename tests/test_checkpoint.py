import contextlib
import functools
import json
import pathlib
import shutil
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.forked import run_forked

from moe_embed_jax import orbax_leftovers
from moe_embed_jax.checkpoint import Checkpoints, DamagedCheckpoint
from moe_embed_jax.errors import UserError
from moe_embed_jax.newest_checkpoint import read_newest

# A read that fails leaves tasks behind in Orbax, whose event loop is closed when they end.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PARAMS = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(4)}}
OPTIMIZER = {"step": jnp.asarray(7), "mu": jnp.full((2, 3), 0.5)}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (3, 5, 7):
        checkpoints.save(step, {"spec": {"rows": step}}, params=PARAMS, optimizer=OPTIMIZER)
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


def test_round_trip_and_retention(saved):
    assert saved.latest_step() == 7
    assert sorted(int(p.name) for p in saved.folder.iterdir() if p.name.isdigit()) == [5, 7]
    assert saved.data(5) == {"spec": {"rows": 5}}
    restored = saved.restore(7, params=abstract(PARAMS), optimizer=abstract(OPTIMIZER))
    expected = {"params": PARAMS, "optimizer": OPTIMIZER}
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert saved.items(7) == {"params", "optimizer"}


def test_parameters_alone(saved):
    restored = saved.restore(7, params=abstract(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, restored, {"params": PARAMS})


def test_saving_a_step_again_changes_nothing(saved):
    saved.save(7, {}, params=jax.tree.map(jnp.zeros_like, PARAMS), optimizer=OPTIMIZER)
    saved.wait()
    restored = saved.restore(7, params=abstract(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, restored, {"params": PARAMS})


def test_other_architecture_is_named(saved):
    wrong = {"a": jnp.zeros((2, 4)), "b": PARAMS["b"]}
    with pytest.raises(UserError, match=r"params/a is \(2, 3\) there and \(2, 4\) in this config"):
        saved.restore(7, params=abstract(wrong))
    with pytest.raises(UserError, match=r"params/extra is None there and \(1,\)"):
        saved.restore(7, params=abstract(PARAMS | {"extra": jnp.zeros(1)}))


def test_unfinished_checkpoint_is_not_seen_and_goes(saved):
    """What a kill leaves behind is a folder that Orbax has not renamed yet."""
    leftover = saved.folder / "9.orbax-checkpoint-tmp-1"
    (leftover / "params").mkdir(parents=True)
    (saved.folder / "notes").mkdir()
    checkpoints = Checkpoints(saved.folder)
    assert checkpoints.latest_step() == 7 and leftover.exists()
    # The run that owns the folder removes it, and nothing that is not Orbax's.
    restore = functools.partial(checkpoints.restore, params=abstract(PARAMS))
    assert checkpoints.restore_newest(print, restore)[0] == 7
    assert not leftover.exists() and (saved.folder / "notes").exists()
    assert checkpoints.steps() == [5, 7]
    checkpoints.close()


# ---- Damage --------------------------------------------------------------------------------------


def flip(path, place=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 16
    path.write_bytes(data)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "flip": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "delete": pathlib.Path.unlink,
    "folder": replace_by_folder,
}
# Whole checkpoints are read without these files; their content stands for nothing.
WITHOUT_MEANING = {"commit_success.txt", "checksums/commit_success.txt"}


def assert_whole(checkpoints, step):
    checkpoints.check(step)
    trees = {"params": PARAMS, "optimizer": OPTIMIZER}
    assert checkpoints.items(step) == trees.keys()
    restored = checkpoints.restore(step, **{name: abstract(tree) for name, tree in trees.items()})
    jax.tree.map(np.testing.assert_array_equal, restored, trees)


def files_of(step_folder):
    return sorted(
        path.relative_to(step_folder).as_posix()
        for path in step_folder.rglob("*")
        if path.is_file()
    )


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_every_file_is_named(saved, tmp_path, kind):
    whole = saved.folder / "7"
    kept = tmp_path / "kept"
    shutil.copytree(whole, kept)
    for name in files_of(whole):
        DAMAGE[kind](whole / name)
        if name in WITHOUT_MEANING or (name == "_CHECKPOINT_METADATA" and kind == "flip"):
            assert_whole(Checkpoints(saved.folder), 7)
        else:
            with pytest.raises(DamagedCheckpoint) as error:
                saved.check(7)
            assert str(error.value).startswith(f"checkpoint {whole} is damaged: {whole / name} ")
        shutil.rmtree(whole)
        shutil.copytree(kept, whole)
    saved.check(7)


def test_every_flipped_bit_of_an_array_is_found(saved):
    names = [name for name in files_of(saved.folder / "7") if name.startswith("params/")]
    random = np.random.default_rng(0)
    for name in names:
        path = saved.folder / "7" / name
        before = path.read_bytes()
        for place in random.integers(0, len(before), 20).tolist():
            flip(path, place)
            with pytest.raises(DamagedCheckpoint, match=name):
                saved.check(7, ["params"])
            path.write_bytes(before)


def test_flips_in_what_orbax_says_of_a_checkpoint_are_named_or_harmless(saved):
    path = saved.folder / "7" / "_CHECKPOINT_METADATA"
    before = path.read_bytes()
    named = 0
    for place in range(0, len(before), 5):
        flip(path, place)
        try:
            Checkpoints(saved.folder).check(7)
            if place % 25 == 0:
                assert_whole(Checkpoints(saved.folder), 7)
        except DamagedCheckpoint as error:
            assert "_CHECKPOINT_METADATA was changed" in str(error)
            named += 1
    assert named > 10


@pytest.mark.parametrize("text", ['{"a": ' + "[" * 100_000, '"no object"'], ids=["deep", "str"])
def test_metadata_that_orbax_cannot_read_is_named(saved, text):
    (saved.folder / "7" / "_CHECKPOINT_METADATA").write_text(text)
    with pytest.raises(UserError, match=r"c/7/_CHECKPOINT_METADATA is damaged "):
        Checkpoints(saved.folder)


@pytest.mark.parametrize("value", ["x", [], 1, "[" * 100_000], ids=["text", "list", "int", "deep"])
def test_a_description_that_orbax_does_not_take_is_named(saved, value):
    path = saved.folder / "7" / "_CHECKPOINT_METADATA"
    described = json.loads(path.read_text()) | {"performance_metrics": "HERE"}
    text = value if str(value).startswith("[[") else json.dumps(value)
    path.write_text(json.dumps(described).replace('"HERE"', text))
    with pytest.raises(UserError, match=f"^{path} is damaged .*: move the folder of its step away"):
        Checkpoints(saved.folder)


def test_trees_that_are_not_read_may_be_damaged(saved):
    flip(saved.folder / "7" / "optimizer" / "_METADATA")
    saved.check(7, ["params"])
    with pytest.raises(DamagedCheckpoint, match="optimizer/_METADATA was changed"):
        saved.check(7)


def test_the_newest_that_is_whole_is_restored_and_damaged_ones_are_set_aside(saved, capsys):
    (saved.folder / "9").mkdir()  # as a full disk leaves it
    array = next(saved.folder.glob("7/params/d/*"))
    flip(array)
    checkpoints = Checkpoints(saved.folder)
    data = []
    restore = functools.partial(checkpoints.restore, params=abstract(PARAMS))
    step, found, restored = checkpoints.restore_newest(data.append, restore)
    assert step == 5 and data == [found] == [{"spec": {"rows": 5}}]
    jax.tree.map(np.testing.assert_array_equal, restored, {"params": PARAMS})
    aside = saved.folder.with_name("c_set_aside")
    assert sorted(path.name for path in aside.iterdir()) == ["7", "9"]
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("warning")] == [
        f"warning: checkpoint {saved.folder}/9 is damaged: "
        f"{saved.folder}/9/_CHECKPOINT_METADATA is missing; moved to {aside}/9",
        f"warning: checkpoint {saved.folder}/7 is damaged: {array} was changed (its CRC-32 "
        f"differs); moved to {aside}/7",
    ]

    checkpoints.save(7, {}, params=PARAMS, optimizer=OPTIMIZER)  # the run comes by again
    checkpoints.wait()
    checkpoints.check(7)
    flip(saved.folder / "7" / "data" / "metadata")
    flip(saved.folder / "5" / "data" / "metadata")
    with pytest.raises(UserError, match=r"c holds no whole checkpoint: .* starts again at step 0"):
        checkpoints.restore_newest(data.append, restore)
    assert sorted(path.name for path in aside.iterdir()) == ["5", "7", "7-2", "9"]
    checkpoints.close()


def test_no_checkpoint_is_no_error(tmp_path):
    assert Checkpoints(tmp_path / "none").restore_newest(print, print) is None


def read_params(checkpoints, step):
    return step, checkpoints.restore(step, params=abstract(PARAMS))["params"]


def test_a_reader_takes_the_newest_that_is_whole_and_moves_nothing(saved, capsys):
    array = next(saved.folder.glob("7/params/ocdbt.process_0/d/*"))
    flip(array)
    step, params = read_newest(saved.folder, None, ["params"], read_params)
    assert step == 5
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    said = capsys.readouterr().err
    assert f"{array} was changed (its CRC-32 differs); step 5 is read" in said
    assert (saved.folder / "7").is_dir()
    with pytest.raises(DamagedCheckpoint, match=f"{array} was changed"):
        read_newest(saved.folder, 7, ["params"], read_params)
    with pytest.raises(UserError, match=r"step=6: .*/c has no such checkpoint, only 5, 7"):
        read_newest(saved.folder, 6, ["params"], read_params)
    flip(saved.folder / "5" / "params" / "_METADATA")
    with pytest.raises(DamagedCheckpoint, match=r"5/params/_METADATA was changed"):
        read_newest(saved.folder, None, ["params"], read_params)


def test_a_flip_that_orbax_does_not_see_is_found(tmp_path):
    """Noise is not compressed, so that a flipped bit is another weight, and no error of Orbax."""
    noise = {"a": jax.random.normal(jax.random.key(0), (64, 64))}
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(0, {}, params=noise)
    checkpoints.close()

    def read(checkpoints, step):
        return checkpoints.restore(step, params=abstract(noise))["params"]

    np.testing.assert_array_equal(
        read_newest(tmp_path / "c", None, ["params"], read)["a"], noise["a"]
    )
    files = (tmp_path / "c" / "0" / "params").rglob("d/*")
    array = max(files, key=lambda path: path.stat().st_size)
    flip(array)
    assert not np.array_equal(read(Checkpoints(tmp_path / "c"), 0)["a"], noise["a"])
    with pytest.raises(DamagedCheckpoint, match=f"{array} was changed"):
        read_newest(tmp_path / "c", None, ["params"], read)


def test_checkpoints_without_checksums_are_read_with_a_line(saved, capsys):
    """As earlier versions saved them: what Orbax notices is named, the rest cannot be seen."""
    for step in (5, 7):
        shutil.rmtree(saved.folder / str(step) / "checksums")
        path = saved.folder / str(step) / "_CHECKPOINT_METADATA"
        described = json.loads(path.read_text())
        del described["item_handlers"]["checksums"]
        path.write_text(json.dumps(described))
    assert read_newest(saved.folder, None, ["params"], read_params)[0] == 7
    line = f"checkpoint {saved.folder}/7 was saved without checksums: damage to its arrays would"
    assert line in capsys.readouterr().err
    (saved.folder / "7" / "params" / "manifest.ocdbt").write_bytes(b"")
    assert read_newest(saved.folder, None, ["params"], read_params)[0] == 5
    assert f"checkpoint {saved.folder}/7 is damaged: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [FileNotFoundError("c/0"), NotADirectoryError("c/0"), ValueError("no item")]
)
def test_a_step_that_goes_between_its_listing_and_its_reading(tmp_path, monkeypatch, error):
    with contextlib.closing(Checkpoints(tmp_path / "c", keep=2)) as checkpoints:
        checkpoints.save(0, {}, params=PARAMS)
        checkpoints.save(1, {}, params=PARAMS)
    manager = ocp.CheckpointManager

    def fails_once(folder, **kwargs):
        monkeypatch.setattr(ocp, "CheckpointManager", manager)
        shutil.rmtree(folder / "0")
        raise error

    monkeypatch.setattr(ocp, "CheckpointManager", fails_once)
    assert read_newest(tmp_path / "c", None, ["params"], read_params)[0] == 1


def test_a_step_that_goes_while_orbax_reads_its_arrays(saved, monkeypatch, capsys):
    """Orbax raises a plain `Exception` then, of many lines."""
    restore = ocp.CheckpointManager.restore

    def fails_once(manager, step, **kwargs):
        monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
        shutil.rmtree(saved.folder / str(step))
        raise Exception("Encountered error while reading array index: 0.\nTensorStore(...)")

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fails_once)
    assert read_newest(saved.folder, None, ["params"], read_params)[0] == 5
    line = capsys.readouterr().err
    assert f"checkpoint {saved.folder}/7 is damaged: " in line and line.count("\n") == 1


def test_reads_that_orbax_leaves_print_no_trace_in_a_notebook_either(saved, monkeypatch):
    orbax_leftovers.hide.cache_clear()
    for name in ("excepthook", "unraisablehook"):
        monkeypatch.setattr(sys, name, getattr(sys, f"__{name}__"))
    with contextlib.closing(Checkpoints(saved.folder)):
        assert sys.excepthook is not sys.__excepthook__
        assert sys.unraisablehook is not sys.__unraisablehook__


def test_a_reader_beside_a_run_that_removes_its_checkpoints(tmp_path):
    """The checkpoint that was the newest a moment ago may be gone: the next one is read."""
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(0, {}, params=PARAMS)
    checkpoints.wait()
    stop = threading.Event()

    def run():
        step = 0
        while not stop.is_set():
            step += 1
            checkpoints.save(step, {}, params=PARAMS)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        seen = [read_newest(checkpoints.folder, None, ["params"], read_params)]
        for _ in range(20):
            seen.append(read_newest(checkpoints.folder, None, ["params"], read_params))
    finally:
        stop.set()
        thread.join()
        checkpoints.close()
    steps = [step for step, _ in seen]
    assert steps == sorted(steps) and steps[-1] > steps[0]
    for _, params in seen:
        jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


SAVES = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from moe_embed_jax.checkpoint import Checkpoints

mesh = jax.make_mesh((2,), ("data",))
array = jax.device_put(np.arange(64.0), NamedSharding(mesh, PartitionSpec()))
checkpoints, events = Checkpoints(sys.argv[1]), []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
checkpoints.save(0, {}, params={"a": array})
checkpoints.close()
print(sum("compile" in name for name in events))
jax.jit(lambda x: x[:3])(array)
print(any("compile" in name for name in events))
"""


def test_small_arrays_of_several_devices_are_saved_without_a_program_for_each_slice(tmp_path):
    result = run_forked(["-c", SAVES, tmp_path / "run"], devices=2)
    assert result.stdout.split() == ["0", "True"], result.stderr
    found = Checkpoints(tmp_path / "run").restore(0, params=abstract({"a": jnp.zeros(64)}))
    np.testing.assert_array_equal(found["params"]["a"], np.arange(64.0))
