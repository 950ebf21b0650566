"""The masked-language-model step against a dense oracle, and what must not change its numbers.

`python tests/stages/test_masked_step.py` runs the mesh cases in another process, on 8 fake devices.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.forked import run_forked

from moe_embed_jax.data.batches import MaskedBatch, abstract_batch, batch_shardings
from moe_embed_jax.data.masking import Masking, most_hidden
from moe_embed_jax.data.packing import fill_rows, pack
from moe_embed_jax.losses.masked_lm import masked_cross_entropy
from moe_embed_jax.mesh import MeshConfig, make_mesh, single_device_mesh
from moe_embed_jax.models.encoder import EncoderConfig, encode_tokens
from moe_embed_jax.stages.masked_lm import MaskedLM, batch_shapes
from moe_embed_jax.training.optimizer import make_optimizer
from moe_embed_jax.training.run_config import MaskedLossConfig, OptimizerConfig
from moe_embed_jax.training.state import abstract_state, create_state, from_items, to_items
from moe_embed_jax.training.step import jit_train_step

DEVICES, ROWS, ROW_LENGTH, RATE, VOCABULARY = 8, 16, 24, 0.3, 120
MODEL = EncoderConfig(
    vocab_size=128, num_layers=2, width=32, num_heads=2, ffn_width=48, moe_every=0
)
CONFIG = MaskedLM(MODEL, MaskedLossConfig(predictions_at_once=32), VOCABULARY)
MOE = dataclasses.replace(
    CONFIG, model=dataclasses.replace(MODEL, moe_every=2, num_experts=8, experts_per_token=2)
)
LOSS = MaskedLM.loss_and_metrics
MASKING = Masking(RATE, 0.8, 0.1, np.arange(4, VOCABULARY - 1), VOCABULARY - 1)
# loss, masked_loss, balance, grad_norm of three steps with experts; renew as in test_step.py.
GOLDEN = [
    [5.86769, 4.80142, 1.06627, 2.31878],
    [5.82883, 4.78234, 1.04649, 1.88419],
    [5.76518, 4.74646, 1.01871, 1.51207],
]


def make_rows():
    """ROWS rows of several documents each, some padding: token, text index, position."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, 3 * ROWS)
    packing = pack(lengths, ROW_LENGTH, ROW_LENGTH)
    texts = [np.concatenate([[0], rng.integers(4, VOCABULARY - 1, n - 2), [2]]) for n in lengths]
    assert packing.rows < ROWS
    return fill_rows(packing, texts, ROWS, ROW_LENGTH, 1)


def make_batch(chunks=1, devices=1) -> MaskedBatch:
    """Device d has the d-th part of the rows, in chunks."""
    token_RL, text_index_RL, position_RL = make_rows()
    hidden = [MASKING.hide(token_L, 0, 0, row) for row, token_L in enumerate(token_RL)]
    arrays = [np.stack(part) for part in zip(*hidden, strict=True)]
    arrays[1:1] = [text_index_RL, position_RL]

    def in_chunks(array):
        per_device = array.reshape(devices, chunks, -1, array.shape[-1])
        return per_device.swapaxes(0, 1).reshape(chunks, -1, array.shape[-1])

    return MaskedBatch(*map(in_chunks, arrays))


@pytest.fixture(scope="module")
def optimizer():
    return make_optimizer(OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=1), 10)


def make_params(config, optimizer):
    params = create_state(config, optimizer, single_device_mesh(), seed=0).params
    # Fresh norms and biases would hide mistakes in them.
    rng = np.random.default_rng(1)
    head = params["head"]
    for part in (head["dense"], head["norm"]):
        for name in ("bias", "scale"):
            if name in part:
                part[name] += 0.3 * rng.standard_normal(part[name].shape, np.float32)
    head["bias"] += 0.3 * rng.standard_normal(head["bias"].shape, np.float32)
    return params


def gradients(function, config, params, batch):
    """((loss, metrics), gradients) on one device."""
    function = jax.value_and_grad(function, argnums=1, has_aux=True)
    with jax.set_mesh(single_device_mesh()):
        return jax.jit(function, static_argnums=0)(config, params, batch)


def dense_oracle(config, params, batch: MaskedBatch):
    """Logits of every token: no pieces, and nothing of the head but its formula."""
    token, text_index, position = (
        getattr(batch, f"{n}_CRL").reshape(-1, ROW_LENGTH)
        for n in ("token", "text_index", "position")
    )
    head, encoder = params["head"], params["encoder"]
    x_RLD, _ = encode_tokens(config.model, encoder, token, text_index, position)
    word = encoder["embeddings"]["token"]
    hidden = jax.nn.gelu(x_RLD @ head["dense"]["kernel"] + head["dense"]["bias"], approximate=False)
    mean = hidden.mean(-1, keepdims=True)
    variance = ((hidden - mean) ** 2).mean(-1, keepdims=True)
    hidden = (hidden - mean) / jnp.sqrt(variance + config.model.norm_epsilon)
    hidden = hidden * head["norm"]["scale"] + head["norm"]["bias"]
    log_p = jax.nn.log_softmax(hidden @ word.T + head["bias"])
    column, target = (
        getattr(batch, f"{n}_CRP").reshape(len(token), -1) for n in ("column", "target")
    )
    # The hidden token of every slot of the rows, -1 elsewhere.
    target_RL = jnp.full(token.shape, -1).at[jnp.arange(len(token))[:, None], column].max(target)
    own = jnp.take_along_axis(log_p, jnp.maximum(target_RL, 0)[..., None], axis=-1)[..., 0]
    count = (target_RL >= 0).sum()
    return -jnp.where(target_RL >= 0, own, 0.0).sum() / count, count


def assert_close_gradients(actual, expected, relative=1e-4):
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a,
            b,
            rtol=0,
            atol=relative * max(np.abs(b).max(), 1e-3),
            err_msg=jax.tree_util.keystr(path),
        ),
        actual,
        expected,
    )


@pytest.mark.parametrize("at_once", [7, 4096])
def test_the_loss_is_the_dense_one_whatever_the_pieces(optimizer, at_once):
    loss = MaskedLossConfig(predictions_at_once=at_once)
    config = dataclasses.replace(CONFIG, loss=loss)
    params = make_params(config, optimizer)
    batch = make_batch()
    (actual, metrics), grads = gradients(LOSS, config, params, batch)
    (expected, count), expected_grads = gradients(dense_oracle, config, params, batch)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert metrics["predictions"] == count > 50
    assert_close_gradients(grads, expected_grads)
    assert np.abs(expected_grads["head"]["bias"]).max() > 1e-4


@pytest.mark.parametrize(("chunks", "changes"), [(2, {}), (8, dict(remat_rows=1))])
def test_chunks_change_nothing(optimizer, chunks, changes):
    """Loss, gradients, statistics and balance of the whole batch, with experts."""
    params = make_params(MOE, optimizer)
    (loss, metrics), grads = gradients(LOSS, MOE, params, make_batch())
    config = dataclasses.replace(MOE, model=dataclasses.replace(MOE.model, **changes))
    (other, other_metrics), other_grads = gradients(LOSS, config, params, make_batch(chunks))
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other_metrics, metrics
    )
    assert metrics["balance"] >= 1 and metrics["loss"] > metrics["masked_loss"]
    assert_close_gradients(other_grads, grads)


def test_packed_is_one_document_per_row(optimizer):
    """Attention and positions stay inside a document."""
    params = make_params(CONFIG, optimizer)
    batch = jax.tree.map(lambda a: a[0], make_batch())
    token, text_index, position, column, target = jax.tree.leaves(batch)
    alone = []
    for row in range(ROWS):
        for text in range(text_index[row].max() + 1):
            mine = text_index[row] == text
            arrays = np.full((3, ROW_LENGTH), [[1], [-1], [0]])
            arrays[:, : mine.sum()] = (
                token[row, mine],
                mine[mine].astype(int) - 1,
                position[row, mine],
            )
            there = (target[row] >= 0) & mine[column[row]]
            places = np.zeros((2, target.shape[1]), int)
            places[1] = -1
            places[:, : there.sum()] = column[row, there] - mine.argmax(), target[row, there]
            alone.append((*arrays, *places))
    unpacked = MaskedBatch(*(np.stack(part)[None] for part in zip(*alone, strict=True)))
    assert unpacked.token_CRL.shape[1] == 3 * ROWS
    (expected, _), expected_grads = gradients(LOSS, CONFIG, params, unpacked)
    (actual, _), grads = gradients(LOSS, CONFIG, params, make_batch())
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert_close_gradients(grads, expected_grads)


def test_padding_does_not_matter(optimizer):
    params = make_params(CONFIG, optimizer)
    batch = make_batch()
    noise = np.where(batch.text_index_CRL < 0, 77, batch.token_CRL)
    column = np.where(batch.target_CRP < 0, 5, batch.column_CRP)
    other = dataclasses.replace(batch, token_CRL=noise, column_CRP=column)
    (loss, metrics), grads = gradients(LOSS, CONFIG, params, batch)
    (other_loss, other_metrics), other_grads = gradients(LOSS, CONFIG, params, other)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    jax.tree.map(np.testing.assert_allclose, other_metrics, metrics)
    assert_close_gradients(other_grads, grads, 1e-6)


def test_sums_of_nothing():
    sums = masked_cross_entropy(jnp.zeros((3, 5)), jnp.full(3, -1))
    assert jax.tree.map(float, sums.means()) == (0.0, 0.0)
    sums = masked_cross_entropy(jnp.zeros((3, 5)), jnp.array([-1, 2, 0]))
    np.testing.assert_allclose(sums.means(), (np.log(5), 1.0), rtol=1e-6)


def test_golden_numbers(optimizer):
    mesh = single_device_mesh()
    step = jit_train_step(MOE, optimizer, mesh)
    state = create_state(MOE, optimizer, mesh, seed=0)
    actual = []
    for _ in range(3):
        state, metrics = step(state, make_batch())
        names = ("loss", "masked_loss", "balance", "grad_norm")
        actual.append([float(metrics[name]) for name in names])
    print(np.round(actual, 5).tolist())
    np.testing.assert_allclose(actual, GOLDEN, rtol=2e-4)
    # It starts at guessing: no fresh logit differs much from another.
    assert abs(actual[0][1] - np.log(VOCABULARY)) < 0.2


def test_the_head_is_a_tree_of_its_own_in_checkpoints(optimizer):
    state = create_state(CONFIG, optimizer, single_device_mesh(), seed=0)
    items = to_items(state)
    assert set(items) == {"params", "optimizer", "mlm_head"}
    assert set(items["params"]) == {"embeddings", "groups"}
    jax.tree.map(np.testing.assert_array_equal, from_items(items), state)
    bias_V = np.asarray(items["mlm_head"]["bias"])
    assert (bias_V[:VOCABULARY] == 0).all() and (bias_V[VOCABULARY:] == -100).all()


def test_bfloat16_is_close(optimizer):
    params = make_params(CONFIG, optimizer)
    half = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dtype="bfloat16"))
    (loss, _), grads = gradients(LOSS, CONFIG, params, make_batch())
    (other, _), other_grads = gradients(LOSS, half, params, make_batch(2))
    np.testing.assert_allclose(other, loss, rtol=0.01)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(other_grads))
    assert_close_gradients(other_grads, grads, 0.1)


def test_memory_holds_the_logits_of_one_piece_only(optimizer):
    """Temporaries of the compiled step: far below the logits of all hidden tokens, and they grow
    with `predictions_at_once`, not with the batch."""
    mesh = single_device_mesh()
    model = dataclasses.replace(MODEL, vocab_size=65_536, remat_rows=1, num_layers=1)
    predictions = most_hidden(128, RATE)
    temporaries = {}
    for rows, at_once in ((16, 64), (64, 64), (64, 256)):
        loss = MaskedLossConfig(predictions_at_once=at_once)
        config = MaskedLM(model, loss, model.vocab_size)
        batch = abstract_batch(mesh, MaskedBatch, **batch_shapes((1, rows, 128), predictions))
        state = abstract_state(config, optimizer, mesh)
        step = jit_train_step(config, optimizer, mesh)
        with jax.set_mesh(mesh):
            compiled = step.jitted.lower(state, batch).compile()
        temporaries[rows, at_once] = compiled.memory_analysis().temp_size_in_bytes
    print(temporaries)
    one_logit = model.vocab_size * 4
    everything = 64 * predictions * one_logit  # 654 MB
    assert temporaries[64, 64] < everything / 4
    assert temporaries[64, 64] - temporaries[16, 64] < everything / 40
    assert 192 * one_logit < temporaries[64, 256] - temporaries[64, 64] < 4 * 192 * one_logit


# ---- Meshes --------------------------------------------------------------------------------------

# (data, fsdp, expert, slice), config, what is different about its model there, chunks
MATRIX = [
    ((8, 1, 1), CONFIG, {}, 2),
    ((2, 4, 1), CONFIG, dict(remat_rows=1), 1),
    ((2, 2, 2), MOE, {}, 2),
    ((2, 2, 1, 2), CONFIG, {}, 2),
    ((2, 1, 2, 2), MOE, {}, 2),
]


@pytest.mark.slow
def test_every_mesh_equals_one_device():
    result = run_forked(["tests/stages/test_masked_step.py"], devices=DEVICES, timeout=800)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal") == len(MATRIX), result.stdout


def train(mesh, config, chunks):
    """Metrics of two steps and the parameters after them."""
    optimizer = make_optimizer(
        OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=1, epsilon=1e-6), 10
    )
    batch = jax.device_put(make_batch(chunks, mesh.size), batch_shardings(MaskedBatch, mesh))
    state = create_state(config, optimizer, mesh, seed=0)
    step = jit_train_step(config, optimizer, mesh)
    history = []
    for _ in range(2):
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    return history, jax.device_get(state.params)


def main():
    expected = {}
    for shape, config, changes, chunks in MATRIX:
        if config not in expected:
            expected[config] = train(make_mesh(MeshConfig(1), jax.devices()[:1]), config, 1)
        model = dataclasses.replace(config.model, **changes)
        found = train(
            make_mesh(MeshConfig(*shape)), dataclasses.replace(config, model=model), chunks
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            found,
            expected[config],
        )
        print(f"{shape} {changes} in {chunks} chunk(s): equal", flush=True)


if __name__ == "__main__":
    main()
