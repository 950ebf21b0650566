"""Embedding with int8 weights: what is kept, what is computed, what it costs in memory."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_python
from helpers import saved_model, synthetic_data
from helpers.forked import run_forked
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_embed_jax import Embedder
from moe_embed_jax.checkpoint import Checkpoints
from moe_embed_jax.conversion import export_model
from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import MeshConfig, make_mesh, single_device_mesh
from moe_embed_jax.models.encoder import EncoderConfig, init_params
from moe_embed_jax.models.int8_weight import Int8Weight, quantized
from moe_embed_jax.sharding import is_array, path_of

MODEL = EncoderConfig(
    vocab_size=512, num_layers=5, width=32, num_heads=2, ffn_width=48, num_experts=4
)
TEXTS = ["tanara nobipo", "situno", "", "kapehu rameku jikiki gapehu " * 20, "нет 你好"]


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    source = vocabulary_path(synthetic_data.PREPARATION, data_dir)
    (folder / "sentencepiece.model").write_bytes(source.read_bytes())
    saved_model.write(folder, MODEL, query_length=16, document_length=64)
    return folder


@pytest.fixture(scope="module")
def embedder(folder):
    return Embedder.load(folder, weights="int8")


def leaves(params) -> dict:
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_array)
    return {path_of(path): leaf for path, leaf in flat}


def as_arrays(params):
    return jax.tree.map(
        lambda leaf: leaf.__jax_array__() if isinstance(leaf, Int8Weight) else leaf,
        params,
        is_leaf=is_array,
    )


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, st.tuples(*[st.integers(1, 5)] * 3), elements=st.floats(-9, 9, width=32)),
    st.sampled_from(["groups/block_0/attention/qkv/kernel", "layers/1/moe/w_in"]),
)
def test_error_is_half_a_scale_per_output_channel(kernel, path):
    weight = quantized(path, kernel)
    assert weight.values.dtype == np.int8 and weight.scale.shape == (
        len(kernel),
        1,
        kernel.shape[2],
    )
    assert weight.shape == kernel.shape and weight.ndim == 3 and weight.dtype == np.float32
    difference = np.abs(np.asarray(jnp.asarray(weight)) - kernel)
    assert np.all(difference <= weight.scale * (0.5 + 1e-5))
    largest = np.abs(weight.values.astype(int)).max(axis=1, keepdims=True)
    assert np.all(largest[weight.scale > 1e-30] == 127)


def test_word_table_has_a_scale_per_row(monkeypatch):
    monkeypatch.setattr("moe_embed_jax.models.int8_weight.PIECE", 64)
    table = np.random.default_rng(0).standard_normal((50, 16), np.float32)
    table[7] = 0  # a row that no text has
    weight = quantized("embeddings/token", table)
    assert weight.scale.shape == (50, 1)
    ids = np.array([[3, 7], [49, 3]])
    rows = weight[ids]
    assert np.all(np.abs(rows - table[ids]) <= weight.scale[ids] * (0.5 + 1e-5))
    np.testing.assert_array_equal(rows[0, 1], 0)


def test_matrices_alone_become_int8(embedder):
    for path, leaf in leaves(embedder.params).items():
        assert isinstance(leaf, Int8Weight) == path.endswith(saved_model.MATRICES), path
    kinds = {type(leaf) for leaf in leaves(embedder.params).values()}
    assert Int8Weight in kinds and len(kinds) == 2


@pytest.mark.parametrize("backend", ["blocked", "capacity"])
def test_the_layers_compute_with_what_the_weights_stand_for(embedder, backend):
    """The same embeddings as of a float32 model that has the rounded weights."""
    model = dataclasses.replace(MODEL, expert_backend=backend)
    arguments = (embedder.vocabulary, embedder.max_lengths, embedder.mesh)
    int8 = Embedder(model, embedder.params, *arguments).encode(TEXTS, "document")
    float32 = Embedder(model, as_arrays(embedder.params), *arguments).encode(TEXTS, "document")
    np.testing.assert_allclose(int8, float32, atol=2e-6)


def test_bfloat16_activations(embedder):
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    arguments = (embedder.vocabulary, embedder.max_lengths, embedder.mesh)
    embeddings = Embedder(model, embedder.params, *arguments).encode(TEXTS, "document")
    expected = embedder.encode(TEXTS, "document")
    assert (embeddings * expected).sum(axis=1).min() > 0.999


def test_embeddings_are_near_those_of_float32(embedder, folder):
    int8, float32 = (e.encode(TEXTS, "document") for e in (embedder, Embedder.load(folder)))
    cosine = (int8 * float32).sum(axis=1)
    assert cosine.min() > 0.999 and np.abs(int8 - float32).max() > 1e-5


def test_weights_of_a_published_checkpoint(folder, embedder, tmp_path):
    """Layer by layer out of safetensors, the same int8 as stacked out of a checkpoint."""
    export_model(folder, tmp_path / "exported")
    published = leaves(Embedder.load(tmp_path / "exported", weights="int8").params)
    for path, leaf in leaves(embedder.params).items():
        jax.tree.map(np.testing.assert_array_equal, leaf, published[path])


def test_other_entries(embedder):
    """Everything else that reads the parameters takes them too."""
    ids = np.array([[5, 6, 7, 1], [9, 9, 1, 1]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    states = embedder.hidden_states(ids, mask)
    mean = states.sum(axis=1) / mask.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(embedder.encode_ids(ids, mask, normalize=False), mean, atol=1e-5)
    np.testing.assert_allclose(embedder.expert_shares(TEXTS).sum(axis=1), 1, rtol=1e-5)


def test_identity_is_another_models(embedder, folder):
    int8, float32 = (e.identity("query") for e in (embedder, Embedder.load(folder)))
    assert int8["hash"] != float32["hash"] and int8["prefix"] == float32["prefix"]


def test_misuse(folder):
    with pytest.raises(
        UserError, match="weights='int4': choose one of float32, bfloat16, int8, auto"
    ):
        Embedder.load(folder, weights="int4")


def test_one_device_only(folder):
    code = (
        "from moe_embed_jax import Embedder\n"
        "from moe_embed_jax.errors import UserError\n"
        "from moe_embed_jax.mesh import MeshConfig, make_mesh\n"
        "try:\n"
        f"    Embedder.load({str(folder)!r}, mesh=make_mesh(MeshConfig()), weights='int8')\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    result = run_forked(["-c", code], devices=2)
    assert "int8' is for one CPU device; this mesh has 2" in result.stdout, result.stderr


MEMORY = """
import ctypes, pathlib, sys
import numpy as np
import moe_embed_jax.checkpoint  # Orbax itself is not counted as weights
from moe_embed_jax import Embedder
from moe_embed_jax.mesh import single_device_mesh

def memory(name):  # not ru_maxrss, which a process takes over from the one that started it
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0]) << 10

single_device_mesh()
before = memory("VmRSS")
embedder = Embedder.load(sys.argv[1], weights=sys.argv[2])
ctypes.CDLL(None).malloc_trim(0)  # what is free already does not count as loaded
loaded, loading = memory("VmRSS"), memory("VmHWM")
ids = np.arange(64)[None] % 500
x = embedder.encode_ids(ids, np.ones_like(ids))
assert np.isfinite(x).all()
print(loaded - before, loading - before, memory("VmHWM") - before)
"""


def test_memory(tmp_path):
    """Less than with float32 weights after loading, and at the peaks of loading and of use."""
    model = EncoderConfig(
        vocab_size=40_000, num_layers=12, width=384, num_heads=6, ffn_width=1536, num_experts=8
    )
    card = {"model": dataclasses.asdict(model), "data": {"query_length": 32, "document_length": 64}}
    (tmp_path / "config.json").write_text(json.dumps(card))
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), shapes)
    checkpoints.save(0, {}, params=params)
    checkpoints.close()
    total = 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert total > 300e6
    used = {}
    for weights in ("float32", "int8"):
        result = run_python(["-c", MEMORY, tmp_path, weights])
        assert result.returncode == 0, result.stderr
        used[weights] = [int(word) for word in result.stdout.split()]
    for float32, int8 in zip(*used.values(), strict=True):
        assert float32 - int8 > 0.2 * total, (total, used)
    assert 0.25 * total < used["int8"][0] < 0.6 * total, (total, used)
    assert used["float32"][0] > 0.9 * total, (total, used)  # the measure sees a copy


def test_a_mesh_of_one_device_is_the_default(folder):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    assert mesh == single_device_mesh()
    assert Embedder.load(folder, mesh=mesh, weights="int8").width == 32
