"""The adapter to MTEB: tasks in memory through `mteb.evaluate`, against our own evaluation, which a
training run uses, and against oracles."""

import dataclasses
import json
import re
import socket
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from helpers import synthetic_data

from moe_embed_jax import Embedder
from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.heldout import evaluate_heldout, load_heldout
from moe_embed_jax.evaluation.retrieval import METRICS, score_run
from moe_embed_jax.model_folder import PROMPTS, LoadedModel, save_model, with_document
from moe_embed_jax.models.encoder import EncoderConfig, init_params
from moe_embed_jax.tokenizers.vocabulary import Vocabulary

MODEL = EncoderConfig(
    vocab_size=512, num_layers=2, width=32, num_heads=2, ffn_width=48, num_experts=4
)
LENGTHS = {"query": 16, "document": 64}
QUERIES, DOCUMENTS = ("search_query: ", 16), ("search_document: ", 64)
PAIRS = synthetic_data.pairs("descriptions", "bb", 70, seed=5)  # more than MTEB's batch of 32
FIRST, SECOND = map(list, zip(*PAIRS, strict=True))
GOLD = np.random.default_rng(0).permutation(len(PAIRS)) / 14.0


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    vocabulary = Vocabulary.load(vocabulary_path(synthetic_data.PREPARATION, data_dir))
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    folder = tmp_path_factory.mktemp("models") / "model"
    save_model(folder, LoadedModel(MODEL, params, None, vocabulary, PROMPTS, LENGTHS), "test")
    return folder


@pytest.fixture(scope="module")
def embedder(folder):
    return Embedder.load(folder)


@pytest.fixture(scope="module")
def local():
    """helpers/mteb_tasks.py. A fixture, so that only these tests wait for the import of mteb."""
    pytest.importorskip("mteb", reason="needs mteb (pip install -e .[mteb])")
    from helpers import mteb_tasks

    return mteb_tasks


@pytest.fixture
def sts(local):
    return local.sts_task(FIRST, SECOND, GOLD)


@pytest.fixture
def make(local, embedder):
    from moe_embed_jax.evaluation.mteb_model import MtebModel

    return lambda **options: MtebModel(**{"embedder": embedder, "name": "tests/tiny", **options})


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    attempts = []

    def refuse(*arguments, **_):
        attempts.append(arguments)
        raise OSError("tests have no network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not attempts


@pytest.fixture
def tokenised(local, embedder, monkeypatch):
    """Calls of the tokenizer; a model that is made later adds empty ones."""
    spy = local.SpyVocabulary(embedder.vocabulary)
    monkeypatch.setattr(embedder, "vocabulary", spy)
    return spy.calls


### Scores


def test_retrieval_scores_are_those_of_a_training_run(
    make, local, embedder, data_dir, tmp_path, monkeypatch
):
    held_out = load_heldout(data_dir)
    sets = {
        name.replace("/", "-"): held_out[name] for name in ("descriptions/aa", "descriptions/cc")
    }
    sets["graded"] = local.graded_set(FIRST, SECOND)
    model = make()
    calls = []
    original = Embedder.encode

    def encode(self, texts, prompt="query", dim=None, **options):
        calls.append((prompt, dim, set(texts)))
        return original(self, texts, prompt=prompt, dim=dim, **options)

    monkeypatch.setattr(Embedder, "encode", encode)
    expected = evaluate_heldout(embedder, sets)  # what evaluation.HeldOutRetrieval calls
    own_calls = calls.copy()
    calls.clear()
    scores = local.evaluate(model, local.retrieval_task(sets), prediction_folder=tmp_path)
    runs = json.loads((tmp_path / "LocalRetrieval_predictions.json").read_text())

    # The same texts reach the same method with the same prompts.
    for prompt, dim, texts in own_calls:
        mine = [each for each in calls if each[:2] == (prompt, dim)]
        assert len(mine) == len(sets) and set.union(*(each[2] for each in mine)) == texts
    assert len(calls) == 2 * len(sets)
    # The same scores. MTEB rounds its own to 5 decimals, the rankings that it keeps are exact.
    assert scores.keys() == expected.keys()
    for name, metrics in expected.items():
        for metric in METRICS:
            assert scores[name][metric] == pytest.approx(metrics[metric], abs=5.001e-6)
        ranked = score_run(sets[name], local.ranking(sets[name], runs[name]["test"]))
        assert ranked == pytest.approx(metrics, abs=1e-6)
    values = [metrics["ndcg_at_10"] for metrics in expected.values()]
    assert 0.1 < np.mean(values) < 0.9  # something that could differ


def ranks(values) -> np.ndarray:
    return np.argsort(np.argsort(values))


@pytest.mark.parametrize("dim", [None, 8])
def test_sts_correlations(make, local, sts, embedder, dim):
    (scores,) = local.evaluate(make(dim=dim), sts).values()
    x_BD, y_BD = (embedder.encode(texts, "document", dim=dim) for texts in (FIRST, SECOND))
    cosines = (x_BD * y_BD).sum(axis=1)
    assert len(set(cosines)) == len(cosines)  # no ties
    spearman = np.corrcoef(ranks(cosines), ranks(GOLD))[0, 1]
    assert scores["cosine_spearman"] == pytest.approx(spearman, abs=1e-6)
    assert scores["spearman"] == pytest.approx(spearman, abs=1e-6)  # by `similarity_pairwise`
    assert scores["pearson"] == pytest.approx(np.corrcoef(cosines, GOLD)[0, 1], abs=1e-5)


def test_bitext_mining_f1(make, local, embedder):
    (scores,) = local.evaluate(make(), local.bitext_task(FIRST, SECOND)).values()
    x_BD, y_BD = (embedder.encode(texts, "document") for texts in (FIRST, SECOND))
    nearest = (x_BD @ y_BD.T).argmax(axis=1)
    hits = nearest == np.arange(len(PAIRS))
    # Every document is a class of one text: recall 0 or 1, precision shared by all who chose it.
    precision = hits / np.maximum(np.bincount(nearest, minlength=len(PAIRS)), 1)
    f1 = np.mean(2 * precision * hits / np.maximum(precision + hits, 1e-9))
    assert 0.1 < f1 < 0.95
    assert scores["f1"] == pytest.approx(f1, abs=1e-6)
    assert scores["accuracy"] == pytest.approx(hits.mean(), abs=1e-6)


def test_classification_accuracy(make, local, embedder):
    labels = np.array([len(text.split()) > 5 for text in SECOND], int)
    parts = np.arange(0, len(PAIRS), 2), np.arange(1, len(PAIRS), 2)
    columns = [
        {"text": [SECOND[i] for i in part], "label": labels[part].tolist()} for part in parts
    ]
    (scores,) = local.evaluate(make(), local.classification_task(*columns, experiments=3)).values()
    x_BD = embedder.encode(SECOND, "document")
    train, test = [(x_BD[part], labels[part]) for part in parts]
    accuracy = local.probe_accuracy(train, test, experiments=3)
    assert scores["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert 0.3 < accuracy < 1


### Prompts


def test_prompts_reach_the_tokenizer_and_texts_come_all_at_once(make, local, tokenised):
    model = make()
    tokenised.clear()
    local.evaluate(model, local.retrieval_task({"graded": local.graded_set(FIRST, SECOND)}))
    assert tokenised == [
        ([QUERIES[0] + text for text in FIRST], QUERIES[1]),
        ([DOCUMENTS[0] + text for text in SECOND], DOCUMENTS[1]),
    ]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (None, DOCUMENTS),
        ({"STS": "query"}, QUERIES),
        ({"STS": None}, ("", 64)),
        ({"STS": "meaning: "}, ("meaning: ", 64)),
        ({"BitextMining": "query"}, DOCUMENTS),  # another type
    ],
)
def test_a_table_of_prompts(make, local, sts, tokenised, prompts, expected):
    model = make(prompts=prompts)
    tokenised.clear()
    local.evaluate(model, sts, encode_kwargs={"batch_size": 7})
    prefix, limit = expected
    assert tokenised == [([prefix + text for text in side], limit) for side in (FIRST, SECOND)]


def test_the_more_specific_prompt_decides(make, local):
    import mteb
    from mteb.types import PromptType

    def prompts(model, kind):
        metadata = kind if not isinstance(kind, str) else local.describe(kind, "main")
        return [model.prompt_for(metadata, side) for side in (None, *PromptType)]

    plain = make()
    assert prompts(plain, "Reranking") == ["document", "query", "document"]
    for kind in ("Classification", "Clustering", "PairClassification", "BitextMining", "STS"):
        assert prompts(plain, kind) == ["document"] * 3
    assert prompts(plain, "ZeroShotClassification")[0] == "document"  # not in the table
    changed = make(prompts={"Reranking": "a: ", "Reranking-query": "b: ", "STS12": "query"})
    assert prompts(changed, "Reranking") == ["a: ", "b: ", "a: "]
    assert prompts(changed, "STS")[0] == "document"
    assert prompts(changed, mteb.get_task("STS12").metadata)[0] == "query"


def test_prompts_of_the_models_own_folder(make, local, embedder):
    published = {  # some of nomic-embed-text-v2-moe's
        "query": "search_query: ",
        "passage": "search_document: ",
        "Clustering": "clustering: ",
        "STS": "classification: ",
        "Speed": "search_document: ",  # no task type of MTEB
    }
    arguments = (MODEL, embedder.params, embedder.vocabulary, LENGTHS, embedder.mesh)
    other = Embedder(*arguments, with_document(published))
    model = make(embedder=other)
    assert (model.prompts["STS"], model.prompts["BitextMining"]) == ("STS", "document")
    assert not {"passage", "Speed"} & model.prompts.keys()
    x_BD = other.encode(FIRST, "classification: ")
    np.testing.assert_allclose(local.encode(model, FIRST), x_BD, atol=1e-6)
    assert make(embedder=other, prompts={"STS": "query"}).prompts["STS"] == "query"


### Embeddings


def test_embeddings_are_the_embedders(make, embedder, local, capsys):
    for dim in (None, 8):
        x_BD = local.encode(make(dim=dim), FIRST)
        assert x_BD.dtype == np.float32 and x_BD.shape == (len(FIRST), dim or 32)
        np.testing.assert_array_equal(x_BD, embedder.encode(FIRST, "document", dim=dim))
    assert local.encode(make(), []).shape == (0, 32)
    assert capsys.readouterr().err == ""
    local.encode(make(), FIRST, show_progress_bar=True)
    assert "embedding" in capsys.readouterr().err


def test_similarity_is_the_cosine(make):
    from mteb.models import EncoderProtocol

    x_BD, y_ND = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    x_BD, y_ND = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x_BD, y_ND))
    model = make()
    assert isinstance(model, EncoderProtocol)
    np.testing.assert_allclose(model.similarity(x_BD, y_ND[:3]), x_BD @ y_ND[:3].T, atol=1e-6)
    pairwise = model.similarity_pairwise(x_BD, y_ND)
    np.testing.assert_allclose(pairwise, (x_BD * y_ND).sum(axis=1), atol=1e-6)


### What MTEB files


def test_metadata_is_what_is_known(make, embedder):
    meta = make(dim=8).mteb_model_meta
    sizes = [leaf.size for leaf in jax.tree.leaves(embedder.params)]
    idle = 2 * (2 * MODEL.width + MODEL.expert_bias) * MODEL.ffn_width  # 2 of 4 experts, 1 layer
    word_table = 512 * 32
    assert (meta.n_parameters, meta.n_embedding_parameters) == (sum(sizes), word_table)
    assert meta.n_active_parameters == sum(sizes) - word_table - idle
    assert meta.memory_usage_mb == pytest.approx(sum(sizes) * 4 / 2**20)
    assert (meta.embed_dim, meta.max_tokens, meta.name) == (8, 64, "tests/tiny")
    assert meta.use_instructions and meta.framework == ["JAX"] and meta.loader is None
    unknown = ("languages", "license", "training_datasets", "release_date", "open_weights")
    assert all(getattr(meta, field) is None for field in unknown)
    json.dumps(meta.to_dict(), default=str)


def test_metadata_of_a_dense_model(make, embedder):
    dense = dataclasses.replace(MODEL, moe_every=0)
    shapes = jax.eval_shape(lambda: init_params(dense, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    no_prompts = {"query": "", "document": ""}
    other = Embedder(dense, params, embedder.vocabulary, LENGTHS, embedder.mesh, no_prompts)
    meta = make(embedder=other).mteb_model_meta
    assert meta.n_active_parameters == meta.n_parameters - meta.n_embedding_parameters
    assert meta.n_active_parameters_override is None and not meta.use_instructions


def test_the_revision_is_what_decides_the_embeddings(make, embedder):
    def revision(**options):
        return make(**options).mteb_model_meta.revision

    params = jax.tree.map(lambda leaf: leaf.copy(), embedder.params)
    params["embeddings"]["token"] = params["embeddings"]["token"].at[7, 7].add(1e-3)
    arguments = (MODEL, embedder.params, embedder.vocabulary, LENGTHS, embedder.mesh)
    same = Embedder(*arguments)
    other = Embedder(MODEL, params, *arguments[2:])
    longer = Embedder(*arguments[:3], {"query": 16, "document": 65}, embedder.mesh)
    base = revision()
    assert base == revision(embedder=same) == revision(name="a/b") == revision(dim=8)
    assert re.fullmatch("[0-9a-f]{64}", base)
    changed = [revision(embedder=other), revision(embedder=longer), revision(prompts={"STS": None})]
    assert len({base, *changed}) == 4


def test_kept_results_belong_to_one_model(make, local, sts, tokenised, tmp_path):
    import mteb

    cache = mteb.ResultCache(tmp_path)
    variants = [{}, {"dim": 8}, {"dim": 16}, {"prompts": {"STS": "query"}}]
    models = [make(**options) for options in variants]
    tokenised.clear()
    first = [local.evaluate(model, sts, cache)["default"]["spearman"] for model in models]
    assert len(set(first)) == len(variants) and len(tokenised) == 2 * len(variants)
    again = [local.evaluate(model, sts, cache)["default"]["spearman"] for model in models]
    assert again == pytest.approx(first, abs=1e-6) and len(tokenised) == 2 * len(variants)
    files = [*(tmp_path / "results" / "tests__tiny").rglob("LocalSTS.json")]
    assert len(files) == len(variants)
    revision = models[0].mteb_model_meta.revision
    (plain,) = [file.parent for file in files if file.parent.name == revision]
    saved = json.loads((plain / "model_meta.json").read_text())
    assert saved["name"] == "tests/tiny" and saved["revision"] == revision


### Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompts={"Sts": "query"}), r"prompts\['Sts'\]: choose query, document, one of"),
        (dict(prompts={"STS-passage": "query"}), r"prompts\['STS-passage'\]"),
        (dict(prompts={"STS": "passage"}), "prompt='passage': choose one of document, query"),
        (dict(dim=33), "dim=33 must be between 1 and the model's width 32"),
        (dict(dim=0), "dim=0 must be between"),
        (dict(name="tiny"), "name='tiny': MTEB files results under OWNER/MODEL"),
        (dict(name="/tiny"), "OWNER/MODEL"),
        (dict(name="a/b/c"), "OWNER/MODEL"),
    ],
)
def test_misuse(make, options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_a_model_without_a_tokenizer(make, embedder):
    bare = Embedder(MODEL, embedder.params, None, LENGTHS, embedder.mesh)
    with pytest.raises(UserError, match="has no tokenizer"):
        make(embedder=bare)


def test_quantised_embeddings_are_refused(make, local, sts):
    with pytest.raises(UserError, match="precision='int8': embeddings are float32"):
        local.evaluate(make(), sts, encode_kwargs={"precision": "int8"})
    assert local.encode(make(), FIRST[:2], precision="float32").dtype == np.float32


def test_without_mteb(monkeypatch):
    monkeypatch.delitem(sys.modules, "moe_embed_jax.evaluation.mteb_model", raising=False)
    monkeypatch.setitem(sys.modules, "mteb", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"needs mteb, .* pip install -e \.\[mteb\]"):
        import moe_embed_jax.evaluation.mteb_model  # noqa: F401


### The page


def test_the_example_of_the_page(local, sts, folder, tmp_path, monkeypatch):
    import mteb

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/mteb.md").read_text(), re.DOTALL)
    asked = []

    def get_tasks(tasks):
        asked.extend(tasks)
        return [sts, local.bitext_task(FIRST, SECOND)]

    for name in re.findall(r"tasks=\[(.*?)\]", code)[0].split(", "):
        mteb.get_task(name.strip('"'))  # MTEB has it
    monkeypatch.setattr(mteb, "get_tasks", get_tasks)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(folder)
    variables = {}
    exec(compile(code, "docs/mteb.md", "exec"), variables)
    assert len(asked) >= 1 and len(variables["results"].task_results) == 2
    assert [*tmp_path.rglob("LocalSTS.json")] and [*tmp_path.rglob("LocalBitextMining.json")]
