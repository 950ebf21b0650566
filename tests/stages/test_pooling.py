"""Mean, first and last token: as sentence-transformers pools, packed or alone, in every place."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import test_step
from helpers.published_models import NOMIC, nomic_shapes, random_tensors, write_folder

from moe_embed_jax import Embedder
from moe_embed_jax.conversion import export_model, import_model
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.models.encoder import EncoderConfig, encode_tokens
from moe_embed_jax.models.pooling import pool_texts
from moe_embed_jax.stages.contrastive import encode_batch
from moe_embed_jax.training import init
from moe_embed_jax.training.run_config import InitConfig, RunConfig
from moe_embed_jax.training.state import create_state

THEIRS = {"cls": "cls", "last": "lasttoken"}


def test_pooled_token_of_each_text():
    text_index_RL = np.array([[0, 0, 1, 2, 2, -1], [0, -1, -1, -1, -1, -1], [-1] * 6])
    x_RLD = np.arange(36, dtype=np.float32).reshape(3, 6, 2)
    first = pool_texts("cls", x_RLD, text_index_RL, 4)
    last = pool_texts("last", x_RLD, text_index_RL, 4)
    np.testing.assert_array_equal(first[0], [*x_RLD[0, [0, 2, 3]], [0, 0]])
    np.testing.assert_array_equal(last[0], [*x_RLD[0, [1, 2, 4]], [0, 0]])
    for pooled in (first, last):
        np.testing.assert_array_equal(pooled[1:, 0], [x_RLD[1, 0], [0, 0]])


def test_unknown_pooling_is_refused():
    with pytest.raises(UserError, match=r"model\.pooling='max': choose from"):
        EncoderConfig(pooling="max")


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_a_training_step_pools_the_texts_own_token(pooling):
    """Values are the token states themselves; gradients do not depend on packing or chunks."""
    model = dataclasses.replace(test_step.MODEL, pooling=pooling)
    config = dataclasses.replace(test_step.CONFIG, model=model)
    mesh = single_device_mesh()
    params = create_state(config, test_step.make_optimizer_of_tests(), mesh, seed=0).params
    batch = test_step.make_batch()
    with jax.set_mesh(mesh):
        query_BD = jax.jit(encode_batch, static_argnums=0)(config, params, batch)[0]
        rows = [array[0] for array in (batch.token_CRL, batch.text_index_CRL, batch.position_CRL)]
        x_RLD = jax.jit(encode_tokens, static_argnums=0)(model, params["encoder"], *rows)[0]
    expected = []
    for slot in batch.query_slot_B:
        row, text = divmod(int(slot), config.texts_per_row)
        own = np.flatnonzero(rows[1][row] == text)
        expected.append(x_RLD[row, own[0 if pooling == "cls" else -1]])
    np.testing.assert_allclose(query_BD, np.array(expected), atol=1e-6)

    loss, _, packed = test_step.gradients(config, params, batch)
    alone = dataclasses.replace(config, texts_per_row=1)
    chunked = test_step.make_batch(slots=1, chunks=2)
    other_loss, _, unpacked = test_step.gradients(alone, params, chunked)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-5)
    test_step.assert_close_gradients(packed, unpacked)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(packed)) > 1e-3


@pytest.fixture(scope="module", params=["cls", "last"])
def saved(request, tmp_path_factory):
    """(pooling, folder as sentence-transformers saves it)."""
    st_folders = pytest.importorskip("helpers.st_folders")
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return request.param, st_folders.save_model(folder, pooling=THEIRS[request.param])


def test_vectors_are_those_of_sentence_transformers(saved):
    from helpers import st_folders

    pooling, folder = saved
    embedder = Embedder.load(folder)
    assert embedder.model.pooling == pooling
    expected = st_folders.vectors(folder)
    np.testing.assert_allclose(embedder.encode(st_folders.TEXTS, None), expected, atol=1e-6)
    eight = Embedder.load(folder, weights="int8").encode(st_folders.TEXTS, None)
    assert (eight * expected).sum(axis=1).min() > 0.99


def test_padding_on_either_side(saved):
    """Of ids that the caller pads: the first and last token are those with mask 1."""
    import torch
    from helpers import st_folders

    _, folder = saved
    model = st_folders.load(folder)
    ids = np.random.default_rng(0).integers(5, 90, (3, 9))
    right = np.arange(9) < np.array([[9], [4], [1]])
    for mask in (right, right[:, ::-1]):
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask.astype(int))}
        with torch.no_grad():
            states = model[0].model(**inputs).last_hidden_state
            expected = model[1](inputs | {"token_embeddings": states})["sentence_embedding"]
        actual = Embedder.load(folder).encode_ids(ids, mask.astype(int), normalize=False)
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_import_training_and_export_keep_the_pooling(saved, tmp_path):
    from helpers import st_folders

    pooling, folder = saved
    imported, exported = tmp_path / "imported", tmp_path / "exported"
    import_model(folder, imported)
    expected = st_folders.vectors(folder)
    np.testing.assert_allclose(
        Embedder.load(imported).encode(st_folders.TEXTS, None), expected, atol=1e-6
    )
    config, changed = init.apply_source(RunConfig(init=InitConfig(source=str(imported))), tmp_path)
    assert config.model.pooling == pooling
    assert f"model.pooling: mean -> {pooling}" in changed
    export_model(imported, exported)
    said = json.loads((exported / "1_Pooling" / "config.json").read_text())
    on = [key for key, value in said.items() if key.startswith("pooling_mode") and value]
    assert on == [{"cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}[pooling]]
    np.testing.assert_allclose(st_folders.vectors(exported), expected, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_experts_leave_with_their_pooling(pooling, tmp_path):
    """The PyTorch file's `embed`, and a folder without modules.json."""
    torch_model = pytest.importorskip("test_torch_model").source
    import torch
    from safetensors.torch import load_file

    source = write_folder(
        tmp_path / "source", NOMIC | {"pooling": pooling}, random_tensors(nomic_shapes(NOMIC))
    )
    exported = tmp_path / "exported"
    export_model(source, exported)
    config = torch_model.NomicBertConfig(**json.loads((exported / "config.json").read_text()))
    model = torch_model.NomicBertModel(config).eval()
    model.load_state_dict(load_file(exported / "model.safetensors"))
    ids = np.random.default_rng(0).integers(5, 90, (3, 9))
    mask = (np.arange(9) < np.array([[9], [4], [1]])).astype(int)
    with torch.no_grad():
        theirs = model.embed(torch.tensor(ids), torch.tensor(mask)).numpy()
        left = model.embed(torch.tensor(ids[:1]), torch.tensor(mask[1:2, ::-1].copy())).numpy()
        own = model(torch.tensor(ids[:1]), torch.tensor(mask[1:2, ::-1].copy())).last_hidden_state
    np.testing.assert_allclose(Embedder.load(exported).encode_ids(ids, mask), theirs, atol=1e-6)
    np.testing.assert_allclose(Embedder.load(source).encode_ids(ids, mask), theirs, atol=1e-6)
    expected = own[0, 5 if pooling == "cls" else 8].numpy()
    np.testing.assert_allclose(left[0], expected / np.linalg.norm(expected), atol=1e-6)
