"""The card of an export: front matter for the hub, what runtimes do with it, MTEB's entry."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from moe_embed_jax import conversion
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.card_config import CardConfig
from moe_embed_jax.interop.card_results import mteb_scores, run_scores
from moe_embed_jax.interop.gguf import gguf_facts
from moe_embed_jax.interop.model_card import Exported, model_card
from moe_embed_jax.interop.prompts import SYMMETRIC_TYPES, exported_prompts
from moe_embed_jax.models.encoder import EncoderConfig

MODEL = EncoderConfig(
    vocab_size=64, num_layers=2, width=16, num_heads=2, ffn_width=24, num_experts=4
)
PROMPTS = exported_prompts({"query": "search_query: ", "document": "search_document: "})
CARD = CardConfig(
    name="me/small",
    license="apache-2.0",
    languages="en, sw",
    base_model="nomic-ai/nomic-embed-text-v2-moe",
    datasets="me/pairs,you/pairs",
    tags="search",
    mteb_datasets="MIRACLRetrieval, NQ",
)
SCORES = [
    {
        "task_type": "information-retrieval",
        "dataset_type": "held-out/api",
        "dataset_name": "api, held out, mean of 2 languages",
        "metric_type": "ndcg_at_10",
        "metric_value": 0.5,
    }
]


def test_front_matter_is_what_the_hub_reads():
    exported = Exported(MODEL, PROMPTS, 512, scores=SCORES)
    data = ModelCard(model_card(exported, CARD)).data
    assert (data.license, data.language) == ("apache-2.0", ["en", "sw"])
    assert data.base_model == "nomic-ai/nomic-embed-text-v2-moe"
    assert data.datasets == ["me/pairs", "you/pairs"] and data.metrics == ["ndcg_at_10"]
    assert (data.library_name, data.pipeline_tag) == (
        "sentence-transformers",
        "sentence-similarity",
    )
    assert {"mixture-of-experts", "custom_code", "search"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_value) == (SCORES[0]["dataset_name"], 0.5)
    bare = ModelCard(model_card(Exported(MODEL, PROMPTS, 512), CardConfig())).data
    assert (bare.license, bare.language, bare.base_model) == (None, None, None)
    assert bare.eval_results is None


def test_what_a_user_needs_is_said():
    text = model_card(Exported(MODEL, PROMPTS, 512, (16, 8), onnx=["model.onnx"]), CARD)
    for words in (
        "| `search_query: ` | query |\n| `search_document: ` | passage, document, BitextMining, ",
        "Servers add none",
        "cut at 512 tokens",
        "trained widths: 16, 8",
        'SentenceTransformer("me/small", trust_remote_code=True)',
        'backend="onnx"',
        "vllm serve me/small --trust-remote-code --dtype bfloat16`",
        "a token uses 5,800",
        "Ollama: wrong vectors",
    ):
        assert words in text, words
    bert = EncoderConfig(
        vocab_size=64, num_layers=2, width=16, num_heads=2, ffn_width=24, moe_every=0,
        positions="learned", max_positions=32,
    )  # fmt: skip
    nothing = exported_prompts({"query": "", "document": ""})
    text = model_card(Exported(bert, nothing, 32, is_bert=True), CardConfig())
    assert "the model has no prefixes" in text and "trust" not in text


@pytest.mark.parametrize(
    ("change", "bias", "words"),
    [
        ({}, 0.02, r"not exact.*root mean square 0\.02 .*--drop_expert_output_bias"),
        ({}, 0.0, r"GGUF: exact.*transformers 4\.57.*Leave `hidden_act`"),
        (dict(expert_output_bias=False), 0.0, "GGUF: exact"),
        (dict(moe_every=0), 0.0, "none.*rotary models without experts"),
        (dict(expert_bias=True), 0.02, "none.*a hidden bias in every expert"),
        (dict(shared_expert_width=8), 0.0, "none.*a shared expert"),
    ],
)
def test_gguf(change, bias, words):
    model = EncoderConfig(**{**vars(MODEL), **change})
    assert re.search(words, " ".join(gguf_facts(model, bias, False)))


def test_mteb_takes_the_entry():
    pytest.importorskip("mteb", reason="needs mteb (pip install -e .[mteb])")
    text = model_card(Exported(MODEL, PROMPTS, 512, (16, 8)), CARD)
    (code,) = re.findall(r"```python\n(from mteb.*?)```", text, re.DOTALL)
    scope = {}
    exec(code, scope)
    meta = scope["meta"]
    assert (meta.name, meta.max_tokens, meta.embed_dim) == ("me/small", 512, [16, 8])
    assert meta.loader_kwargs["model_prompts"] == {
        "query": "search_query: ",
        "document": "search_document: ",
        **dict.fromkeys(SYMMETRIC_TYPES, "search_document: "),
    }
    assert meta.training_datasets == {"MIRACLRetrieval", "NQ"} and meta.use_instructions
    # Embeddings, two layers of attention and norms, a feed-forward, a router with two experts.
    assert meta.n_active_parameters == 48 + 2 * 1152 + 808 + (64 + 2 * 768 + 16)


def test_scores_of_a_run_and_of_mteb(tmp_path):
    assert run_scores(tmp_path) == []
    sets = {"api/en": {"ndcg_at_10": 0.2}, "api/de": {"ndcg_at_10": 0.4}, "texts/en": {"loss": 1.0}}
    (tmp_path / "results.json").write_text(json.dumps({"BM25": {}, "trained": sets}))
    (score,) = run_scores(tmp_path)
    assert (score["dataset_name"], score["metric_value"]) == (
        "api, held out, mean of 2 languages",
        0.3,
    )
    (tmp_path / "results.json").write_text(json.dumps({"trained": {"api/en": {"ndcg_at_10": 0.2}}}))
    assert run_scores(tmp_path)[0]["dataset_name"] == "api, held out"
    with pytest.raises(UserError, match="holds no results"):
        mteb_scores(tmp_path)
    for folder, value in (("1", 0.6), ("1/experiments/embed_dim_8", 0.1)):
        content = {
            "task_name": "NQ",
            "dataset_revision": "7",
            "scores": {"test": [{"main_score": value}, {"main_score": 0.8}]},
        }
        path = tmp_path / "results" / folder / "NQ.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    (score,) = mteb_scores(tmp_path)
    assert (score["dataset_type"], score["metric_value"]) == ("mteb/NQ", 0.7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="small"), "name='small' must be OWNER/NAME"),
        (dict(base_model="hf://a/b"), "base_model='hf://a/b' must be OWNER/NAME"),
        (dict(languages="en,German"), "languages: 'German' is no code of ISO 639"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(UserError, match=message):
        CardConfig(**fields)


def test_base_model_of_a_folder(tmp_path):
    for content, expected in (
        ({"model": {}, "init": {"source": "hf://a/b@main"}}, "a/b"),
        ({"model": {}, "origin": "hf://a/b"}, "a/b"),
        ({"model": {}, "init": {"source": "runs/stage2"}}, ""),
        ({"model_type": "nomic_bert"}, ""),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert conversion._base_model(tmp_path) == expected
