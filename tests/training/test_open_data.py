"""A run opens its prepared data: the vocabulary must be the one that made the tokens."""

import pathlib
import types

import pytest

from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.errors import UserError
from moe_embed_jax.training import workdir


def open_with(monkeypatch, tmp_path, sha256: str):
    source = tmp_path / "sentencepiece.model"
    source.write_bytes(b"pieces")
    store = types.SimpleNamespace(spec={"vocabulary": {"sha256": sha256, "size": 8}})
    vocabulary = types.SimpleNamespace(size=8, content_hash="a" * 64)
    monkeypatch.setattr(workdir, "planned_store_path", lambda *_: pathlib.Path("tokens"))
    monkeypatch.setattr(workdir, "token_store_path", lambda *_: pathlib.Path("tokens"))
    monkeypatch.setattr(workdir, "vocabulary_path", lambda *_: source)
    monkeypatch.setattr(workdir, "open_vocabulary", lambda _: vocabulary)
    monkeypatch.setattr(TokenStore, "open", lambda *_: store)
    config = types.SimpleNamespace(
        data=types.SimpleNamespace(preparation=dict, dir=tmp_path, cache_dir=""),
        model=types.SimpleNamespace(vocab_size=8),
    )
    (tmp_path / "run").mkdir()
    return workdir.open_data(tmp_path / "run", config, write=True)


def test_a_changed_vocabulary_of_the_same_size(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"model was changed: its SHA-256 is a{12}, .* with b{12};"):
        open_with(monkeypatch, tmp_path, "b" * 64)
    assert not list((tmp_path / "run").iterdir())  # it is not copied into the run


def test_the_vocabulary_of_the_tokens(monkeypatch, tmp_path):
    open_with(monkeypatch, tmp_path, "a" * 64)
    assert (tmp_path / "run/sentencepiece.model").read_bytes() == b"pieces"
