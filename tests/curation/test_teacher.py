"""Teachers: identities, real models with their prefixes, and sentence-transformers."""

import builtins
import shutil
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_embed_jax.curation import teacher as teacher_module
from moe_embed_jax.curation.teacher import load_teacher
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.search.vectors import write_vectors

TEXTS = ["Set the volume level.", "Lösche einen Eimer.", "音量を設定する"]


def test_multilingual_e5_small(e5_small, tmp_path):
    teacher = load_teacher(str(e5_small), single_device_mesh())
    identity = teacher.identity("query: ")
    assert identity["prefix"] == "query: " and identity["max_length"] == 512
    assert (
        identity["hash"] == load_teacher(str(e5_small), single_device_mesh()).identity(None)["hash"]
    )
    store = write_vectors(
        tmp_path / "v", lambda: TEXTS, lambda t: teacher.encode(t, prompt="passage: "), identity
    )
    query_BD = teacher.encode(["Stelle die Lautstärke ein"], prompt="query: ")
    assert store.shape == (3, 384)
    assert (query_BD @ store[:].T)[0].argmin() == 1  # the bucket, in the language of the query


def test_all_minilm(minilm):
    teacher = load_teacher(str(minilm), single_device_mesh())
    x_ND = teacher.encode(["set the volume", "adjust loudness", "delete a bucket"], prompt=None)
    assert x_ND[0] @ x_ND[1] > x_ND[0] @ x_ND[2]
    assert teacher.identity("query")["prefix"] == ""


def test_the_hash_is_that_of_weights_tokenizer_and_architecture(e5_small):
    teacher = load_teacher(str(e5_small), single_device_mesh())
    before = teacher.identity(None)["hash"]
    teacher.__dict__.pop("_hash")
    key = next(iter(teacher.params))
    leaf_path = teacher.params[key]
    while isinstance(leaf_path, dict):
        parent, name = leaf_path, next(iter(leaf_path))
        leaf_path = leaf_path[name]
    parent[name] = leaf_path + 1e-3
    assert teacher.identity(None)["hash"] != before


def test_sentence_transformers_is_missing(monkeypatch):
    imported = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.partition(".")[0] == "sentence_transformers":
            raise ImportError("No module named 'sentence_transformers'")
        return imported(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.delitem(sys.modules, "sentence_transformers", raising=False)
    with pytest.raises(UserError, match=r"sentence-transformers:some/model needs .*\[pytorch\]"):
        load_teacher("sentence-transformers:some/model", single_device_mesh())
    with pytest.raises(UserError, match=r"sentence-transformers:gs://b/m: PyTorch reads no bucket"):
        load_teacher("sentence-transformers:gs://b/m", single_device_mesh())


class FakeModel:
    """The part of SentenceTransformer that is used."""

    prompts = {"query": "Q: ", "passage": "P: ", "document": ""}  # noqa: RUF012
    max_seq_length = 77
    tokenizer = None

    def __init__(self, name):
        if name == "gone":
            raise OSError("gone is not a local folder\nand more")

    def encode(self, texts, prompt, normalize_embeddings, convert_to_numpy, show_progress_bar):
        assert normalize_embeddings and convert_to_numpy and not show_progress_bar
        "".join(texts).encode("utf-8")  # tokenizers fail on half of a surrogate pair
        return np.array([[len(prompt + text), 0, 0, 0] for text in texts], np.float16)

    def state_dict(self):
        return {}


def test_sentence_transformers_prefixes(monkeypatch):
    pytest.importorskip("torch", reason="needs the extra pytorch")
    monkeypatch.setitem(
        sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=FakeModel)
    )
    teacher = load_teacher("sentence-transformers:fake", single_device_mesh())
    assert teacher.identity("query") == teacher.identity("query") | {
        "prefix": "Q: ",
        "max_length": 77,
    }
    assert [teacher.identity(p)["prefix"] for p in ("document", None, "x: ")] == ["P: ", "", "x: "]
    x_ND = teacher.encode(["a\ud800"], prompt="document")
    assert x_ND.dtype == np.float32 and x_ND[0, 0] == 5
    assert teacher.encode([], prompt=None).shape == (0, 4)
    with pytest.raises(UserError, match="prompt='both': choose one of document, passage, query"):
        teacher.encode(["ab"], prompt="both")
    with pytest.raises(UserError, match=r"gone cannot be loaded: gone is not a local folder$"):
        load_teacher("sentence-transformers:gone", single_device_mesh())
    assert teacher_module.EXTERNAL == "sentence-transformers:"


def test_equals_embedder_through_pytorch(minilm):
    pytest.importorskip("sentence_transformers")
    ours = load_teacher(str(minilm), single_device_mesh())
    theirs = load_teacher(f"sentence-transformers:{minilm}", single_device_mesh())
    for prompt in ("query", "passage: "):
        np.testing.assert_allclose(
            ours.encode(TEXTS, prompt=prompt), theirs.encode(TEXTS, prompt=prompt), atol=1e-5
        )
    assert len(theirs.identity(None)["hash"]) == 64
    long = ["one two three " * 300, "short"]
    for each in (ours, theirs):
        each.encode(long, prompt="passage: ")
    assert theirs.truncation.lines() == ours.truncation.lines()
    assert theirs.truncation.sides["document"].cut_texts == 1


def test_a_model_has_one_identity(minilm, tmp_path):
    """Used before or not, and without a pooler, as multilingual-e5-small has none: transformers
    draws one."""
    pytest.importorskip("sentence_transformers", reason="needs the extra pytorch")
    folder = tmp_path / "no_pooler"
    shutil.copytree(minilm, folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    assert len(kept) == len(tensors) - 2
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    teachers = [
        load_teacher(f"sentence-transformers:{folder}", single_device_mesh()) for _ in range(2)
    ]
    teachers[1].encode(TEXTS, None)  # sets how the tokenizer pads
    assert teachers[0].identity(None) == teachers[1].identity(None)


def test_a_tokenizer_is_not_guessed(tmp_path):
    pytest.importorskip("sentence_transformers", reason="needs the extra pytorch")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"pieces")
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer_config\.json"):
        load_teacher(f"sentence-transformers:{tmp_path}", single_device_mesh())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):  # it has no weights
        load_teacher(f"sentence-transformers:{tmp_path}", single_device_mesh())
