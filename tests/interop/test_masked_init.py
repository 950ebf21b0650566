"""Where stage 1 starts from: XLM-RoBERTa with its head, an encoder without one."""

import pathlib

import jax
import numpy as np
import pytest
from helpers import synthetic_data
from helpers.forked import run_forked
from test_bert import SIZES, randomised

from moe_embed_jax.data.data_config import MaskedDataConfig
from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.model_folder import load_model
from moe_embed_jax.models.encoder import encode_tokens
from moe_embed_jax.models.heads import mlm_logits
from moe_embed_jax.stages.masked_lm import MaskedLM
from moe_embed_jax.training import init
from moe_embed_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_embed_jax.training.run_config import (
    MaskedInitConfig,
    MaskedLossConfig,
    MaskedRunConfig,
)
from moe_embed_jax.training.state import create_state, state_from_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROWS = 520  # of the file's word table, no multiple of 64; the tokenizer has 512 ids


def xlmr_config():
    sizes = SIZES | dict(vocab_size=ROWS, max_position_embeddings=70)
    return transformers.XLMRobertaConfig(**sizes, pad_token_id=1, type_vocab_size=1)


@pytest.fixture(scope="module")
def tokenizer(data_dir) -> bytes:
    preparation = synthetic_data.DOCUMENTS_PREPARATION
    return vocabulary_path(preparation, data_dir).read_bytes()


def save(model, folder: pathlib.Path, tokenizer: bytes) -> pathlib.Path:
    model.save_pretrained(folder)
    (folder / "sentencepiece.bpe.model").write_bytes(tokenizer)
    return folder


@pytest.fixture(scope="module")
def xlmr(tokenizer, tmp_path_factory):
    model = randomised(transformers.XLMRobertaForMaskedLM(xlmr_config()))
    return model, save(model, tmp_path_factory.mktemp("xlmr") / "hf", tokenizer)


def run_config(source, positions="rotary", row_length=2048) -> MaskedRunConfig:
    config = MaskedRunConfig(
        init=MaskedInitConfig(source=str(source), positions=positions),
        data=MaskedDataConfig(row_length=row_length),
    )
    return init.apply_source(config, pathlib.Path("no work directory"))[0]


def states_at_position_0(model, params, ids):
    """Token states where every token is at position 0: rotary positions turn nothing there."""
    with jax.set_mesh(single_device_mesh()):
        return encode_tokens(model, params, ids, np.zeros_like(ids), np.zeros_like(ids))[0]


def test_the_head_gives_the_logits_of_transformers(xlmr):
    """With positions out of the way on both sides: no table there, nothing turned here."""
    torch_model, folder = xlmr
    config = run_config(folder)
    assert (config.model.positions, config.model.vocab_size) == ("rotary", 576)
    params = init.initial_params(config, single_device_mesh())
    ids = np.random.default_rng(0).integers(4, ROWS, (3, 20)).astype(np.int32)
    x_RLD = states_at_position_0(config.model, params["encoder"], ids)
    logits = mlm_logits(
        config.model,
        params["head"],
        params["encoder"]["embeddings"]["token"],
        x_RLD.reshape(-1, 24),
    )
    table = torch_model.roberta.embeddings.position_embeddings.weight
    kept = table.detach().clone()
    with torch.no_grad():
        table.zero_()
        expected = torch_model(torch.tensor(ids)).logits.numpy()
        table.copy_(kept)
    logits = np.asarray(logits).reshape(3, 20, -1)
    np.testing.assert_allclose(logits[..., :ROWS], expected, atol=2e-5)
    # No token has the padded rows: zeros, and a bias that nothing overcomes.
    assert not np.asarray(params["encoder"]["embeddings"]["token"])[ROWS:].any()
    np.testing.assert_array_equal(logits[..., ROWS:], -100)


def test_an_encoder_without_a_head_gets_a_fresh_one(tokenizer, tmp_path):
    folder = save(transformers.XLMRobertaModel(xlmr_config()), tmp_path / "hf", tokenizer)
    config = run_config(folder)
    mesh = single_device_mesh()
    params = init.initial_params(config, mesh)
    assert set(params) == {"encoder"}
    step_config = MaskedLM(config.model, MaskedLossConfig(), 512)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1), 10)
    state = state_from_params(step_config, optimizer, mesh, params, seed=3)
    fresh = create_state(step_config, optimizer, mesh, seed=3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        state.params["head"],
        fresh.params["head"],
    )
    np.testing.assert_array_equal(
        state.params["encoder"]["embeddings"]["token"], params["encoder"]["embeddings"]["token"]
    )
    bias_V = np.asarray(state.params["head"]["bias"])
    assert (bias_V[512:] == -100).all() and not bias_V[:512].any()


def test_learned_positions_may_stay_where_rows_are_short_enough(xlmr):
    _, folder = xlmr
    with pytest.raises(UserError, match="row_length=2048 is more than the 68 positions"):
        run_config(folder, positions="learned")
    config = run_config(folder, positions="learned", row_length=68)
    assert (config.model.positions, config.model.max_positions) == ("learned", 68)
    params = init.initial_params(config, single_device_mesh())
    assert params["encoder"]["embeddings"]["position"].shape == (68, 24) and "head" in params


def test_a_run_from_xlm_roberta(xlmr, data_dir, tmp_path):
    """It starts from the weights, with the head, and keeps both in its checkpoints."""
    _, folder = xlmr
    path = folder / "sentencepiece.bpe.model"
    preparation = synthetic_data.DOCUMENTS_PREPARATION | {
        "vocabulary": {"kind": "file", "path": str(path)}
    }
    synthetic_data.write_documents(data_dir, preparation)
    config = tmp_path / "config.py"
    config.write_text(
        synthetic_data.masked_config_text(
            data_dir, steps=1, eval_every=0, init=dict(source=str(folder))
        )
    )
    workdir = tmp_path / "run"
    command = ["launch/train.py", f"--config={config}", f"--workdir={workdir}"]
    rate = "--config.optimizer.peak_learning_rate=0.0"
    result = run_forked([*command, rate, "--config.optimizer.warmup_steps=0"])
    assert result.returncode == 0, result.stderr
    assert "model.vocab_size: 250048 -> 576" in result.stdout
    ours = load_model(workdir, single_device_mesh())
    expected = init.initial_params(run_config(folder), single_device_mesh())
    found = {"encoder": ours.params, "head": ours.mlm_head}
    jax.tree.map(np.testing.assert_array_equal, found, expected)
