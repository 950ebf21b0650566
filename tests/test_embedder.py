import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import run_python
from helpers import synthetic_data

from moe_embed_jax import Embedder
from moe_embed_jax import embedder as embedder_module
from moe_embed_jax.checkpoint import Checkpoints
from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.errors import UserError
from moe_embed_jax.model_folder import PROMPTS
from moe_embed_jax.models.encoder import EncoderConfig, encode_tokens, init_params
from moe_embed_jax.tokenizers.truncation import Truncation
from moe_embed_jax.tokenizers.vocabulary import Vocabulary

MODEL = EncoderConfig(
    vocab_size=512, num_layers=2, width=32, num_heads=2, ffn_width=48, num_experts=4
)
TEXTS = ["tanara nobipo", "situno", "", "kapehu rameku jikiki gapehu " * 40, "нет 你好 \ud800"]
TEXTS += ["x" * 999]
LENGTHS = {"query": 16, "document": 64}
encode_one_row = jax.jit(encode_tokens, static_argnums=0)


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    card = {
        "model": dataclasses.asdict(MODEL),
        "data": {f"{name}_length": length for name, length in LENGTHS.items()},
    }
    (folder / "config.json").write_text(json.dumps(card))
    source = vocabulary_path(synthetic_data.PREPARATION, data_dir)
    (folder / "sentencepiece.model").write_bytes(source.read_bytes())
    checkpoints = Checkpoints(folder / "checkpoints")
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    spec = {"store": {"vocabulary": {"sha256": Vocabulary.load(source).content_hash}}}
    checkpoints.save(1, spec, params=params, optimizer={"step": np.zeros(1)})
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def embedder(folder):
    return Embedder.load(folder)


def test_a_changed_vocabulary_of_the_same_size(folder, data_dir, tmp_path):
    other = vocabulary_path(synthetic_data.DOCUMENTS_PREPARATION, data_dir)
    assert Vocabulary.load(other).size == MODEL.vocab_size
    shutil.copytree(folder, tmp_path / "model")
    shutil.copy(other, tmp_path / "model" / "sentencepiece.model")
    with pytest.raises(UserError, match=r"the tokenizer in .*model was changed: its SHA-256 is"):
        Embedder.load(tmp_path / "model")


def reference(embedder, texts, prompt: str) -> np.ndarray:
    """Embeddings by the definition: each text alone in a padded row, mean over tokens, norm 1."""
    result = []
    for text in texts:
        ids = embedder.vocabulary.encode_text(PROMPTS[prompt] + text, LENGTHS[prompt])
        length = len(ids)
        token_RL, text_index_RL = np.zeros((1, 64), np.int32), np.full((1, 64), -1, np.int32)
        token_RL[0, :length], text_index_RL[0, :length] = ids, 0
        position_RL = np.arange(64, dtype=np.int32)[None]
        with jax.set_mesh(embedder.mesh):
            x_RLD, _ = encode_one_row(MODEL, embedder.params, token_RL, text_index_RL, position_RL)
        mean_D = np.asarray(x_RLD[0, :length]).mean(axis=0)
        result.append(mean_D / np.linalg.norm(mean_D))
    return np.stack(result)


def assert_distinct(embeddings) -> None:
    """Far above the tolerances here, so that equality with a reference says something."""
    distance_NN = np.linalg.norm(embeddings[:, None] - embeddings, axis=-1)
    assert distance_NN[~np.eye(len(embeddings), dtype=bool)].min() > 1e-2


@pytest.mark.parametrize("prompt", ["query", "document"])
def test_each_text_in_its_place_as_if_it_were_alone(embedder, prompt):
    expected = reference(embedder, TEXTS, prompt)
    assert_distinct(expected)
    embeddings = embedder.encode(TEXTS, prompt)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(embedder.encode([text], prompt)[0], expected[i], atol=1e-5)
    order = [3, 0, 5, 1]
    shuffled = embedder.encode([TEXTS[i] for i in order], prompt)
    np.testing.assert_allclose(shuffled, expected[order], atol=1e-5)


def test_batch_size_limits_the_texts_of_a_call_and_changes_nothing_else(embedder, monkeypatch):
    sizes = []
    run = Embedder._run
    monkeypatch.setattr(Embedder, "_run", lambda *a: (sizes.append(len(a[1].members)), run(*a))[1])
    one = embedder.encode(TEXTS * 5, "query", batch_size=3)
    assert sum(sizes) == 30 and max(sizes) == 3
    np.testing.assert_allclose(one, np.tile(reference(embedder, TEXTS, "query"), (5, 1)), atol=1e-5)


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
    words = " ".join(synthetic_data._word(i, "aa") for i in range(200))
    for prompt, length in ((None, 64), ("note: ", 64), *LENGTHS.items()):
        prefix = embedder.prefix(prompt)
        (ids,) = embedder.tokenize([words], prompt)
        assert ids.tolist() == [
            embedder.vocabulary.bos_id,
            *embedder.vocabulary.encode(prefix + words)[: length - 2],
            embedder.vocabulary.eos_id,
        ]
    for prompt in LENGTHS:
        expected = reference(embedder, [words], prompt)
        np.testing.assert_allclose(embedder.encode([words], prompt), expected, atol=1e-5)


def test_truncation_is_told_once_counted_or_refused(embedder, capsys):
    embedder.truncation = Truncation()
    words = " ".join(synthetic_data._word(i, "aa") for i in range(200))
    texts = ["short", words, "", words + " tail"]
    prefix, limit = embedder.prefix("document"), LENGTHS["document"]
    whole = [len(embedder.vocabulary.encode(prefix + text)) + 2 for text in texts]
    cut = [max(length - limit, 0) for length in whole]
    assert [n > 0 for n in cut] == [False, True, False, True]
    line = (
        f"document: 2 of 4 texts are longer than {limit} tokens: {sum(cut):,} of {sum(whole):,} "
        f"tokens ({sum(cut) / sum(whole):.1%}) are cut off"
    )
    first = embedder.encode(texts, "document")
    assert capsys.readouterr().err == f"warning: {line}\n"
    np.testing.assert_array_equal(embedder.encode(texts, "document"), first)
    assert capsys.readouterr().err == ""
    counts = embedder.truncation.sides["document"]
    assert dataclasses.astuple(counts) == (limit, 8, 2 * sum(whole), 4, 2 * sum(cut))
    ignored = embedder.encode(texts, "document", on_truncation="ignore")
    np.testing.assert_array_equal(ignored, first)
    assert counts.texts == 8
    with pytest.raises(UserError) as error:
        embedder.encode(texts, "document", on_truncation="error")
    assert str(error.value) == f"{line} (the first is texts[1]): shorten them"
    # A text that just fits is not cut.
    fits = embedder.vocabulary.decode(embedder.vocabulary.encode(words)[:5])
    embedder.encode([fits, ""], "document", on_truncation="error")
    with pytest.raises(UserError, match="on_truncation='stop': choose one of warn, error, ignore"):
        embedder.encode(texts, "document", on_truncation="stop")


def test_a_megabyte_of_text_is_its_beginning(embedder):
    beginning = "tanara nobipo situno " * 50
    long = [beginning * 1000, beginning + "x" * 1_000_000]
    expected = reference(embedder, [beginning], "document")
    embeddings = embedder.encode(long, "document")
    np.testing.assert_allclose(embeddings, np.repeat(expected, 2, axis=0), atol=1e-5)


def test_dim_cuts_then_normalises(embedder):
    full = reference(embedder, TEXTS[:2], "query")
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


def test_identity_is_what_decides_the_embeddings(embedder):
    query, document = embedder.identity("query"), embedder.identity("document")
    assert query == {
        "hash": query["hash"],
        "prefix": PROMPTS["query"],
        "max_length": LENGTHS["query"],
    }
    changes = {"prefix": PROMPTS["document"], "max_length": LENGTHS["document"]}
    assert document == query | changes
    other = jax.tree.map(lambda leaf: leaf, embedder.params)
    other["embeddings"]["token"] = other["embeddings"]["token"].at[7, 0].add(0.125)
    other = Embedder(MODEL, other, embedder.vocabulary, embedder.max_lengths, embedder.mesh)
    assert other.identity("query")["hash"] != query["hash"]


def test_expert_shares_count_the_choices_of_every_token(embedder):
    for prompt in LENGTHS:
        shares = embedder.expert_shares(TEXTS, prompt)
        choices = np.concatenate(embedder.expert_choices(TEXTS, prompt), axis=1)
        tokens = sum(len(ids) for ids in embedder.tokenize(TEXTS, prompt))
        assert choices.shape == (1, tokens, 2)
        counts = np.bincount(choices.ravel(), minlength=4)
        assert shares.shape == (1, 4)
        np.testing.assert_allclose(shares[0], counts / (2 * tokens), rtol=1e-6)
    assert np.ptp(shares) > 0.01  # not the same for all experts, whatever is counted
    np.testing.assert_array_equal(embedder.expert_shares(TEXTS), shares)  # "document" unless said


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


def test_a_second_process_finds_the_programs_that_the_first_has_kept(folder, tmp_path):
    """Told by JAX's own counters."""
    script = f"""
import jax, numpy as np
counted = []
jax.monitoring.register_event_listener(lambda event, **_: counted.append(event))
from moe_embed_jax import Embedder
embedder = Embedder.load({str(folder)!r}, compilation_cache={str(tmp_path / "programs")!r})
vectors = embedder.encode(["tanara nobipo"])
kept = "/jax/compilation_cache/"
print(counted.count(kept + "cache_hits"), counted.count(kept + "cache_misses"), vectors.sum())
"""
    hits, misses, total = run_python(["-c", script]).stdout.split()
    kept = sorted(file.name for file in (tmp_path / "programs").glob("*-cache"))
    assert int(hits) == 0 and int(misses) == len(kept) > 0
    assert any(name.startswith("jit__pool_rows-") for name in kept)
    assert run_python(["-c", script]).stdout.split() == [misses, "0", total]
    assert sorted(file.name for file in (tmp_path / "programs").glob("*-cache")) == kept


def test_programs_cannot_be_kept_in_a_file(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"compilation_cache=.*file is a file: name a folder"):
        Embedder.load(folder, compilation_cache=tmp_path / "file")
    with pytest.raises(UserError, match=r"compilation_cache=.*file/x cannot be made: Not a dir"):
        Embedder.load(folder, compilation_cache=tmp_path / "file" / "x")
