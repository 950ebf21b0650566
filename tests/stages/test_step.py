"""The training step on a fixed batch: golden numbers, and what must not change them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_embed_jax.data.batches import FullPairBatch, PairBatch, abstract_batch
from moe_embed_jax.data.packing import fill_rows, pack
from moe_embed_jax.losses.distillation_config import DistillationConfig
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.stages.contrastive import Contrastive, batch_shapes
from moe_embed_jax.training.optimizer import make_optimizer
from moe_embed_jax.training.run_config import LossConfig, OptimizerConfig
from moe_embed_jax.training.state import (
    abstract_state,
    create_state,
    from_items,
    to_items,
)
from moe_embed_jax.training.step import jit_train_step

PAIRS, ROW_LENGTH, SLOTS, TEACHER_WIDTH = 12, 40, 5, 6
MODEL = EncoderConfig(
    vocab_size=128, num_layers=2, width=32, num_heads=2, ffn_width=48, num_experts=4
)
CONFIG = Contrastive(MODEL, LossConfig(), SLOTS)
EVALUATE = jax.jit(Contrastive.loss_and_metrics, static_argnums=0)
# loss, contrastive_loss, balance, grad_norm of three steps. They change with initialisation, loss,
# routing or optimiser: if that was meant, print the new ones with `pytest -s` and put them here.
GOLDEN = [
    [5.07015, 4.02968, 1.04047, 47.01267],
    [4.40172, 3.36854, 1.03318, 34.94213],
    [3.38449, 2.36646, 1.01803, 20.82468],
]


def make_batch(
    row_length=ROW_LENGTH, slots=SLOTS, order=None, chunks=1, negatives=0, ragged=True
) -> PairBatch:
    """PAIRS pairs, each with up to `negatives` hard negatives (ragged: from none to all)."""
    return make_taught_batch(row_length, slots, order, chunks, negatives, ragged, PairBatch)


def make_taught_batch(
    row_length=ROW_LENGTH,
    slots=SLOTS,
    order=None,
    chunks=1,
    negatives=0,
    ragged=True,
    kind=FullPairBatch,
):
    """The same with vectors of a teacher."""
    rng = np.random.default_rng(0)
    width = 2 + negatives  # query, document, hard negatives
    lengths = rng.integers(3, 20, (width, PAIRS))
    sequences = [[rng.integers(4, 128, n) for n in side] for side in lengths]
    ids = rng.integers(-(2**31), 2**31, (width, PAIRS, 2)).astype(np.int32)
    there = np.ones((PAIRS, 1 + negatives), bool)
    if negatives and ragged:
        there[:, 1:] = np.arange(negatives) < rng.integers(0, negatives + 1, PAIRS)[:, None]
    teacher = rng.normal(size=(2, PAIRS, TEACHER_WIDTH)).astype(np.float32)
    scores = rng.normal(size=(PAIRS, 1 + negatives)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = np.nan  # not known
    in_batch = np.arange(PAIRS) % 3 > 0
    if order is not None:
        sequences = [[side[i] for i in order] for side in sequences]
        ids, there, teacher = ids[:, order], there[order], teacher[:, order]
        scores, in_batch = scores[order], in_batch[order]
    flat = [sequence for side in sequences for sequence in side]
    packing = pack([len(sequence) for sequence in flat], row_length, slots)
    rows = -(-(packing.rows + 1) // chunks) * chunks
    arrays = fill_rows(packing, flat, rows, row_length, 1)
    slot = packing.slot(slots).reshape(width, PAIRS)
    return kind(
        *(array.reshape(chunks, -1, row_length) for array in arrays),
        slot[0],
        slot[1:].T,
        ids[0],
        ids[1:].swapaxes(0, 1),
        there,
        *((*teacher, scores, in_batch) if kind is FullPairBatch else ()),
    )


@pytest.fixture(scope="module")
def optimizer():
    return make_optimizer_of_tests()


def make_optimizer_of_tests():
    return make_optimizer(OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=1), 10)


def test_golden_numbers(optimizer):
    mesh = single_device_mesh()
    step = jit_train_step(CONFIG, optimizer, mesh)
    state = create_state(CONFIG, optimizer, mesh, seed=0)
    actual = []
    for _ in range(3):
        state, metrics = step(state, make_batch())
        names = ("loss", "contrastive_loss", "balance", "grad_norm")
        actual.append([float(metrics[name]) for name in names])
    assert int(state.step) == 3
    print(np.round(actual, 5).tolist())
    np.testing.assert_allclose(actual, GOLDEN, rtol=2e-4)


def gradients(config, params, batch):
    """(loss, metrics, gradients) on one device."""
    function = jax.value_and_grad(Contrastive.loss_and_metrics, argnums=1, has_aux=True)
    with jax.set_mesh(single_device_mesh()):
        (loss, metrics), grads = jax.jit(function, static_argnums=0)(config, params, batch)
    return loss, metrics, grads


def assert_close_gradients(actual, expected, relative=1e-4):
    """Every parameter's gradient to `relative` of its own largest entry."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * max(np.abs(b).max(), 1e-3))


EVERYTHING = LossConfig(
    dims={"32": 1.0, "8": 0.5},
    learn_temperature=True,
    margin=0.3,
    distillation=DistillationConfig(vectors=0.7, contrast=0.9, scores=0.3, teacher_temperature=1.0),
)
TAUGHT = dataclasses.replace(CONFIG, loss=EVERYTHING, teacher_width=TEACHER_WIDTH)


def test_order_and_packing_of_the_pairs_do_not_matter(optimizer):
    config = TAUGHT
    params = create_state(config, optimizer, single_device_mesh(), seed=0).params
    rng = np.random.default_rng(3)
    loss, _, grads = gradients(config, params, make_taught_batch(negatives=2))
    shuffled = make_taught_batch(order=rng.permutation(PAIRS), negatives=2)
    alone = make_taught_batch(slots=1, negatives=2)
    for batch, slots in ((shuffled, SLOTS), (alone, 1)):
        other = gradients(dataclasses.replace(config, texts_per_row=slots), params, batch)
        np.testing.assert_allclose(other[0], loss, rtol=1e-5)
        assert_close_gradients(other[2], grads)


@pytest.mark.parametrize("chunks", [2, 8])
def test_chunks_change_nothing(optimizer, chunks):
    """GradCache: loss, gradients and balance of the whole batch, whatever the chunk size."""
    config = TAUGHT
    params = create_state(config, optimizer, single_device_mesh(), seed=0).params
    loss, metrics, grads = gradients(config, params, make_taught_batch(negatives=3))
    other_loss, other_metrics, other_grads = gradients(
        config, params, make_taught_batch(negatives=3, chunks=chunks)
    )
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    del metrics["utilisation"], other_metrics["utilisation"]  # chunks are whole rows
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other_metrics, metrics
    )
    assert_close_gradients(other_grads, grads)
    assert float(np.abs(grads["log_scale"])) > 1e-3
    assert grads["projection"].shape == (MODEL.width, TEACHER_WIDTH)
    assert np.abs(grads["projection"]).max() > 1e-4
    parts = 0.9 * metrics["contrastive_loss"] + 0.7 * metrics["distillation_vectors"]
    parts += 0.3 * metrics["distillation_scores"]
    assert metrics["distillation_scores"] > 0.1
    np.testing.assert_allclose(loss, parts + metrics["balance"], rtol=1e-6)


def test_memory_is_flat_in_the_batch_at_a_fixed_chunk(optimizer):
    """Temporaries of the compiled step: what grows with the batch is one vector per text."""
    mesh = single_device_mesh()
    model = dataclasses.replace(MODEL, width=64, ffn_width=256)
    config = Contrastive(model, LossConfig(), 4)
    temporaries = {}
    for chunks in (2, 4, 16):
        shapes = batch_shapes((chunks, 64, 64), pairs=128 * chunks, documents=1)
        state = abstract_state(config, optimizer, mesh)
        step = jit_train_step(config, optimizer, mesh)
        with jax.set_mesh(mesh):
            batch = abstract_batch(mesh, PairBatch, **shapes)
            compiled = step.jitted.lower(state, batch).compile()
        temporaries[chunks] = compiled.memory_analysis().temp_size_in_bytes
    growth = (temporaries[16] - temporaries[4]) / (12 * 256 * 64 * 4)  # in vectors per text
    assert growth < 16, f"{growth:.1f} vectors of a text, {temporaries}"
    assert temporaries[16] < 2 * temporaries[2], temporaries


def test_the_learned_temperature_moves_and_stays_in_its_bounds(optimizer):
    """So does its parameter, which has no gradient outside: it would never come back."""
    loss = LossConfig(learn_temperature=True, temperature_min=0.01999, temperature_max=0.02001)
    config = dataclasses.replace(CONFIG, loss=loss)
    mesh = single_device_mesh()
    step = jit_train_step(config, optimizer, mesh)
    state = create_state(config, optimizer, mesh, seed=0)
    before = float(state.params["log_scale"])
    for _ in range(4):
        state, metrics = step(state, make_batch())
        moved = float(state.params["log_scale"]) - before
        # The bounds are 0.0005 away, and the updates are as large as that.
        assert 1e-6 < abs(moved) <= math.log(0.02 / 0.01999) * 1.001
    assert 0.01999 * 0.99999 <= metrics["temperature"] <= 0.02001 * 1.00001
    assert metrics["temperature"] != pytest.approx(0.02, abs=1e-6)
    items = to_items(state)
    assert "log_scale" in items["optimizer"] and "encoder" not in items["params"]
    jax.tree.map(np.testing.assert_array_equal, from_items(items), state)


def test_a_bfloat16_step_is_near_the_float32_step_whatever_the_chunks(optimizer):
    """Parameters, gradients and routing are float32; every parameter moves."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dtype="bfloat16"))
    mesh = single_device_mesh()
    step = jit_train_step(config, optimizer, mesh)
    names = ("loss", "contrastive_loss", "balance", "grad_norm")
    values, moments = [], []
    for chunks in (1, 2):
        state = create_state(config, optimizer, mesh, seed=0)
        before = jax.device_get(state.params)
        batch = make_batch(chunks=chunks)
        with jax.set_mesh(mesh):
            # Otherwise XLA leaves out some roundings to bfloat16, others in another program.
            exact = step.jitted.lower(state, batch).compile({"xla_allow_excess_precision": False})
            state, metrics = exact(state, batch)
        values.append([float(metrics[name]) for name in names])
        moments.append(jax.device_get(optax.tree_utils.tree_get(state.opt_state, "mu")))
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(before), strict=True):
            assert a.dtype == np.float32 and np.isfinite(a).all() and (a != b).any()
    np.testing.assert_allclose(values[0], GOLDEN[0], rtol=3e-3)
    np.testing.assert_allclose(values[1], values[0], rtol=1e-5)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(moments))
    assert_close_gradients(*moments, 0.02)

    # Columns of the router that bfloat16 cannot tell apart: there every token would choose 0 and 1.
    state = create_state(config, optimizer, mesh, seed=0)
    router = state.params["encoder"]["groups"]["block_1"]["moe"]["router"]
    column_GD1 = router["kernel"][..., :1].astype(jnp.bfloat16).astype(jnp.float32)
    router["kernel"] = column_GD1 * (1 + 2.0**-12 * jnp.arange(4))
    _, metrics = step(state, make_batch(chunks=2))
    assert (metrics["expert_load"] > 0).all()


def test_hard_negatives_raise_the_loss_only_where_they_are(optimizer):
    params = create_state(CONFIG, optimizer, single_device_mesh(), seed=0).params
    plain, _, _ = gradients(CONFIG, params, make_batch())
    batch = make_batch(negatives=2)
    nobody = dataclasses.replace(batch, valid_BM=batch.valid_BM & (np.arange(3) == 0))
    with_none, metrics, _ = gradients(CONFIG, params, nobody)
    with_some, _, _ = gradients(CONFIG, params, batch)
    assert with_some > with_none
    assert metrics["masked_candidates"] == 0
    assert abs(float(plain) - float(with_none)) < 1.0  # other lengths, the same kind of batch


def test_balance_coefficient_scales_the_balance_loss_only(optimizer):
    params = create_state(CONFIG, optimizer, single_device_mesh(), seed=0).params
    with jax.set_mesh(single_device_mesh()):
        losses = {}
        for coefficient in (0.0, 1.0, 3.0):
            config = dataclasses.replace(CONFIG, loss=LossConfig(balance=coefficient))
            losses[coefficient], metrics = EVALUATE(config, params, make_batch())
    balance, contrastive = metrics["balance"], metrics["contrastive_loss"]
    assert 1 <= balance < 1.5
    for coefficient, loss in losses.items():
        np.testing.assert_allclose(loss, contrastive + coefficient * balance, rtol=1e-6)


def test_a_dense_model_has_no_balance(optimizer):
    model = dataclasses.replace(MODEL, moe_every=0)
    config = dataclasses.replace(CONFIG, model=model)
    params = create_state(config, optimizer, single_device_mesh(), seed=0).params
    with jax.set_mesh(single_device_mesh()):
        loss, metrics = EVALUATE(config, params, make_batch())
    assert "balance" not in metrics
    np.testing.assert_allclose(loss, metrics["contrastive_loss"])
