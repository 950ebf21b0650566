"""Pseudo-perplexity and guesses against one text at a time, without packing and calls."""

import gzip
import json

import jax
import numpy as np
import pytest
from helpers import synthetic_data

from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation import pseudo_perplexity
from moe_embed_jax.evaluation.pseudo_perplexity import PASSES, MaskedModel, load_documents
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.models.encoder import EncoderConfig, encode_tokens, init_params
from moe_embed_jax.models.heads import init_mlm_head, mlm_logits
from moe_embed_jax.tokenizers.vocabulary import Vocabulary

LENGTH = 128
MODEL = EncoderConfig(
    vocab_size=512,
    num_layers=2,
    width=32,
    num_heads=2,
    ffn_width=48,
    moe_every=0,
    initializer_range=0.3,  # far from guessing evenly
)


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    monkeypatch.setattr(pseudo_perplexity, "ROW_LENGTH", LENGTH)


@pytest.fixture(scope="module")
def masked_model(data_dir):
    vocabulary = Vocabulary.load(vocabulary_path(synthetic_data.DOCUMENTS_PREPARATION, data_dir))
    params = init_params(MODEL, jax.random.key(0))
    head = init_mlm_head(MODEL, jax.random.key(1), vocabulary.size)
    return MaskedModel(MODEL, params, head, vocabulary, single_device_mesh())


@jax.jit
def log_softmax_of_row(params, head, token_RL, text_index_RL, position_RL):
    x_RLD, _ = encode_tokens(MODEL, params, token_RL, text_index_RL, position_RL)
    return jax.nn.log_softmax(mlm_logits(MODEL, head, params["embeddings"]["token"], x_RLD[0]))


def log_probabilities(model: MaskedModel, ids) -> np.ndarray:
    """[L, V] of one text alone."""
    arrays = np.zeros((3, 1, LENGTH), np.int32)
    arrays[0, 0, : len(ids)] = ids
    arrays[1, 0, len(ids) :] = -1
    arrays[2, 0] = np.arange(LENGTH)
    with jax.set_mesh(model.mesh):
        return np.asarray(log_softmax_of_row(model.params, model.head, *arrays))[: len(ids)]


def test_every_token_is_hidden_once_and_scored_from_the_others(masked_model):
    vocabulary = masked_model.vocabulary
    texts = [*synthetic_data.documents("aa", 3, seed=9), "kebi", "kebi \u4e00\u4e01 " * 4]
    loss, correct, count = 0.0, 0, 0
    for text in texts:
        ids = vocabulary.encode_text(text, LENGTH)
        if len(ids) - 2 < PASSES:
            continue
        seen = np.zeros(len(ids), int)
        for offset in range(PASSES):
            hidden = np.arange(1 + offset, len(ids) - 1, PASSES)
            hidden = hidden[ids[hidden] != vocabulary.unk_id]
            seen[hidden] += 1
            copy = ids.copy()
            copy[hidden] = vocabulary.mask_id
            found = log_probabilities(masked_model, copy)[hidden]
            loss -= found[np.arange(len(hidden)), ids[hidden]].sum()
            correct += (found.argmax(1) == ids[hidden]).sum()
            count += len(hidden)
        assert set(seen[1:-1][ids[1:-1] != vocabulary.unk_id]) == {1}
    result = masked_model.pseudo_perplexity(texts)
    assert result["tokens"] == count > 100
    assert result["perplexity"] == pytest.approx(np.exp(loss / count), rel=1e-4)
    assert result["accuracy"] == pytest.approx(correct / count)
    assert masked_model.pseudo_perplexity(["kebi", ""]) is None


def test_enough_documents_are_enough(masked_model, monkeypatch):
    texts = synthetic_data.documents("bb", 40, seed=9)
    monkeypatch.setattr(pseudo_perplexity, "TOKENS", 300)
    first = masked_model.pseudo_perplexity(texts)
    assert 200 < first["tokens"] < 600
    assert masked_model.pseudo_perplexity(texts + texts[:5]) == first


def test_guesses_are_the_most_probable_tokens(masked_model):
    vocabulary = masked_model.vocabulary
    sequences = [vocabulary.encode_text(t, 64) for t in synthetic_data.documents("cc", 3, seed=9)]
    columns = [len(ids) // 2 for ids in sequences]
    id_RN, probability_RN = masked_model.fill_mask(sequences, columns, best=4)
    for i, (ids, column) in enumerate(zip(sequences, columns, strict=True)):
        copy = ids.copy()
        copy[column] = vocabulary.mask_id
        expected = np.exp(log_probabilities(masked_model, copy)[column])
        np.testing.assert_array_equal(id_RN[i], np.argsort(-expected)[:4])
        np.testing.assert_allclose(probability_RN[i], np.sort(expected)[::-1][:4], rtol=1e-4)


def test_documents_come_from_all_sources_in_turn(tmp_path):
    with gzip.open(tmp_path / "xx.jsonl.gz", "wt") as file:
        for source, text in (("a", "1"), ("a", "2"), ("a", "3"), ("b", "4")):
            file.write(json.dumps({"source": source, "text": text}) + "\n")
    assert load_documents(tmp_path) == {"xx": ["1", "4", "2", "3"]}
    with pytest.raises(UserError, match="holds no held-out documents"):
        load_documents(tmp_path / "nothing")
