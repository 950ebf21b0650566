"""Uploading an export, with a stand-in for the hub's client."""

import pathlib
import types

import huggingface_hub
import pytest
from helpers.commands import files_of
from helpers.published_models import NOMIC, nomic_shapes, random_tensors, write_folder

from moe_embed_jax import conversion, storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.card_config import CardConfig


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    source = write_folder(root / "source", NOMIC, random_tensors(nomic_shapes(NOMIC)))
    card = CardConfig(name="me/small", license="mit", languages="en")
    conversion.export_model(source, root / "out", card=card)
    return root / "out"


@pytest.fixture
def calls(monkeypatch):
    """What the client was asked for."""
    made = []

    class Client:
        def create_repo(self, repo_id, **options):
            made.append((repo_id, options))

        def upload_folder(self, **options):
            if options["repo_id"] == "no/access":
                raise huggingface_hub.errors.HfHubHTTPError(
                    "403 Forbidden: no write access\nCannot access content",
                    response=types.SimpleNamespace(
                        headers={}, request=None, status_code=403, text=""
                    ),
                )
            folder = pathlib.Path(options["folder_path"])
            made.append(options | {"files": files_of(folder)})
            return types.SimpleNamespace(commit_url="https://hub.example/me/small/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    return made


def test_push(exported, calls, capsys):
    conversion.push_model(exported, "me/small", private=True, message="First version")
    (name, creation), upload = calls
    assert name == "me/small" and creation["private"] and creation["exist_ok"]
    assert upload["folder_path"] == str(exported)
    assert upload["commit_message"] == "First version"
    assert upload["ignore_patterns"] == ["made_by.json"]
    out = capsys.readouterr().out
    assert "https://hub.example/me/small/commit/1" in out and "model.safetensors" in out
    assert "made_by.json" not in out and "note" not in out
    conversion.push_model(exported, "me/small")
    assert calls[2][1]["private"] is None  # as it is, or public


def test_push_from_a_bucket(exported, calls, bucket):
    files = files_of(exported)
    for name, content in files.items():
        storage.write(bucket / name, content)
    conversion.push_model(bucket, "me/small")
    assert calls[1]["files"] == files


def test_a_dry_run_sends_nothing(exported, calls, tmp_path, capsys):
    conversion.export_model(exported, tmp_path / "bare")
    conversion.push_model(tmp_path / "bare", "me/small", dry_run=True)
    out = capsys.readouterr().out
    assert not calls
    assert "the card names no license" in out and "export with --name=OWNER/NAME" in out


def test_refusals(exported, calls, tmp_path):
    with pytest.raises(UserError, match=r"^no/access cannot be uploaded: 403 Forbidden.*access$"):
        conversion.push_model(exported, "no/access")
    with pytest.raises(UserError, match="write OWNER/NAME"):
        conversion.push_model(exported, "small")
    with pytest.raises(UserError, match=r"no exported folder, it has no config\.json and no mod"):
        conversion.push_model(tmp_path, "me/small")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(UserError, match=r"README\.md: bad front matter"):
        conversion.push_model(tmp_path, "me/small")
    assert not [call for call in calls if isinstance(call, dict)]
