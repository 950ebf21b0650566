import dataclasses
import json

import jax
import numpy as np
import pytest
import synthetic_data
from conftest import run_python

from moe_embed_jax import Embedder
from moe_embed_jax import embedder as embedder_module
from moe_embed_jax.checkpoint import Checkpoints
from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.data.vocabulary import Vocabulary
from moe_embed_jax.errors import UserError
from moe_embed_jax.models.encoder import EncoderConfig, init_params

MODEL = EncoderConfig(
    vocab_size=512, num_layers=2, width=32, num_heads=2, ffn_width=48, num_experts=4
)
TEXTS = ["tanara nobipo", "situno", "", "kapehu rameku jikiki gapehu " * 40, "нет 你好 \ud800"]
TEXTS += ["x" * 999]


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    card = {
        "model": dataclasses.asdict(MODEL),
        "data": {"query_length": 16, "document_length": 64},
    }
    (folder / "config.json").write_text(json.dumps(card))
    source = vocabulary_path(synthetic_data.PREPARATION, data_dir)
    (folder / "sentencepiece.model").write_bytes(source.read_bytes())
    checkpoints = Checkpoints(folder / "checkpoints")
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    checkpoints.save(1, {}, params=params, optimizer={"step": np.zeros(1)})
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def embedder(folder):
    return Embedder.load(folder)


def test_shape_norm_and_order(embedder):
    embeddings = embedder.encode(TEXTS, prompt="document")
    assert embeddings.shape == (len(TEXTS), 32) and embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(embedder.encode([text], "document")[0], embeddings[i], atol=1e-5)
    order = [3, 0, 5, 1]
    shuffled = embedder.encode([TEXTS[i] for i in order], "document")
    np.testing.assert_allclose(shuffled, embeddings[order], atol=1e-5)


def test_batch_size_does_not_matter(embedder):
    one = embedder.encode(TEXTS * 5, "query", batch_size=3)
    np.testing.assert_allclose(one, embedder.encode(TEXTS * 5, "query"), atol=1e-5)


def test_the_size_of_calls_does_not_matter(folder, embedder, monkeypatch):
    def slots(embedder):
        return max(call.rows * call.row_length for call in embedder._calls([60] * 200))

    monkeypatch.setattr(embedder_module, "FEW_BLOCK_PARAMS", 0)
    of_a_large_model = Embedder.load(folder)
    assert (slots(embedder), slots(of_a_large_model)) == (2_048, 8_192)
    texts = TEXTS * 50
    np.testing.assert_allclose(of_a_large_model.encode(texts), embedder.encode(texts), atol=1e-5)


def test_empty_list(embedder):
    assert embedder.encode([]).shape == (0, 32)
    assert embedder.encode([], dim=8).shape == (0, 8)


def test_prompts_are_prefixes(embedder):
    text = TEXTS[0]
    queries = embedder.encode([text], "query")
    np.testing.assert_allclose(queries, embedder.encode(["search_query: " + text], None), atol=1e-5)
    assert np.abs(queries - embedder.encode([text], "document")).max() > 1e-4


def test_texts_are_truncated_at_their_sides_length(embedder):
    words = [synthetic_data._word(i, "aa") for i in range(200)]
    short, long = " ".join(words[:100]), " ".join(words)
    np.testing.assert_allclose(*embedder.encode([short, long], "query"), atol=1e-5)


def test_a_megabyte_of_text(embedder):
    text = "tanara nobipo situno " * 50_000
    assert np.isfinite(embedder.encode([text], "document")).all()


def test_dim_cuts_then_normalises(embedder):
    full = embedder.encode(TEXTS[:2])
    cut = embedder.encode(TEXTS[:2], dim=8)
    expected = full[:, :8] / np.linalg.norm(full[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(texts="one text"), "use encode"),
        (dict(texts=["a", None]), r"texts\[1\] is a NoneType"),
        (dict(texts=["a"], prompt="passage"), "prompt='passage'"),
        (dict(texts=["a"], dim=33), "dim=33 must be between 1 and the model's width 32"),
        (dict(texts=["a"], dim=0), "dim=0"),
    ],
)
def test_misuse(embedder, arguments, message):
    with pytest.raises(UserError, match=message):
        embedder.encode(**arguments)


def test_expert_shares(embedder):
    shares = embedder.expert_shares(TEXTS)
    assert shares.shape == (1, 4)
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)


def test_not_a_model_folder(folder, tmp_path):
    with pytest.raises(UserError, match=r"is not a model folder: config\.json is missing"):
        Embedder.load(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        Embedder.load(tmp_path)
    assert not (tmp_path / "checkpoints").exists()  # looking does not leave traces


def test_vocabulary_is_the_models(embedder, folder):
    expected = Vocabulary.load(folder / "sentencepiece.model")
    assert embedder.vocabulary.content_hash == expected.content_hash


def test_neither_training_nor_embedding_imports_tensorflow():
    """Its import costs seconds and gigabytes, and it reserves devices."""
    code = (
        "import sys, moe_embed_jax.training.loop, moe_embed_jax.embedder; "
        "bad = {'tensorflow', 'seqio', 'tensorflow_datasets', 'torch', 'mteb'} & set(sys.modules); "
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    result = run_python(["-c", code])
    assert result.returncode == 0, result.stderr
