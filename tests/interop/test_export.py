"""The exported folder in PyTorch, offline: same tensors, same embeddings, never a wrong model."""

import ast
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, python_environment, skip_without
from helpers import synthetic_data
from helpers.published_models import NOMIC, nomic_shapes, random_tensors, write_folder
from safetensors.numpy import load_file

from moe_embed_jax import Embedder
from moe_embed_jax.conversion import export_model, import_model, upcycle_model
from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop import nomic
from moe_embed_jax.interop.export import export_config
from moe_embed_jax.interop.layers import shapes_by_layer
from moe_embed_jax.interop.prompts import SYMMETRIC_TYPES
from moe_embed_jax.interop.rules import entries
from moe_embed_jax.model_folder import open_model
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.tokenizers.files import find_tokenizer

SIZE = dict(vocab_size=512)
EXTENDED = dict(moe_normalize_expert_weights=True, moe_expert_bias=True)
TEXTS = ["tanara nobipo", "situno", "", "kapehu rameku jikiki gapehu " * 40, "нет 你好", "x" * 99]


def write_source(folder, data_dir, **change):
    config = NOMIC | SIZE | change
    write_folder(folder, config, random_tensors(nomic_shapes(config)))
    source = vocabulary_path(synthetic_data.PREPARATION, data_dir)
    (folder / "sentencepiece.bpe.model").write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="module")
def source(data_dir, tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("published") / "source", data_dir)


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_model(source, folder)
    return folder


def test_round_trip_gives_the_same_bytes(source, tmp_path):
    """Published -> ours (a checkpoint) -> published."""
    import_model(source, tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (source, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    tokenizers = [find_tokenizer(folder).read_bytes() for folder in (source, tmp_path / "again")]
    assert tokenizers[0] == tokenizers[1]


def test_the_published_size_has_148_tensors():
    model = EncoderConfig()
    shapes = {}
    for entry in entries(nomic.RULES, shapes_by_layer(model)):
        shapes |= {key: entry.their_shape for key in entry.keys}
    assert len(shapes) == 148
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 475_292_928
    expected = NOMIC | dict(
        n_layer=12, n_head=12, n_embd=768, n_inner=3072, vocab_size=250_048, num_experts=8
    )
    assert shapes == nomic_shapes(expected)


def test_config_is_the_published_one():
    """What other runtimes read, and no second name for it (duplicate keys to some of them)."""
    config = export_config(EncoderConfig(), 512, 1)
    expected = dict(
        architectures=["NomicBertModel"], model_type="nomic_bert", activation_function="gelu",
        n_layer=12, n_head=12, n_embd=768, n_inner=3072, n_positions=2048,
        max_trained_positions=2048, vocab_size=250_048, pad_vocab_size_multiple=64, pad_token_id=1,
        type_vocab_size=1, layer_norm_epsilon=1e-5, causal=False, prenorm=False,
        qkv_proj_bias=True, mlp_fc1_bias=True, mlp_fc2_bias=True, rotary_emb_fraction=1.0,
        rotary_emb_base=10_000, rotary_emb_interleaved=False, rotary_emb_scale_base=None,
        num_experts=8, moe_top_k=2, moe_every_n_layers=2, moe_normalize_expert_weights=False,
        expert_choice_router=False, num_shared_experts=0, ffn_div=1,
    )  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    second_names = {"hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"}
    assert not second_names & config.keys() and "max_position_embeddings" not in config
    smaller = EncoderConfig(num_layers=6, width=384, ffn_width=1000, rotary_base=500.0)
    for model in (EncoderConfig(), smaller):
        config = export_config(model, 512, 1)
        assert nomic.model_from_config(config, (), "config.json") == model


@pytest.mark.parametrize(
    "change",
    [
        dict(normalize_gates=True),
        dict(expert_bias=True),
        dict(shared_expert_width=512),
        dict(moe_every=1),
        dict(positions="learned", max_positions=64),
    ],
)
def test_extensions_are_told_apart_from_the_published_model(change):
    """vLLM and others would ignore normalised gates or biases: they must not know the name."""
    model = EncoderConfig(**change)
    config = export_config(model, 512, 1)
    assert config["model_type"] == "moe_embed" and config["architectures"] == ["MoeEmbedModel"]
    names = ["encoder.layers.0.mlp.router.layer.weight"]
    assert nomic.model_from_config(config, names, "config.json") == model


def test_the_exported_prompts_have_a_name_for_each_convention(exported):
    content = json.loads((exported / "config_sentence_transformers.json").read_text())
    document = "search_document: "
    assert content["prompts"] == {
        "query": "search_query: ",
        "document": document,
        "passage": document,
        **dict.fromkeys(SYMMETRIC_TYPES, document),  # of MTEB's tasks without sides
    }


def test_prompts_and_widths_come_back(source, tmp_path):
    """Published -> ours -> published -> ours: prompts by task type, widths for servers."""
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    own = {"query": "q: ", "passage": "p: ", "STS": "s: ", "Clustering": "p: "}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": own}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": [8, 32]}))
    import_model(folder, tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "out")
    again = open_model(tmp_path / "out")
    expected = dict.fromkeys(SYMMETRIC_TYPES, "p: ") | own | {"document": "p: "}
    assert again.prompts == expected
    assert json.loads((tmp_path / "out" / "config.json").read_text())["matryoshka_dimensions"] == [
        32,
        8,
    ]
    assert again.matryoshka_dims == open_model(tmp_path / "ours").matryoshka_dims == (32, 8)
    # Another prefix for documents is that of the task types which had the old one.
    export_model(tmp_path / "out", tmp_path / "other", document_prefix="d: ")
    expected = dict.fromkeys(SYMMETRIC_TYPES, "d: ") | {"query": "q: ", "STS": "s: "}
    assert open_model(tmp_path / "other").prompts == expected | dict.fromkeys(
        ["document", "passage"], "d: "
    )
    (folder / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": [33]}))
    with pytest.raises(UserError, match=r"matryoshka_dimensions=\[33\] must be a list of widths"):
        open_model(folder)


def test_all_files_have_the_mode_of_new_files(exported, tmp_path):
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    files = [path for path in exported.rglob("*") if path.is_file()]
    assert files and {path.name: path.stat().st_mode for path in files} == {
        path.name: expected for path in files
    }


def test_existing_targets_and_dry_runs(source, exported, tmp_path, capsys):
    for action, options in ((export_model, dict(step=0)), (upcycle_model, dict(mode="paper"))):
        with pytest.raises(UserError, match="exists already"):
            action(source, exported, **options)
    export_model(source, tmp_path / "new", dry_run=True)
    import_model(source, tmp_path / "new", dry_run=True)
    assert not list(tmp_path.iterdir())
    assert "512 ids" in capsys.readouterr().out


def test_a_failed_export_leaves_nothing(source, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export_model(source, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_prompts_and_vocabulary_of_the_command_line(source, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((source / name).read_bytes())
    vocabulary = source / "sentencepiece.bpe.model"
    import_model(
        bare, tmp_path / "ours", vocabulary=str(vocabulary), query_prefix="q: ", document_prefix=""
    )
    embedder = Embedder.load(tmp_path / "ours")
    assert (embedder.prefix("query"), embedder.prefix("document")) == ("q: ", "")
    expected = Embedder.load(source).encode(TEXTS, "q: ")
    np.testing.assert_allclose(embedder.encode(TEXTS), expected, atol=1e-6)


def test_a_tokenizer_of_another_model_is_refused(data_dir, tmp_path):
    write_source(tmp_path / "small", data_dir, vocab_size=128)
    with pytest.raises(UserError, match=r"has 512 ids, the model's word table 128 rows"):
        Embedder.load(tmp_path / "small")
    write_source(tmp_path / "large", data_dir, vocab_size=4096)
    with pytest.raises(UserError, match=r"has 512 ids, the model's word table 4096 rows"):
        Embedder.load(tmp_path / "large")


### In PyTorch


def run_torch(code: str, **environment):
    """Runs `code` in a process that has never seen the folder, without a network or our package."""
    env = python_environment(1, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", **environment)
    env["PYTHONPATH"] = ""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=env, cwd=ROOT.parent, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("kind", ["published", "extended", "bert"])
def test_sentence_transformers_offline(kind, data_dir, source, exported, tmp_path):
    skip_without("sentence_transformers")
    if kind != "published":
        change = EXTENDED if kind == "extended" else dict(rotary_emb_fraction=0, num_experts=0)
        source = write_source(tmp_path / "source", data_dir, n_positions=512, **change)
        exported = tmp_path / "model"
        export_model(source, exported)
    code = f"""
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
folder, texts = {str(exported)!r}, {TEXTS!r}
assert "moe_embed_jax" not in sys.modules
model = SentenceTransformer(folder, trust_remote_code={kind != "bert"}, device="cpu")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code={kind != "bert"})
plain = AutoModel.from_pretrained(folder, trust_remote_code={kind != "bert"}).eval()
inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
hidden = plain(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
np.savez({str(tmp_path / "torch.npz")!r},
    query=model.encode(texts, prompt_name="query"),
    passage=model.encode(texts, prompt_name="passage"),
    document=model.encode_document(texts),
    bare=model.encode(texts),
    cut=model.encode(texts, truncate_dim=8, normalize_embeddings=True),
    ids=inputs["input_ids"].numpy(), mask=inputs["attention_mask"].numpy(),
    hidden=hidden.detach().numpy(), max_length=model.max_seq_length)
"""
    result = run_torch(code)
    assert result.returncode == 0, result.stderr
    torch = np.load(tmp_path / "torch.npz")
    assert torch["max_length"] == (512 if kind == "bert" else 2048)  # of its table; no limit known
    embedder = Embedder.load(exported)
    prompts = {"query": "query", "passage": "document", "document": "document", "bare": None}
    for name, prompt in prompts.items():
        np.testing.assert_allclose(embedder.encode(TEXTS, prompt), torch[name], atol=1e-5)
    np.testing.assert_allclose(embedder.encode(TEXTS, None, dim=8), torch["cut"], atol=1e-5)
    sequences = embedder.tokenize(TEXTS, None)
    for sequence, ids, mask in zip(sequences, torch["ids"], torch["mask"], strict=True):
        np.testing.assert_array_equal(sequence, ids[mask == 1])
    hidden = embedder.hidden_states(torch["ids"], torch["mask"])
    torch_hidden = torch["hidden"] * torch["mask"][..., None]
    np.testing.assert_allclose(hidden, torch_hidden, atol=1e-5)


@pytest.mark.parametrize("change", [{}, EXTENDED], ids=["published", "extended"])
def test_forgetting_trust_remote_code_is_an_error(change, data_dir, tmp_path):
    """transformers 5 has a nomic_bert class that would load this layout with random weights."""
    skip_without("sentence_transformers")
    write_source(tmp_path / "source", data_dir, **change)
    export_model(tmp_path / "source", tmp_path / "model")
    code = f"""
import json
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel
errors = []
for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained, SentenceTransformer):
    try:
        load({str(tmp_path / "model")!r})
    except Exception as error:
        errors.append(str(error))
    else:
        errors.append("loaded")
print("\\n" + json.dumps(errors))  # it may have asked, without a new line
"""
    result = run_torch(code)
    assert result.returncode == 0, result.stderr
    errors = json.loads(result.stdout.splitlines()[-1])
    assert len(errors) == 3
    assert all("trust_remote_code=True" in error for error in errors), errors


def test_the_guard_is_one_text():
    """torch_model.py travels alone, so it cannot import the text."""
    source = ROOT / "moe_embed_jax/interop/torch_model.py"  # importing it imports PyTorch
    (value,) = (
        node.value
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NATIVE_CLASS_GUARD"
    )
    assert ast.literal_eval(value) == nomic.NATIVE_CLASS_GUARD


def test_a_training_runs_model_leaves(data_dir, tmp_path):
    """A work directory's newest checkpoint is exported like any other model."""
    from moe_embed_jax.checkpoint import Checkpoints
    from moe_embed_jax.models.encoder import init_params

    model = EncoderConfig(
        vocab_size=512, num_layers=2, width=32, num_heads=2, ffn_width=48, num_experts=4
    )
    card = {"model": vars(model), "data": {"query_length": 16, "document_length": 64}}
    card["loss"] = {"dims": {"16": 0.5, "32": 1.0, "8": 0.0}}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(card))
    source = vocabulary_path(synthetic_data.PREPARATION, data_dir)
    (run / "sentencepiece.model").write_bytes(source.read_bytes())
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    checkpoints = Checkpoints(run / "checkpoints")
    checkpoints.save(7, {}, params=params, optimizer={"step": np.zeros(1)})
    checkpoints.close()
    export_model(run, tmp_path / "out")
    texts = ["tanara nobipo", "situno"]
    ours, theirs = Embedder.load(run), Embedder.load(tmp_path / "out")
    for prompt in ("query", "document"):
        np.testing.assert_allclose(
            theirs.encode(texts, prompt), ours.encode(texts, prompt), atol=1e-6
        )
    assert theirs.max_lengths == {"query": 64, "document": 64}  # the run's own
    assert open_model(tmp_path / "out").matryoshka_dims == (32, 16)
