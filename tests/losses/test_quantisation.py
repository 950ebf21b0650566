"""Quantisation-aware training: its vectors are those of a compressed index, its gradient passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed_jax import search
from moe_embed_jax.errors import UserError
from moe_embed_jax.losses import contrast_config
from moe_embed_jax.losses.contrast import ContrastConfig, prepare, unit
from moe_embed_jax.losses.distillation_config import DistillationConfig
from moe_embed_jax.losses.quantisation import as_stored, binary_threshold, int8_scale
from moe_embed_jax.losses.reference import dense_infonce
from moe_embed_jax.search.compressed import BinaryVectors, Int8Vectors
from moe_embed_jax.training.run_config import LossConfig

B, M, D = 40, 3, 24


def texts(seed=0, offset=0.3):
    """Vectors with dimensions of different sizes and a common offset, ragged documents."""
    rng = np.random.default_rng(seed)
    sizes_D = rng.lognormal(size=D)
    shift_D = offset * rng.normal(size=D)
    query_BD = (rng.normal(size=(B, D)) * sizes_D + shift_D).astype(np.float32)
    document_BMD = (rng.normal(size=(B, M, D)) * sizes_D + shift_D).astype(np.float32)
    valid_BM = np.arange(M) <= rng.integers(0, M, B)[:, None]
    document_BMD[~valid_BM] = np.nan  # must never be read
    return query_BD, document_BMD, jnp.asarray(valid_BM)


@jax.jit
def unit_texts(query_BD, document_BMD, valid_BM, width_D):
    query_BD, document_BMD, _ = prepare(query_BD, document_BMD, valid_BM)
    width = width_D.shape[0]
    return unit(query_BD[:, :width]), unit(document_BMD[..., :width])


@pytest.mark.parametrize("width", [D, 10])
def test_vectors_and_scores_are_those_of_a_compressed_index(width):
    """Bit for bit, of every Matryoshka width: scales, thresholds, rounding."""
    query_BD, document_BMD, valid_BM = texts()
    q_BD, d_BMD = unit_texts(query_BD, document_BMD, valid_BM, np.zeros(width))
    documents_ND = np.asarray(d_BMD)[valid_BM]
    valid_BM = np.asarray(valid_BM)
    every_BN = np.broadcast_to(np.arange(len(documents_ND)), (B, len(documents_ND)))

    query, stored_BMD = jax.jit(as_stored, static_argnums=0)("int8", q_BD, d_BMD, valid_BM)
    index = Int8Vectors.compress(documents_ND)
    np.testing.assert_array_equal(jax.jit(int8_scale)(d_BMD), index.scale_D)
    np.testing.assert_array_equal(np.asarray(stored_BMD)[valid_BM], index.to_float())
    served_BN = index.scores(np.asarray(q_BD), every_BN)
    np.testing.assert_allclose(query @ np.asarray(stored_BMD)[valid_BM].T, served_BN, atol=1e-6)

    query, stored_BMD = jax.jit(as_stored, static_argnums=0)("binary", q_BD, d_BMD, valid_BM)
    index = BinaryVectors.compress(documents_ND)
    threshold_D = jax.jit(binary_threshold)(d_BMD, valid_BM)
    np.testing.assert_allclose(threshold_D, index.threshold_D, atol=1e-7)
    factor = np.abs(documents_ND - index.threshold_D).mean()
    signs_ND = np.asarray(stored_BMD)[valid_BM] / factor
    np.testing.assert_allclose(signs_ND, index.signs(slice(None)), rtol=1e-5)
    served_BN = index.scores(np.asarray(q_BD), every_BN)
    scores_BN = query @ np.asarray(stored_BMD)[valid_BM].T
    np.testing.assert_allclose(scores_BN, served_BN * factor, rtol=1e-5, atol=1e-6)


def test_forms_are_those_of_indexes():
    assert contrast_config.FORMS == search.FORMS


@pytest.mark.parametrize("form", ["int8", "binary"])
def test_the_gradient_passes_straight_through(form):
    """It is the gradient of the loss with respect to the stored vectors, by differences in float64,
    through the normalisation of the vectors that they are made of."""
    query_BD, document_BMD, valid_BM = texts(1)
    ids = np.arange(2 * B * (M + 1)).reshape(B, M + 1, 2).astype(np.int32)
    ids = ids[:, 0], ids[:, 1:]
    config = ContrastConfig(temperature=0.2, quantisation={form: 1.0})

    def loss(query_BD, document_BMD):
        return dense_infonce(config, query_BD, document_BMD, *ids, valid_BM).loss

    found = jax.grad(loss, (0, 1))(query_BD, document_BMD)
    q_BD, d_BMD = (np.asarray(x, np.float64) for x in unit_texts(*texts(1), np.zeros(D)))
    threshold_D = d_BMD[np.asarray(valid_BM)].mean(axis=0)
    stored_BMD = np.asarray(as_stored(form, q_BD, d_BMD, valid_BM)[1], np.float64)
    there_BM = np.asarray(valid_BM)

    def from_stored(q_BD, stored_BMD):
        """The loss in float64 of unit queries and stored documents."""
        if form == "binary":
            q_BD = q_BD - threshold_D
        scores_BN = q_BD @ stored_BMD[there_BM].T / 0.2
        own_B = np.sum(q_BD * stored_BMD[:, 0], axis=1) / 0.2
        return np.mean(np.log(np.sum(np.exp(scores_BN - own_B[:, None]), axis=1)))

    np.testing.assert_allclose(loss(query_BD, document_BMD), from_stored(q_BD, stored_BMD), 1e-5)
    rng = np.random.default_rng(2)
    lengths = np.linalg.norm(query_BD, axis=1), np.linalg.norm(np.nan_to_num(document_BMD), axis=2)
    for place, (units, length) in enumerate(zip((q_BD, d_BMD), lengths, strict=True)):
        direction = rng.normal(size=units.shape)
        # What a step of the raw vectors does to the unit vectors: no length, and 1 / length of it.
        turned = direction - units * np.sum(units * direction, axis=-1, keepdims=True)
        turned = np.where(length[..., None] > 0, turned / np.maximum(length[..., None], 1e-9), 0)
        ends = []
        for sign in (1e-6, -1e-6):
            moved = [q_BD, stored_BMD]
            moved[place] = moved[place] + sign * turned
            ends.append(from_stored(*moved))
        assert np.isfinite(found[place]).all()
        slope = np.sum(found[place] * direction)
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=2e-4, atol=1e-6)


def test_losses_of_every_width_and_form_have_names_and_add_up():
    query_BD, document_BMD, valid_BM = texts(3)
    document_BMD[:, 0] = query_BD + document_BMD[:, 0] / 2  # the own document is near
    ids = np.arange(2 * B * (M + 1)).reshape(B, M + 1, 2).astype(np.int32)
    keys = dict(dims={24: 1.0, 8: 0.5}, temperature=0.1)

    def result(**more):
        config = ContrastConfig(**keys, **more)
        return dense_infonce(config, query_BD, document_BMD, ids[:, 0], ids[:, 1:], valid_BM)

    both = result(quantisation={"binary": 3.0, "float32": 2.0})
    assert list(both.loss_of) == ["24", "24_binary", "8", "8_binary"]  # float32 first
    parts = [float(loss) for loss in both.loss_of.values()]
    np.testing.assert_allclose(both.loss, np.dot([2.0, 3.0, 1.0, 1.5], parts), rtol=1e-6)
    plain = result()
    np.testing.assert_allclose(both.loss_of["8"], plain.loss_of["8"], rtol=1e-6)
    assert both.accuracy == plain.accuracy > 0.1


def test_forms_without_a_contrastive_loss_are_refused():
    only_teacher = DistillationConfig(vectors=1.0, contrast=0.0)
    with pytest.raises(UserError, match=r"loss\.quantisation .* loss\.distillation\.contrast=0"):
        LossConfig(quantisation={"int8": 1.0}, distillation=only_teacher)
    LossConfig(quantisation={"int8": 1.0}, distillation=DistillationConfig(vectors=1.0))


def test_an_empty_dimension_and_equal_documents_give_finite_numbers():
    """Scales of zeros are not divided by; documents that equal the mean have the sign -1."""
    document_BMD = jnp.zeros((B, 1, D)).at[:, :, 0].set(1.0)
    query_BD = document_BMD[:, 0]
    valid_BM = jnp.ones((B, 1), bool)
    for form in ("int8", "binary"):
        for array in as_stored(form, query_BD, document_BMD, valid_BM):
            assert np.isfinite(array).all()
    index = Int8Vectors.compress(np.asarray(document_BMD[:, 0]))
    np.testing.assert_array_equal(
        as_stored("int8", query_BD, document_BMD, valid_BM)[1][:, 0], index.to_float()
    )
