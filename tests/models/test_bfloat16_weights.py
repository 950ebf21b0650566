"""Embedding with bfloat16 weights on a CPU: what is kept, what is computed, what is chosen."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import saved_model

from moe_embed_jax import embedder as embedder_module
from moe_embed_jax import weights as weights_module
from moe_embed_jax.conversion import export_model
from moe_embed_jax.embedder import Embedder
from moe_embed_jax.errors import UserError
from moe_embed_jax.kernels import cpu_products
from moe_embed_jax.mesh import MeshConfig, make_mesh, single_device_mesh
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.sharding import is_array, path_of
from moe_embed_jax.unstacked import Unstacked

MODEL = EncoderConfig(
    vocab_size=512, num_layers=3, width=64, num_heads=2, ffn_width=96, num_experts=4
)
IDS = [np.arange(5, 5 + n, dtype=np.int32) for n in (3, 17, 1, 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    saved_model.write(folder, MODEL, query_length=64, document_length=64)
    return folder


@pytest.fixture(scope="module")
def embedder(folder):
    return Embedder.load(folder, weights="bfloat16")


def test_matrices_alone_become_bfloat16(embedder, folder):
    float32 = Embedder.load(folder).params

    def leaves(params):
        flat = jax.tree_util.tree_leaves_with_path(
            params, is_leaf=lambda leaf: is_array(leaf) or isinstance(leaf, Unstacked)
        )
        return {path_of(path): leaf for path, leaf in flat}

    kept = leaves(embedder.params)
    for path, exact in leaves(float32).items():
        dtype = jnp.bfloat16 if path.endswith(saved_model.MATRICES) else jnp.float32
        assert kept[path].dtype == dtype, path
        rounded = jnp.asarray(exact).astype(dtype)
        np.testing.assert_array_equal(jnp.asarray(kept[path]), rounded, err_msg=path)
    assert embedder.model == dataclasses.replace(MODEL, dtype="bfloat16")


def test_embeddings_are_near_those_of_float32(embedder, folder, tmp_path):
    float32 = Embedder.load(folder)
    export_model(folder, tmp_path / "exported")
    exported = Embedder.load(tmp_path / "exported", weights="bfloat16")
    units = [
        embedder_module.unit_norm(each.embed_sequences(IDS))
        for each in (float32, embedder, exported)
    ]
    assert (units[0] * units[1]).sum(axis=1).min() > 0.9999
    assert np.abs(units[0] - units[1]).max() > 1e-5
    np.testing.assert_array_equal(units[1], units[2])
    kept, of_exported = (
        {(leaf.dtype, leaf.shape) for leaf in jax.tree.leaves(each.params)}
        for each in (embedder, exported)
    )
    assert kept == of_exported
    assert float32.identity(None) != embedder.identity(None)


def test_products_alone_are_bfloat16(embedder):
    """Products add up in float32, and no call copies a weight."""
    (call,) = embedder._calls([17])
    arrays = embedder._rows(call, [IDS[1]])
    with jax.set_mesh(embedder.mesh):
        lowered = embedder_module._pool_rows.lower(embedder.model, embedder.params, *arrays)
        text = lowered.compile().as_text()
    products = re.findall(
        r"stablehlo.dot_general.*\(tensor<(\S+)>, .*-> tensor<(\S+)>", lowered.as_text()
    )
    kinds = {tuple(shape.split("x")[-1] for shape in of_one) for of_one in products}
    assert kinds == {("bf16", "f32"), ("f32", "f32")}  # float32: router, pooling
    width, ffn = MODEL.width, MODEL.ffn_width
    for shape in (f"{width},{3 * width}", f"{width},{ffn}", f"{ffn},{width}"):
        made = re.findall(rf"= (?:bf16|f32)\[(?:1,)*{shape}\]\S* ([\w-]+)\(", text)
        assert set(made) <= {"parameter", "get-tuple-element", "bitcast"}, shape


@pytest.mark.parametrize(
    ("faster", "devices", "expected"),
    [(True, 1, "bfloat16"), (False, 1, "float32"), (True, 2, "float32")],
)
def test_auto_measures(faster, devices, expected, monkeypatch):
    monkeypatch.setattr(cpu_products, "bfloat16_is_faster", lambda: faster)
    mesh = single_device_mesh() if devices == 1 else make_mesh(MeshConfig())
    if mesh.size != devices:
        mesh = type("Mesh", (), {"devices": np.array([mesh.devices.flat[0]] * devices)})
    assert weights_module.chosen("auto", mesh) == expected


def test_several_devices_are_refused():
    mesh = type("Mesh", (), {"devices": np.array(jax.devices() * 2), "size": 2})
    with pytest.raises(
        UserError, match="weights='bfloat16' is for one CPU device; this mesh has 2"
    ):
        weights_module.chosen("bfloat16", mesh)
