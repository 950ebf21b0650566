"""Folders that are damaged or hostile: one line that names the file, and no path outside."""

import copy
import json
import pathlib
import random
import shutil
import struct

import jax
import numpy as np
import pytest
from helpers.published_models import NOMIC, nomic_shapes, random_tensors, write_folder

from moe_embed_jax import Embedder
from moe_embed_jax.conversion import export_model, import_model
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop import bert, nomic
from moe_embed_jax.interop.published import open_published, read_config
from moe_embed_jax.interop.sentence_transformers import read_settings
from moe_embed_jax.interop.tensors import Tensors
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.model_folder import LoadedModel, is_run, open_model, save_model
from moe_embed_jax.models.encoder import EncoderConfig, init_params
from moe_embed_jax.tokenizers.files import load_tokenizer

st_folders = pytest.importorskip("helpers.st_folders")

TINY = EncoderConfig(
    vocab_size=128, num_layers=2, width=16, num_heads=2, ffn_width=16, num_experts=2, moe_every=2
)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    return st_folders.save_model(tmp_path_factory.mktemp("folders") / "bert", vocab_size=256)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """An import of ours; `params` by name."""
    folder = tmp_path_factory.mktemp("folders") / "ours"
    params = jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0))
    prompts = {"query": "q: ", "document": ""}
    save_model(
        folder, LoadedModel(TINY, params, None, None, prompts, dict(query=8, document=16)), "a test"
    )
    return folder


def edit(path: pathlib.Path, change) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


# ---- modules.json --------------------------------------------------------------------------------


def test_the_older_layout(bert_folder, tmp_path):
    """`0_Transformer/` holds the model, its tokenizer and its length."""
    folder = tmp_path / "model"
    shutil.copytree(bert_folder, folder)
    inner = folder / "0_Transformer"
    inner.mkdir()
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    for name in (*names, "sentence_bert_config.json"):
        (folder / name).rename(inner / name)
    edit(folder / "modules.json", lambda old: [old[0] | {"path": "0_Transformer"}, *old[1:]])
    edit(inner / "sentence_bert_config.json", lambda old: {"max_seq_length": 7})
    embedder = Embedder.load(folder)
    assert embedder.max_lengths == {"query": 7, "document": 7}
    expected = st_folders.vectors(folder)
    np.testing.assert_allclose(embedder.encode(st_folders.TEXTS, None), expected, atol=1e-6)
    import_model(folder, tmp_path / "imported")
    again = Embedder.load(tmp_path / "imported").encode(st_folders.TEXTS, None)
    np.testing.assert_allclose(again, expected, atol=1e-6)


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../other", "linked", "\0", "\ud800", 3])
@pytest.mark.parametrize("module", [0, 1])
def test_module_paths_stay_inside(path, module, bert_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bert_folder, folder)
    shutil.copytree(bert_folder, tmp_path / "other")
    (folder / "linked").symlink_to(tmp_path / "other")

    def change(modules):
        modules[module]["path"] = path
        return modules

    edit(folder / "modules.json", change)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"modules\.json.*path"):
        open_model(folder)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["Pooling", "Transformer"], "the modules are Pooling, Transformer"),
        (["Transformer", "Normalize", "Pooling"], "only Transformer, Pooling and Normalize"),
        (["Transformer", "Pooling", "Dense"], "module Dense is not known"),
        (["Transformer", "Pooling", "LayerNorm"], "module LayerNorm is not known"),
        (["Transformer"], "the modules are Transformer;"),
        ([], "the modules are none"),
    ],
)
def test_modules_in_another_order(kinds, message, bert_folder, tmp_path):
    shutil.copytree(bert_folder, tmp_path / "model")
    prefix = "sentence_transformers.models."
    modules = [{"type": prefix + kind, "path": "1_Pooling"} for kind in kinds]
    (tmp_path / "model" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match=message):
        open_model(tmp_path / "model")


def test_a_model_that_does_not_normalise(tmp_path):
    """Its vectors have length 1 here, which is said; where length matters it is refused."""
    folder = st_folders.save_model(tmp_path / "model", normalize=False)
    assert open_model(folder).notes == [
        "the folder's own modules do not normalise: embeddings here have length 1"
    ]
    actual = Embedder.load(folder).encode(st_folders.TEXTS, None)
    np.testing.assert_allclose(actual, st_folders.vectors(folder), atol=1e-6)
    file = folder / "config_sentence_transformers.json"
    edit(file, lambda old: old | {"similarity_fn_name": "dot"})
    with pytest.raises(UserError, match="similarity_fn_name='dot' does not rank as the cosine"):
        open_model(folder)


@pytest.mark.parametrize(
    ("change", "prompts", "lengths"),
    [
        (
            {"prompts": {"q": "Q: ", "query": None}, "default_prompt_name": "q"},
            {"q": "Q: ", "query": "", "document": "Q: "},
            {},
        ),
        ({"prompts": {"q": "Q: ", "passage": "P: "}}, {"query": "", "document": "P: "}, {}),
        ({}, {"query": "", "document": ""}, {"query_length": 9, "document_length": 20}),
    ],
)
def test_prompts_and_lengths(change, prompts, lengths, bert_folder, tmp_path):
    shutil.copytree(bert_folder, tmp_path / "model")
    edit(tmp_path / "model" / "config_sentence_transformers.json", lambda old: old | change)
    edit(tmp_path / "model" / "sentence_bert_config.json", lambda old: old | lengths)
    opened = open_model(tmp_path / "model")
    assert prompts.items() <= opened.prompts.items()
    sides = {side: lengths.get(f"{side}_length", 48) for side in ("query", "document")}
    assert opened.max_lengths == sides


def test_code_of_the_folder_is_refused(bert_folder, tmp_path):
    shutil.copytree(bert_folder, tmp_path / "model")
    edit(
        tmp_path / "model" / "modules.json", lambda old: [old[0], old[1] | {"type": "own.Pooling"}]
    )
    with pytest.raises(UserError, match=r"module own\.Pooling is not known"):
        open_model(tmp_path / "model")


# ---- Weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "x.bin", 3, None, "\0"])
def test_weights_are_files_of_the_folder(file, tmp_path):
    write_folder(tmp_path, NOMIC, random_tensors(nomic_shapes(NOMIC)))
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"emb_ln.weight": file}}))
    with pytest.raises(UserError, match=r"index\.json: emb_ln\.weight is said to be in"):
        Tensors(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_weights_of_ours_that_are_not_finite(value, weights, tmp_path):
    params = jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0))
    params["groups"]["block_1"]["moe"]["w_in"] = (
        params["groups"]["block_1"]["moe"]["w_in"].at[0, 1, 2].set(value)
    )
    lengths = {"query": 8, "document": 8}
    save_model(tmp_path / "ours", LoadedModel(TINY, params, None, None, {}, lengths), "a test")
    message = r"ours: parameter (params/)?groups/block_1/moe/w_in holds NaN or infinite"
    with pytest.raises(UserError, match=message):
        Embedder.load(tmp_path / "ours", weights=weights)
    if weights == "float32":
        # Through here go `init.source`, upcycling and teachers, too.
        with pytest.raises(UserError, match=message):
            open_model(tmp_path / "ours").load(single_device_mesh())
        with pytest.raises(UserError, match=message):
            export_model(tmp_path / "ours", tmp_path / "exported")
        assert not (tmp_path / "exported").exists()


# ---- Bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_layer", 1_000_000),
        ("n_embd", 1 << 40),
        ("vocab_size", -1),
        ("n_head", 0),
        ("n_layer", "12"),
        ("n_layer", True),
        ("num_experts", 1e9),
        ("type_vocab_size", []),
        ("n_inner", {}),
    ],
)
def test_sizes_have_bounds_that_are_said(key, value, tmp_path):
    write_folder(tmp_path, NOMIC | {key: value}, random_tensors(nomic_shapes(NOMIC)))
    message = rf"config\.json: {key}=.* must be a whole number from \d to [\d,]+$"
    with pytest.raises(UserError, match=message):
        open_published(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 1_000_000}, r"model\.num_layers=1000000 must be .* at most 1,000"),
        ({"width": "16"}, r"model\.width='16' is a str"),
        ({"norm_epsilon": -1.0}, r"model\.norm_epsilon=-1\.0 must be above 0"),
        ({"rotary_base": 10**400}, "too large a number"),
        ({"colour": 1}, "unknown config key"),
    ],
)
def test_cards_of_ours_have_them_too(change, message, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    edit(path, lambda old: old | {"model": old["model"] | change, "crc32": None})
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        open_model(tmp_path / "ours")


# ---- Random damage -------------------------------------------------------------------------------

HOSTILE = (
    *(None, True, -1, 0, 3.5, 1 << 70, 10**400, float("nan"), float("inf"), 1_000_000),
    *("", "x", "\0", "\ud800", "../..", "/etc/passwd", "a" * 5000, "❤\u2028\n"),
    *([], {}, [[]], [None], {"a": 1}, {"": {}}, [1, "x", {}], {"path": ".."}),
)


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(child, (*path, key))


def damaged_value(value, rng: random.Random):
    """`value` with a few of its parts replaced, removed, or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 4])):
        found = [place for place in places(value) if place]
        if not found:
            return rng.choice(HOSTILE)
        *path, key = rng.choice(found)
        node = value
        for part in path:
            node = node[part]
        if rng.random() < 0.2:
            del node[key]
        else:
            node[key] = copy.deepcopy(rng.choice(HOSTILE))
    return value


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(rng.choice([1, 3, 20])):
        place = rng.randrange(len(content) + 1)
        content[place : place + rng.choice([0, 1, 1, 9])] = rng.choice(
            [b"\0", b"\xff\xfe", b"{", b"]", b'"', b"9" * 40, b"", b"[" * 3000]
        )
    return bytes(content[: rng.randrange(len(content) + 1) if rng.random() < 0.2 else None])


def damaged(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damaged_bytes(content, rng)
    if rng.random() < 0.05:
        return json.dumps(rng.choice(HOSTILE)).encode()
    return json.dumps(damaged_value(json.loads(content), rng)).encode()


def read_published(folder):
    is_run(folder)
    read_settings(folder)
    config = read_config(folder)
    layout = bert if config.get("model_type") == "bert" else nomic
    model = layout.model_from_config(config, (), str(folder / "config.json"))
    if layout is bert:
        bert.first_position(config, str(folder / "config.json"))
    assert isinstance(model, EncoderConfig)


FILES = {
    "config.json": read_published,
    "modules.json": read_settings,
    "1_Pooling/config.json": read_settings,
    "2_Normalize/config.json": read_settings,
    "config_sentence_transformers.json": read_settings,
    "sentence_bert_config.json": lambda folder: (read_settings(folder), load_tokenizer(folder)),
    "tokenizer_config.json": lambda folder: (read_settings(folder), load_tokenizer(folder)),
    "special_tokens_map.json": load_tokenizer,
    "added_tokens.json": load_tokenizer,
    "tokenizer.json": load_tokenizer,
}


def check_damage(folder, file: str, read, tries: int, seed: int) -> int:
    """`read` either works or says in one line what is wrong; how often it said so."""
    path, refused = folder / file, 0
    original = path.read_bytes()
    for number in range(tries):
        rng = random.Random(f"{seed} {file} {number}")
        path.write_bytes(damaged(original, rng))
        try:
            read(folder)
        except UserError as error:
            line = str(error).encode("utf-8", "backslashreplace").decode()
            assert "\n" not in line and len(line) < 2000, (file, seed, number)
            refused += 1
        except BaseException as error:
            raise AssertionError(f"{file}, seed {seed}, try {number}") from error
    path.write_bytes(original)
    return refused


@pytest.mark.parametrize("file", FILES)
def test_damaged_files_of_published_folders(file, bert_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bert_folder, folder)
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (folder / name).write_text(json.dumps({"pad_token": "[PAD]", "[CLS]": 2}))
    edit(
        folder / "tokenizer_config.json",
        lambda old: old | {"added_tokens_decoder": {"2": {"content": "[CLS]", "special": True}}},
    )
    if file in ("special_tokens_map.json", "added_tokens.json"):
        edit(
            folder / "tokenizer_config.json",
            lambda old: {"tokenizer_class": old["tokenizer_class"]},
        )
    tries = 40 if file == "tokenizer.json" else 100
    assert check_damage(folder, file, FILES[file], tries, seed=0) > tries / 20


def test_damaged_cards_of_ours(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "ours")
    edit(tmp_path / "ours/config.json", lambda old: old | {"crc32": None})  # it names all first
    assert check_damage(tmp_path / "ours", "config.json", open_model, 40, seed=0) > 10


def test_damaged_nomic_configs(tmp_path):
    write_folder(tmp_path, NOMIC, {})
    assert check_damage(tmp_path, "config.json", read_published, 200, seed=0) > 20


def test_damaged_indices_and_headers(tmp_path):
    small = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}
    write_folder(tmp_path, {}, small)
    content = (tmp_path / "model.safetensors").read_bytes()

    def read(folder):
        tensors = Tensors(folder)
        for name in tensors.names:
            tensors.shape(name)
            tensors.read(name)

    (size,) = struct.unpack("<Q", content[:8])
    for number in range(150):
        rng = random.Random(number)
        header = damaged(content[8 : 8 + size], rng)
        length = len(header) if rng.random() < 0.8 else rng.choice([0, 1 << 40, 1 << 63, size])
        (tmp_path / "model.safetensors").write_bytes(
            struct.pack("<Q", length) + header + content[8 + size :]
        )
        try:
            read(tmp_path)
        except UserError as error:
            assert "\n" not in str(error), number
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "one.safetensors").write_bytes(content)
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check_damage(tmp_path, "model.safetensors.index.json", read, 100, seed=0) > 20


def test_configs_that_name_no_pad_token(tmp_path):
    """RoBERTa's positions start behind it."""
    for pad_id in (None, -1, 63, "1"):
        folder = tmp_path / f"pad {pad_id}"
        st_folders.save_encoder(folder, "XLMRoberta", vocab_size=64)
        edit(folder / "config.json", lambda old, pad_id=pad_id: old | {"pad_token_id": pad_id})
        with pytest.raises(UserError, match=r"config\.json: (key )?pad_token_id"):
            open_published(folder)
