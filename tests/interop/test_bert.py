"""BERT and XLM-RoBERTa in: parity with transformers on random and on two real encoders."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from conftest import SHARED
from helpers.forked import run_forked

from moe_embed_jax import Embedder
from moe_embed_jax.conversion import export_model, import_model
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.published import open_published
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.model_folder import load_model, open_model
from moe_embed_jax.models.heads import mlm_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
st_folders = pytest.importorskip("helpers.st_folders")

SIZES = dict(
    vocab_size=99,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=40,
    initializer_range=0.3,
)


def make_batch(vocab_size, lengths=(17, 3, 9, 30)):
    rng = np.random.default_rng(3)
    ids = rng.integers(5, vocab_size, (len(lengths), max(lengths)))
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    return np.where(mask, ids, 1), mask  # 1: the padding id by which RoBERTa counts positions


def torch_hidden(model, ids, mask):
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    return out.last_hidden_state.numpy() * mask[..., None]


def randomised(model, seed=0):
    """transformers starts biases at 0 and norms at 1: parity could not see them swapped."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p += 0.2 * torch.randn(p.shape, generator=generator)
            assert name
    return model.eval()


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta"])
def test_parity_on_random_encoders(kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")(**SIZES, pad_token_id=1, type_vocab_size=2)
    model = randomised(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(tmp_path / "hf")
    ids, mask = make_batch(99)
    embedder = Embedder.load(tmp_path / "hf")
    expected = torch_hidden(model, ids, mask)
    np.testing.assert_allclose(embedder.hidden_states(ids, mask), expected, atol=1e-5)
    assert embedder.prompts == {"query": "", "document": ""}
    positions = 40 - 2 * (kind != "Bert")
    assert embedder.max_lengths["query"] == positions
    for said, length in ((512, positions), (16, 16)):  # what the folder says, within the table
        (tmp_path / "hf/sentence_bert_config.json").write_text(f'{{"max_seq_length": {said}}}')
        assert open_model(tmp_path / "hf").max_lengths == {"query": length, "document": length}

    # It leaves as BERT, which transformers loads without any code of ours.
    export_model(tmp_path / "hf", tmp_path / "out")
    again = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert type(again).__name__ == "BertModel"
    np.testing.assert_allclose(torch_hidden(again, ids, mask), expected, atol=1e-5)


def test_bert_tensors_survive_a_round_trip(tmp_path):
    from safetensors.numpy import load_file

    config = transformers.BertConfig(**SIZES, type_vocab_size=2)
    model = randomised(transformers.BertModel(config, add_pooling_layer=False))
    model.save_pretrained(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "out")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("hf", "out"))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


@pytest.fixture(scope="module")
def xlm_roberta(tmp_path_factory):
    config = transformers.XLMRobertaConfig(**SIZES, pad_token_id=1, type_vocab_size=1)
    model = randomised(transformers.XLMRobertaForMaskedLM(config))
    folder = tmp_path_factory.mktemp("xlmr") / "hf"
    model.save_pretrained(folder)
    return model, folder


def test_the_language_model_head_is_mapped(xlm_roberta):
    model, folder = xlm_roberta
    ids, mask = make_batch(99)
    with torch.no_grad():
        expected = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    loaded = load_model(folder, single_device_mesh())
    hidden = Embedder.load(folder).hidden_states(ids, mask)
    word_VD = loaded.params["embeddings"]["token"]
    logits = mlm_logits(loaded.model, loaded.mlm_head, word_VD, hidden.reshape(-1, 24))
    valid = mask.astype(bool)
    np.testing.assert_allclose(logits.reshape(*ids.shape, -1)[valid], expected[valid], atol=2e-5)


def test_xlm_roberta_becomes_the_rotary_encoder_of_stage_1(xlm_roberta, tmp_path):
    """Position table dropped, head mapped, vocabulary padded; all else as it was."""
    _, folder = xlm_roberta
    import_model(folder, tmp_path / "stage1")
    loaded = load_model(tmp_path / "stage1", single_device_mesh())
    assert (loaded.model.positions, loaded.model.max_positions) == ("rotary", 0)
    assert loaded.model.vocab_size == 128  # 99 padded to a multiple of 64
    exact, head = open_published(folder).read()
    word_VD = np.asarray(loaded.params["embeddings"]["token"])
    np.testing.assert_array_equal(word_VD[:99], exact["embeddings"]["token"])
    assert not word_VD[99:].any()
    bias_V = np.asarray(loaded.mlm_head["bias"])
    np.testing.assert_array_equal(bias_V[:99], head["bias"])
    assert (bias_V[99:] == -100).all()
    np.testing.assert_array_equal(loaded.mlm_head["dense"]["kernel"], head["dense"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, loaded.params["groups"], exact["groups"])

    # The same weights in PyTorch's rotary encoder give the same states.
    export_model(tmp_path / "stage1", tmp_path / "out")
    rotary = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids, mask = make_batch(99)
    ours = Embedder.load(tmp_path / "stage1").hidden_states(ids, mask)
    np.testing.assert_allclose(torch_hidden(rotary.eval(), ids, mask), ours, atol=1e-5)


def test_xlm_roberta_without_its_head_must_be_told(tmp_path):
    config = transformers.XLMRobertaConfig(**SIZES, pad_token_id=1, type_vocab_size=1)
    transformers.XLMRobertaModel(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=r"say --positions=learned .* or --positions=rotary"):
        import_model(tmp_path / "hf", tmp_path / "a")
    import_model(tmp_path / "hf", tmp_path / "b", positions="learned")
    assert Embedder.load(tmp_path / "b").model.max_positions == 38


def test_an_untied_head_is_refused(xlm_roberta, tmp_path):
    from safetensors.numpy import load_file, save_file

    _, folder = xlm_roberta
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.decoder.weight"] = tensors["roberta.embeddings.word_embeddings.weight"] + 1
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.decoder\.weight is not tied"):
        Embedder.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling max: only one of"),
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "pooling weightedmean: only"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            r"pooling cls \+ mean: only one of",
        ),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt=false"),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "module Dense is not"),
        ("modules.json", "{", "modules.json is not JSON"),
        ("config.json", {"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
    ],
)
def test_models_that_would_load_wrongly_are_refused(file, content, message, tmp_path):
    config = transformers.BertConfig(**SIZES)
    transformers.BertModel(config).save_pretrained(tmp_path)
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    if file == "config.json":
        content = json.loads((tmp_path / file).read_text()) | content
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        Embedder.load(tmp_path)


@pytest.mark.parametrize("pad_id", [0, 1, 3])
def test_positions_start_behind_the_pad_token(pad_id, tmp_path):
    """In, and out again as BERT."""
    plain = tmp_path / "plain"
    model = st_folders.save_encoder(
        plain, "XLMRoberta", vocab_size=99, pad_token_id=pad_id, max_position_embeddings=20
    )
    ids = np.random.default_rng(0).integers(5, 99, (3, 9))
    mask = (np.arange(9) < np.array([[9], [4], [1]])).astype(int)
    ids = np.where(mask, ids, pad_id)
    with torch.no_grad():
        states = model(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
    embedder = Embedder.load(plain)
    assert embedder.model.max_positions == 20 - pad_id - 1
    expected = states * mask[..., None]
    np.testing.assert_allclose(embedder.hidden_states(ids, mask), expected, atol=1e-5)
    export_model(plain, tmp_path / "exported")
    again = Embedder.load(tmp_path / "exported")
    np.testing.assert_allclose(again.hidden_states(ids, mask), expected, atol=1e-5)


### Real weights


TEXTS = [
    "How do I set the volume?",
    "Wie stelle ich die Lautstärke ein? " * 6,
    "音量を調整する方法を教えてください。",
    "",
    "query: Москва — столица России.",
]


@pytest.mark.network
@pytest.mark.parametrize("name", ["minilm", "e5_small"])
def test_parity_on_real_encoders(name, request):
    folder = request.getfixturevalue(name)
    embedder = Embedder.load(folder)
    sequences = embedder.tokenize(TEXTS, None)
    mask = np.arange(max(map(len, sequences))) < np.array([len(s) for s in sequences])[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate(sequences)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    expected = torch_hidden(model, ids, mask.astype(np.int64))
    hidden = embedder.hidden_states(ids, mask)
    print(f"{name}: max-abs {np.abs(hidden - expected).max():.2e}")
    np.testing.assert_allclose(hidden, expected, atol=1e-4)
    pooled = expected.sum(1) / mask.sum(1, keepdims=True)
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(embedder.encode(TEXTS, None), unit, atol=1e-5)


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is None, reason="optional")
def test_minilm_as_sentence_transformers(minilm):
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(minilm), device="cpu").encode(TEXTS, show_progress_bar=False)
    np.testing.assert_allclose(Embedder.load(minilm).encode(TEXTS, None), expected, atol=1e-5)


def every_fifth_question(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    import gzip

    target.mkdir(parents=True)
    for name in ("corpus.jsonl.gz", "qrels.tsv.gz"):
        (target / name).write_bytes((source / name).read_bytes())
    with gzip.open(source / "queries.jsonl.gz", "rt") as file:
        lines = file.readlines()
    with gzip.open(target / "queries.jsonl.gz", "wt") as file:
        file.writelines(lines[::5])
    return target


@pytest.mark.network
@pytest.mark.slow
def test_e5_small_finds_the_paragraphs_of_xquad(e5_small, tmp_path):
    """nDCG@10 on every fifth German question, as transformers' BertModel: 0.957."""
    questions = every_fifth_question(SHARED / "data/xquad/de", tmp_path / "de")
    result = run_forked(
        [
            "launch/evaluate.py",
            f"--model={e5_small}",
            f"--dataset={questions}",
            f"--output={tmp_path / 'results.json'}",
            "--query_prompt=query: ",
            "--document_prompt=passage: ",
        ],
        timeout=800,
        XLA_FLAGS="",  # a minute of computing, which the compiler's optimisations halve
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    np.testing.assert_allclose(results["de"]["ndcg_at_10"], 0.9566, atol=5e-4)
