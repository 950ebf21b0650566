"""launch/convert.py as a user meets it, and models named on the hub."""

import functools
import json

import numpy as np
import pytest
from helpers.forked import run_forked
from helpers.published_models import NOMIC, nomic_shapes, random_tensors, write_folder

from moe_embed_jax import Embedder, conversion, model_folder
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop import export
from moe_embed_jax.interop.source import source_folder
from moe_embed_jax.ownership import own

DENSE = NOMIC | dict(num_experts=0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    return write_folder(folder, DENSE, random_tensors(nomic_shapes(DENSE)))


def convert(*arguments):
    return run_forked(["launch/convert.py", *arguments])


def test_import_upcycle_and_export(dense, tmp_path):
    ours, sparse, out = (tmp_path / name for name in ("ours", "sparse", "out"))
    for action, source, target, *flags in (
        ("import", dense, ours),
        ("upcycle", ours, sparse, "--mode=preserving", "--num_experts=4"),
        ("export", sparse, out),
    ):
        dry = convert(action, f"--source={source}", f"--target={target}", "--dry_run", *flags)
        assert dry.returncode == 0, dry.stderr
        assert "checked, nothing written" in dry.stdout and not target.exists()
        result = convert(action, f"--source={source}", f"--target={target}", *flags)
        assert result.returncode == 0, result.stderr
        assert f"wrote {target}" in result.stdout
    assert "2 with 4 experts, top-2" in result.stdout
    assert "a hidden bias in every expert, normalised gates" in result.stdout
    assert json.loads((out / "config.json").read_text())["model_type"] == "moe_embed"
    ids = np.random.default_rng(0).integers(0, 128, (3, 9))
    embeddings = [Embedder.load(f).encode_ids(ids, ids >= 0) for f in (dense, sparse, out)]
    for other in embeddings[1:]:
        np.testing.assert_allclose(other, embeddings[0], atol=1e-5)


def test_a_killed_conversion_can_be_repeated(dense, tmp_path, monkeypatch):
    """Each action is interrupted before its last file, refused while another one works, repeated;
    `kill -9` would leave the folder that is made here."""

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    actions = {
        "ours": lambda target: conversion.import_model(dense, target),
        "sparse": lambda target: conversion.upcycle_model(dense, target, "paper", num_experts=2),
        "out": lambda target: conversion.export_model(dense, target),
    }
    for name, action in actions.items():
        target = tmp_path / name / "target"
        with monkeypatch.context() as patch:
            patch.setattr(model_folder, "save_card", interrupted)
            patch.setattr(export, "model_card", interrupted)
            with pytest.raises(KeyboardInterrupt):
                action(target)
        assert not list(target.parent.iterdir())
        left = target.with_name(".target.partial") / "checkpoints"
        left.mkdir(parents=True)
        with own(target), pytest.raises(UserError, match="target is in use by process"):
            action(target)
        action(target)
        assert [path.name for path in target.parent.iterdir()] == ["target"]
        assert (target / "config.json").is_file()


def test_a_conversion_killed_after_its_folder_appeared_can_be_repeated(tmp_path, monkeypatch):
    """But another one, or that of another source, is refused."""
    source = tmp_path / "source"
    write_folder(source, DENSE, random_tensors(nomic_shapes(DENSE)))
    actions = {
        "import": functools.partial(conversion.import_model, source),
        "upcycle": functools.partial(conversion.upcycle_model, source, mode="paper"),
        "export": functools.partial(conversion.export_model, source),
    }
    for name, action in actions.items():
        assert action(target=tmp_path / name)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / name).rglob("*")}
        assert not action(target=tmp_path / name)
        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / name).rglob("*")}
        assert str(tmp_path) not in (tmp_path / name / "made_by.json").read_text()
    with (tmp_path / "export" / "README.md").open("a") as file:  # people do that
        file.write("Ours.\n")
    result = convert("export", f"--source={source}", f"--target={tmp_path / 'export'}")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"done before: {tmp_path / 'export'}\n"
    refused = "exists already, made by another command or of other inputs"
    for name, other in {
        "import": dict(positions="learned"),
        "upcycle": dict(seed=1),
        "export": dict(query_prefix="q: "),
    }.items():
        with pytest.raises(UserError, match=refused):
            actions[name](target=tmp_path / name, **other)
    with pytest.raises(UserError, match=refused):
        actions["import"](target=tmp_path / "export")
    # A result that was damaged meanwhile is not taken for done.
    for name, action in actions.items():
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        damaged = max(files, key=lambda path: path.stat().st_size)
        content = damaged.read_bytes()
        damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=r"but .* was changed .*: remove it, and repeat"):
            action(target=tmp_path / name)
        damaged.unlink()
        with pytest.raises(UserError, match=r"is what this command made, but .* is missing"):
            action(target=tmp_path / name)
        damaged.write_bytes(content)
        made = tmp_path / name / "made_by.json"
        text = made.read_text()
        made.write_text(text.replace('"crc32": "', '"crc32": "0'))
        with pytest.raises(UserError, match=r"made_by.json was changed .*: remove"):
            action(target=tmp_path / name)
        made.write_text(text)
        assert not action(target=tmp_path / name)
        # Folders of earlier versions do not say what they held.
        made.write_text(json.dumps({"command": json.loads(text)["command"]}))
        assert not action(target=tmp_path / name)
    (source / "config.json").touch()
    for name, action in actions.items():
        with pytest.raises(UserError, match=refused):
            action(target=tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "--source=nowhere", "--target=x"], "model folder nowhere does not exist"),
        (["import", "--source=some/name", "--target=x"], "on the hub? then hf://some/name"),
        (["import", "--source=DENSE", "--target=DENSE"], "exists already"),
        (["upcycle", "--source=DENSE", "--target=x"], "--mode"),
        (["upcycle", "--source=DENSE", "--target=x", "--mode=paper", "--noise=-1"], "noise=-1.0"),
        (["export", "--source=DENSE", "--target=x", "--step=3"], "which has no steps"),
        (["import", "--source=DENSE", "--target=x", "--vocabulary=v"], "v does not exist"),
        (["improt"], "invalid choice: 'improt'"),
    ],
)
def test_refusals_are_one_line(dense, tmp_path, arguments, message):
    arguments = [a.replace("DENSE", str(dense)) for a in arguments]
    arguments = [a.replace("--target=x", f"--target={tmp_path / 'x'}") for a in arguments]
    result = convert(*arguments)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()


def test_models_on_the_hub(dense, monkeypatch):
    """hf:// goes through the hub's client, which is asked for no code and no pickles."""
    import huggingface_hub

    calls = []

    def snapshot_download(name, revision, allow_patterns):
        calls.append((name, revision))
        assert not any(pattern.endswith((".py", ".bin")) for pattern in allow_patterns)
        if name == "no/such":
            raise OSError("Repository Not Found\nfor url ...")
        return str(dense)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert source_folder("hf://nomic-ai/nomic-embed-text-v2-moe") == dense
    assert source_folder("hf://a/b@main") == dense
    assert calls == [("nomic-ai/nomic-embed-text-v2-moe", None), ("a/b", "main")]
    assert Embedder.load("hf://a/b").width == 32
    with pytest.raises(UserError, match=r"hf://no/such cannot be fetched: Repository Not Found$"):
        source_folder("hf://no/such")
    with pytest.raises(UserError, match="write hf://OWNER/NAME"):
        source_folder("hf://name")
