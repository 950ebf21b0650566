"""Published checkpoints in and out: parity with float64 NumPy, byte-equal round trips, refusals."""

import json

import jax
import numpy as np
import pytest
from conftest import SHARED
from helpers.published_models import (
    NOMIC,
    nomic_forward,
    nomic_shapes,
    random_tensors,
    write_folder,
)
from safetensors.numpy import load_file, save_file

from moe_embed_jax import Embedder, launching
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop import nomic
from moe_embed_jax.interop.layers import by_layer, from_layers, shapes_by_layer
from moe_embed_jax.interop.published import open_published
from moe_embed_jax.model_folder import open_model
from moe_embed_jax.models import moe
from moe_embed_jax.models.encoder import EncoderConfig, init_params

FIXTURES = sorted((SHARED / "fixtures").glob("nomic_moe*"))
VARIANTS = {
    "published": {},
    "top_1_of_8": dict(num_experts=8, moe_top_k=1),
    "three_heads_default_ffn": dict(n_embd=36, n_head=3, n_inner=None, n_layer=2),
    "odd_layers": dict(n_layer=5),
    "every_third": dict(n_layer=5, moe_every_n_layers=3),
    "every_layer": dict(n_layer=2, moe_every_n_layers=1),
    "dense": dict(num_experts=0),
    "rotary_base": dict(rotary_emb_base=1000, layer_norm_epsilon=1e-12),
    "normalised_gates": dict(moe_normalize_expert_weights=True),
    "expert_bias": dict(moe_expert_bias=True),
    "shared_expert": dict(moe_shared_expert_width=24),
    "learned_positions": dict(rotary_emb_fraction=0.0, type_vocab_size=2),
}


def make(folder, change=None, seed=0):
    config = NOMIC | (change or {})
    tensors = random_tensors(nomic_shapes(config), seed)
    return config, tensors, write_folder(folder / "published", config, tensors)


@pytest.mark.parametrize(
    ("prompts", "prefix", "warns"),
    [(None, "search_query: ", True), ({"query": "Q: "}, "Q: ", False), ({"query": ""}, "", True)],
)
def test_a_folder_that_names_no_prompts_has_nomics_and_says_so(
    prompts, prefix, warns, tmp_path, capsys
):
    _, _, folder = make(tmp_path, dict(n_layer=1, num_experts=0))
    if prompts is not None:
        text = json.dumps({"prompts": prompts})
        (folder / "config_sentence_transformers.json").write_text(text)
    note = ["the folder names no prompts, so Nomic's are used"]
    assert open_model(folder).notes == (note if prompts is None else [])
    launching.report_prompts(Embedder.load(folder), {"texts": "query", "others": "a: "})
    said = capsys.readouterr()
    assert said.out.startswith(f'texts: prefix "{prefix}", at most')
    what = "Nomic's prefixes are used" if prompts is None else "there is no prefix"
    assert (f"says nothing about prompts, so {what} for query; if" in said.err) == warns
    launching.report_prompts(Embedder.load(folder), {"texts": "a: "})
    assert not capsys.readouterr().err


def test_a_prompt_that_no_text_holds_is_refused(tmp_path):
    """Tokenizers would take another character in its place, without a word."""
    _, _, folder = make(tmp_path, dict(n_layer=1, num_experts=0))
    for name in ("query", "document"):
        text = json.dumps({"prompts": {"query": "q: ", name: "\ud800: "}})
        (folder / "config_sentence_transformers.json").write_text(text)
        with pytest.raises(UserError, match=rf"{name}='.ud800: ' has half of a surrogate pair"):
            open_model(folder)


def make_batch(vocab_size, lengths=(17, 1, 9, 24)):
    rng = np.random.default_rng(3)
    ids = rng.integers(0, vocab_size, (len(lengths), max(lengths)))
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return ids, mask.astype(np.int32)


@pytest.fixture
def chosen_experts(monkeypatch):
    """Records the expert ids [R, L, K] of every MoE layer, in order."""
    record = []
    route = moe.route

    def recording(*arguments):
        expert, gate, statistics = route(*arguments)
        jax.debug.callback(lambda e: record.append(np.asarray(e)), expert, ordered=True)
        return expert, gate, statistics

    jax.clear_caches()
    monkeypatch.setattr(moe, "route", recording)
    yield record
    jax.clear_caches()


def assert_parity(embedder, config, tensors, ids, mask, chosen_experts):
    hidden = embedder.hidden_states(ids, mask)
    jax.effects_barrier()
    chosen = [layer[: len(ids)] for layer in chosen_experts]
    for row, (text, valid) in enumerate(zip(ids, mask.astype(bool), strict=True)):
        expected, experts = nomic_forward(config, tensors, text[valid])
        np.testing.assert_allclose(hidden[row, valid], expected, atol=1e-5, rtol=0)
        assert not hidden[row, ~valid].any()
        assert len(chosen) == len(experts)
        for ours, theirs in zip(chosen, experts, strict=True):
            np.testing.assert_array_equal(ours[row, : len(text)][valid], theirs)
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(embedder.encode_ids(ids, mask, normalize=False), pooled, atol=1e-5)
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(embedder.encode_ids(ids, mask), unit, atol=1e-5)
    cut = pooled[:, :8] / np.linalg.norm(pooled[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(embedder.encode_ids(ids, mask, dim=8), cut, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_parity_with_float64(name, tmp_path, chosen_experts):
    config, tensors, folder = make(tmp_path, VARIANTS[name])
    ids, mask = make_batch(config["vocab_size"])
    assert_parity(Embedder.load(folder), config, tensors, ids, mask, chosen_experts)


@pytest.mark.skipif(not FIXTURES, reason="the reference fixtures are not beside the project")
@pytest.mark.parametrize("folder", FIXTURES, ids=lambda path: path.name)
def test_parity_with_the_reference_fixtures(folder, chosen_experts):
    """Outputs of an independent float64 implementation; our oracle agrees with it too."""
    expected = np.load(folder / "expected.npz")
    ids, mask = expected["input_ids"], expected["attention_mask"]
    embedder = Embedder.load(folder)
    config = NOMIC | json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    assert_parity(embedder, config, tensors, ids, mask, chosen_experts)
    hidden = embedder.hidden_states(ids, mask)
    np.testing.assert_allclose(hidden, expected["last_hidden_state"], atol=1e-5, rtol=0)
    for name, options in {
        "mean_pooled": dict(normalize=False),
        "embedding": {},
        "embedding_quarter": dict(dim=embedder.width // 4),
    }.items():
        actual = embedder.encode_ids(ids, mask, **options)
        np.testing.assert_allclose(actual, expected[name], atol=1e-5, rtol=0)


def test_holes_and_padding_on_the_left_keep_their_columns(tmp_path):
    """A token's position is its column, as in the published code; only rotary ones are relative."""
    _, _, folder = make(tmp_path, dict(rotary_emb_fraction=0.0))
    embedder = Embedder.load(folder)
    ids, mask = make_batch(128)
    left, left_mask = np.roll(ids, 5, axis=1), np.roll(mask, 5, axis=1)
    left_mask[3] = 1
    hidden = embedder.hidden_states(left, left_mask)
    pooled = (hidden * left_mask[..., None]).sum(1) / left_mask.sum(1, keepdims=True)
    packed = embedder.encode_ids(left, left_mask, normalize=False)
    np.testing.assert_allclose(packed, pooled, atol=1e-5)
    assert np.abs(packed[:3] - embedder.encode_ids(ids, mask, normalize=False)[:3]).max() > 1e-3


def test_content_of_padding_and_batching_do_not_matter(tmp_path):
    _, _, folder = make(tmp_path)
    embedder = Embedder.load(folder)
    ids, mask = make_batch(128)
    expected = embedder.hidden_states(ids, mask)
    other = np.where(mask, ids, 7)
    np.testing.assert_array_equal(embedder.hidden_states(other, mask), expected)
    other[mask == 0] = -100  # what trainers put there
    np.testing.assert_array_equal(embedder.hidden_states(other, mask), expected)
    wide = [np.pad(a, ((0, 0), (0, 40))) for a in (ids, mask)]
    np.testing.assert_allclose(
        embedder.hidden_states(*wide)[:, : ids.shape[1]], expected, atol=1e-5
    )
    for i in range(len(ids)):
        one = embedder.hidden_states(ids[i : i + 1], mask[i : i + 1])
        np.testing.assert_allclose(one[0], expected[i], atol=1e-5)
    empty = embedder.encode_ids(ids, np.zeros_like(mask))
    assert empty.shape == (4, 32) and not empty.any()
    assert embedder.encode_ids(ids[:0], mask[:0]).shape == (0, 32)
    assert embedder.hidden_states(ids[:0], mask[:0]).shape == (0, ids.shape[1], 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, mask: (ids[0], mask[0]), r"input_ids \[24\] and attention_mask \[24\] must"),
        (lambda ids, mask: (ids, mask[:, 1:]), r"must both be \[batch, length\]"),
        (lambda ids, mask: (ids + 0.5, mask), "input_ids are float64"),
        (lambda ids, mask: (ids, mask * 2), "attention_mask must hold 0"),
        (lambda ids, mask: (ids + 128, mask), r"input_ids\[0, 0\] = \d+ is outside the word table"),
        (lambda ids, mask: (np.full_like(ids, 128), mask), r"= 128 is outside the word table"),
        (lambda ids, mask: (ids, -mask), "attention_mask must hold 0"),
        (lambda ids, mask: (np.tile(ids, 3), np.ones((4, 72), int)), "beyond column 64"),
    ],
)
def test_bad_ids_are_refused(tmp_path, change, message):
    _, _, folder = make(tmp_path, dict(rotary_emb_fraction=0.0))
    with pytest.raises(UserError, match=message):
        Embedder.load(folder).encode_ids(*change(*make_batch(128)))


def test_texts_need_a_tokenizer(tmp_path):
    _, _, folder = make(tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer .* use encode_ids"):
        Embedder.load(folder).encode(["text"])


### Reading files


def split_in_two(folder, tensors):
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    (folder / "model.safetensors").unlink()
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, weight_map


def test_sharded_files_and_wrapper_prefixes(tmp_path):
    _, tensors, folder = make(tmp_path)
    ids, mask = make_batch(128)
    expected = Embedder.load(folder).hidden_states(ids, mask)
    split_in_two(folder, tensors)
    np.testing.assert_array_equal(Embedder.load(folder).hidden_states(ids, mask), expected)
    for prefix in ("bert.", "trunk."):
        wrapped = {prefix + name: x for name, x in tensors.items()}
        write_folder(tmp_path / prefix, NOMIC, wrapped)
        actual = Embedder.load(tmp_path / prefix).hidden_states(ids, mask)
        np.testing.assert_array_equal(actual, expected)


def test_half_precision_is_read_as_float32(tmp_path):
    import ml_dtypes

    config, tensors, _ = make(tmp_path)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        rounded = {name: x.astype(dtype) for name, x in tensors.items()}
        folder = write_folder(tmp_path / np.dtype(dtype).name, config, rounded)
        params, _ = open_published(folder).read()
        word = params["embeddings"]["token"]
        assert word.dtype == np.float32
        expected = rounded["embeddings.word_embeddings.weight"].astype(np.float32)
        np.testing.assert_array_equal(word, expected)


FAULTS = {
    "missing": (
        lambda t: t.pop("encoder.layers.1.mlp.router.layer.weight"),
        r"encoder\.layers\.1\.mlp\.router\.layer\.weight is missing",
    ),
    "left over": (
        lambda t: t.update({"pooler.dense.weight": np.zeros((2, 2), np.float32)}),
        r"pooler\.dense\.weight is left over",
    ),
    "mis-shaped": (
        lambda t: t.update({"emb_ln.bias": np.zeros(31, np.float32)}),
        r"emb_ln\.bias has shape \[31\] instead of \[32\]",
    ),
    "dense instead of experts": (
        lambda t: t.update({"encoder.layers.1.mlp.fc1.bias": np.zeros(64, np.float32)}),
        r"encoder\.layers\.1\.mlp\.fc1\.bias is left over",
    ),
    "NaN": (
        lambda t: t["encoder.layers.3.mlp.experts.mlp.w2"].__setitem__((5, 6), np.nan),
        r"encoder\.layers\.3\.mlp\.experts\.mlp\.w2 holds nan at \[5, 6\]",
    ),
    "infinite": (
        lambda t: t["emb_ln.weight"].__setitem__(0, -np.inf),
        r"emb_ln\.weight holds -inf at \[0\]",
    ),
    "integers": (
        lambda t: t.update({"emb_ln.bias": np.zeros(32, np.int64)}),
        "emb_ln.bias is of type I64; weights must be floats",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_tensors_are_named(name, tmp_path):
    config, tensors, folder = make(tmp_path)
    change, message = FAULTS[name]
    change(tensors)
    write_folder(folder, config, tensors)
    with pytest.raises(UserError, match=message):
        Embedder.load(folder)


CONFIG_FAULTS = {
    "activation_function": ("swiglu", "activation_function='swiglu' is an architecture"),
    "prenorm": (True, "prenorm=True"),
    "expert_choice_router": (True, "expert_choice_router=True"),
    "num_shared_experts": (1, "num_shared_experts=1"),
    "qkv_proj_bias": (False, "qkv_proj_bias=False"),
    "rotary_emb_fraction": (0.5, "rotary_emb_fraction=0.5"),
    "model_type": ("llama", "model_type='llama' is not known here"),
    "n_head": (5, "width=32 must be divisible by 10"),
}


@pytest.mark.parametrize("key", CONFIG_FAULTS)
def test_other_architectures_are_refused(key, tmp_path):
    value, message = CONFIG_FAULTS[key]
    _, _, folder = make(tmp_path)
    (folder / "config.json").write_text(json.dumps(NOMIC | {key: value}))
    with pytest.raises(UserError, match=message):
        Embedder.load(folder)


def test_absent_config_keys_have_the_published_meaning():
    sizes = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=64, rotary_emb_fraction=1.0)
    config = sizes | dict(num_experts=4, moe_top_k=2, moe_every_n_layers=2)
    assert nomic.model_from_config(config, (), "config.json") == EncoderConfig(
        vocab_size=64, num_layers=2, width=32, num_heads=2, ffn_width=128, num_experts=4
    )
    # The PyTorch file takes the same for absent keys; it cannot import the table.
    short = {key: sizes[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    model = nomic.model_from_config(short | {"num_experts": 4}, (), "config.json")
    assert (model.experts_per_token, model.moe_every, model.positions) == (2, 2, "rotary")
    theirs = pytest.importorskip("test_torch_model").source.NomicBertConfig().to_dict()
    # A model without output biases has zeros for that file.
    absent = {k: v for k, v in nomic.ABSENT.items() if k != "moe_expert_output_bias"}
    assert {key: theirs[key] for key in absent} == absent


def test_missing_config_key_is_named(tmp_path):
    _, _, folder = make(tmp_path)
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in NOMIC.items() if k != "n_layer"})
    )
    with pytest.raises(UserError, match=r"config\.json: key n_layer is missing"):
        Embedder.load(folder)


def test_pickles_are_never_opened(tmp_path):
    _, _, folder = make(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        Embedder.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle file.* is never opened"):
        Embedder.load(folder)


def test_damaged_files_are_named(tmp_path):
    _, tensors, folder = make(tmp_path)
    index, weight_map = split_in_two(folder, tensors)
    (folder / "model-2.safetensors").rename(folder / "away")
    with pytest.raises(UserError, match=r"model-2\.safetensors is missing"):
        Embedder.load(folder)
    (folder / "model-2.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"model-2\.safetensors is not a readable safetensors"):
        Embedder.load(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"} | weight_map}))
    with pytest.raises(UserError, match=r"is not the name of a \.safetensors file"):
        Embedder.load(folder)
    index.write_text("{")
    with pytest.raises(UserError, match=r"index\.json is not JSON"):
        Embedder.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        Embedder.load(folder)


### The form by layers


@pytest.mark.parametrize(("num_layers", "moe_every"), [(4, 2), (5, 2), (5, 3), (2, 4), (3, 0)])
def test_parameters_by_layer_and_back(num_layers, moe_every):
    config = EncoderConfig(
        vocab_size=16, num_layers=num_layers, width=8, num_heads=2, ffn_width=4, num_experts=2,
        moe_every=moe_every,
    )  # fmt: skip
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    flat = by_layer(config, params)
    assert {name: x.shape for name, x in flat.items()} == shapes_by_layer(config)
    with_experts = {int(name.split("/")[1]) for name in flat if "/moe/" in name}
    assert with_experts == {i for i in range(num_layers) if config.is_moe(i)}
    jax.tree.map(np.testing.assert_array_equal, from_layers(config, flat.items()), params)
    for wrong, message in (
        ({"layers/9/norm_1/bias": np.zeros(8)}, "layers/9/norm_1/bias: not a parameter"),
        ({"embeddings/norm/bias": np.zeros(7)}, "has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            from_layers(config, (flat | wrong).items())
    del flat["embeddings/norm/bias"]
    with pytest.raises(ValueError, match="no value for embeddings/norm/bias"):
        from_layers(config, flat.items())
