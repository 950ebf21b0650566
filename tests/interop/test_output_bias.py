"""Models whose experts have no output bias, which llama.cpp's converter would drop."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from helpers import synthetic_data
from helpers.published_models import NOMIC, nomic_shapes, random_tensors, write_folder
from safetensors.numpy import load_file, save_file

from moe_embed_jax import Embedder
from moe_embed_jax.conversion import export_model, import_model
from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.output_bias import drop_output_bias
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.model_folder import load_model, open_model, save_model
from moe_embed_jax.models.encoder_config import EncoderConfig
from moe_embed_jax.models.upcycle_config import UpcycleConfig
from moe_embed_jax.training import init
from moe_embed_jax.training.run_config import InitConfig, RunConfig

IDS = np.random.default_rng(0).integers(4, 100, (3, 12))
BIASES = [f"encoder.layers.{i}.mlp.experts.bias" for i in (1, 3)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Published, with biases that matter."""
    folder = tmp_path_factory.mktemp("biased") / "source"
    return write_folder(folder, NOMIC, random_tensors(nomic_shapes(NOMIC)))


@pytest.fixture(scope="module")
def dropped(source):
    loaded = load_model(source, single_device_mesh())
    model, params, size = drop_output_bias(loaded.model, loaded.params)
    return dataclasses.replace(loaded, model=model, params=params), size


def embed(folder):
    return Embedder.load(folder).encode_ids(IDS, IDS >= 0)


def test_drop_is_a_zero_bias(source, dropped, tmp_path):
    """Of the same model in the published layout, and nothing else changes."""
    loaded, size = dropped
    tensors = load_file(source / "model.safetensors")
    expected_size = np.sqrt(np.mean([np.square(tensors[name]) for name in BIASES]))
    np.testing.assert_allclose(size, expected_size, rtol=1e-6)
    for name in BIASES:
        tensors[name] = np.zeros_like(tensors[name])
    zeroed = write_folder(tmp_path / "zeroed", NOMIC, tensors)
    save_model(tmp_path / "ours", loaded, "test")
    np.testing.assert_allclose(embed(tmp_path / "ours"), embed(zeroed), atol=1e-6)
    assert np.abs(embed(source) - embed(zeroed)).max() > 1e-3
    with pytest.raises(UserError, match="no output bias of experts"):
        drop_output_bias(loaded.model, loaded.params)


def test_it_leaves_with_zeros_and_comes_back_without(dropped, tmp_path):
    save_model(tmp_path / "ours", dropped[0], "test")
    export_model(tmp_path / "ours", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == nomic_shapes(NOMIC).keys()
    assert not any(tensors[name].any() for name in BIASES)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["moe_expert_output_bias"]) == ("nomic_bert", False)
    import_model(tmp_path / "out", tmp_path / "again")
    assert not open_model(tmp_path / "again").model.expert_output_bias
    np.testing.assert_array_equal(embed(tmp_path / "again"), embed(tmp_path / "ours"))
    # Fine-tuned elsewhere since: the key is no longer true.
    tensors[BIASES[1]][3] = 0.5
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.3\.mlp\.experts\.bias is not zero, but config"):
        open_model(tmp_path / "out")


def test_a_run_starts_without_the_bias_of_its_source(source, tmp_path, monkeypatch, capsys):
    opened = open_model(source)
    config = RunConfig(
        model=EncoderConfig(expert_output_bias=False), init=InitConfig(source=str(source))
    )
    monkeypatch.setattr(init.config_files, "stated", lambda _: {"model.expert_output_bias"})
    opened.vocabulary_path = tmp_path / "vocabulary.model"
    monkeypatch.setattr("moe_embed_jax.model_folder.open_model", lambda *_, **__: opened)
    resolved, _ = init.apply_source(config, tmp_path)
    assert resolved.model == dataclasses.replace(opened.model, expert_output_bias=False)
    params = init.initial_params(resolved, single_device_mesh())["encoder"]
    assert "bias" not in params["groups"]["block_1"]["moe"]
    assert "output bias of the experts dropped (root mean square " in capsys.readouterr().out


def test_upcycling_without():
    from moe_embed_jax.interop.upcycle import upcycle, upcycled_model
    from moe_embed_jax.models.encoder import init_params

    dense = EncoderConfig(
        vocab_size=64, num_layers=2, width=16, num_heads=2, ffn_width=24, moe_every=0
    )
    params = jax.jit(init_params, static_argnums=0)(dense, jax.random.key(0))
    config = UpcycleConfig("paper", num_experts=4, expert_output_bias=False)
    model, sparse = upcycle(dense, params, config)
    assert model == upcycled_model(dense, config) and not model.expert_output_bias
    assert "bias" not in sparse["groups"]["block_1"]["moe"]
    with pytest.raises(UserError, match="expert_output_bias=False: the dense layer's output bias"):
        UpcycleConfig("preserving", expert_output_bias=False)


def test_the_cost_of_dropping_it_is_printed(data_dir, tmp_path, capsys):
    """The lowest cosine of the golden texts, as the two models' own vectors say."""
    from moe_embed_jax.interop.verify.golden import golden_texts

    config = NOMIC | dict(vocab_size=512)
    source = write_folder(tmp_path / "source", config, random_tensors(nomic_shapes(config)))
    pieces = vocabulary_path(synthetic_data.PREPARATION, data_dir)
    (source / "sentencepiece.bpe.model").write_bytes(pieces.read_bytes())
    export_model(source, tmp_path / "out", drop_expert_output_bias=True)
    said = float(re.search(r"with it ([\d.]+) at least", capsys.readouterr().out)[1])
    before, after = (Embedder.load(folder) for folder in (source, tmp_path / "out"))
    assert not after.model.expert_output_bias
    cosines = []
    for side in ("query", "document"):
        texts = [golden.text for golden in golden_texts(2048) if golden.prompt == side]
        cosines += (before.encode(texts, side) * after.encode(texts, side)).sum(axis=1).tolist()
    assert said < 0.999 and said == pytest.approx(min(cosines), abs=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "GGUF: exact" in card
    with pytest.raises(UserError, match="nothing to drop"):
        export_model(tmp_path / "out", tmp_path / "again", drop_expert_output_bias=True)
