"""Parameters as arrays of their own: the same embeddings, and no copies of weights."""

import copy
import re

import jax
import numpy as np
import pytest

from moe_embed_jax import embedder as embedder_module
from moe_embed_jax.embedder import Embedder
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.models.encoder import EncoderConfig, init_params, unstack_params
from moe_embed_jax.unstacked import Unstacked, unstack

MODEL = EncoderConfig(
    vocab_size=64, num_layers=5, width=40, num_heads=2, ffn_width=44, num_experts=4, moe_every=2
)
IDS = [np.arange(5, 5 + n, dtype=np.int32) for n in (3, 17, 1, 40)]


@pytest.fixture(scope="module")
def embedders():
    """(stacked, unstacked)"""
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    both = copy.deepcopy(params), unstack_params(params)
    assert params == {}  # nothing holds the stacked arrays any more
    lengths = {"query": 64, "document": 64}
    return [Embedder(MODEL, each, None, lengths, single_device_mesh()) for each in both]


def test_equals_stacked_parameters(embedders):
    stacked, unstacked = (embedder.embed_sequences(IDS) for embedder in embedders)
    np.testing.assert_allclose(unstacked, stacked, atol=1e-6)
    assert embedders[0].identity(None) == embedders[1].identity(None)
    mask = np.ones((1, 17), int)
    stacked, unstacked = (each.hidden_states(IDS[1][None], mask) for each in embedders)
    np.testing.assert_allclose(unstacked, stacked, atol=1e-5)


def test_routing_statistics(embedders):
    """One row for each layer with experts, in their order."""
    statistics = []
    for embedder in embedders:
        (call,) = embedder._calls([17])
        statistics.append(embedder._run(call, [IDS[1]])[1].assignments_E)
    assert statistics[0].shape == (2, MODEL.num_experts)
    np.testing.assert_array_equal(*statistics)


def test_one_text_copies_no_weights(embedders):
    """Results with the shape of a matrix of a layer: only what reads the arguments is there."""
    made = []
    for embedder in embedders:
        (call,) = embedder._calls([17])
        arrays = embedder._rows(call, [IDS[1]])
        with jax.set_mesh(embedder.mesh):
            program = embedder_module._pool_rows.lower(MODEL, embedder.params, *arrays).compile()
        # up and w_in, down and w_out, whichever way they lie
        shape = rf"(?:{MODEL.width},{MODEL.ffn_width}|{MODEL.ffn_width},{MODEL.width})"
        lines = re.findall(rf"= f32\[(?:1,)*{shape}\]\S* ([\w-]+)\(", program.as_text())
        made.append(set(lines) - {"parameter", "get-tuple-element", "bitcast"})
    assert made[0]  # the scans slice
    assert not made[1]


def test_stands_for_the_stacked_array():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    one = Unstacked(tuple(Unstacked(tuple(map(jax.numpy.asarray, each))) for each in array))
    assert (one.shape, one.ndim, one.dtype) == (array.shape, 3, array.dtype)
    np.testing.assert_array_equal(jax.numpy.asarray(one), array)
    np.testing.assert_array_equal(np.concatenate(list(one.arrays())), array.reshape(-1))
    assert one.astype("bfloat16").dtype == "bfloat16"


def test_turned_stands_for_the_matrix():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    one = unstack(jax.numpy.asarray(array), 1, True, jax.devices()[0])
    assert (one.shape, one.ndim, one.dtype) == (array.shape, 3, array.dtype)
    np.testing.assert_array_equal(one[1].by_output_ND, array[1].T)
    np.testing.assert_array_equal(jax.numpy.asarray(one), array)
    np.testing.assert_array_equal(list(one.arrays()), array)
    np.testing.assert_array_equal(one[1][2], array[1, 2])
    assert one[0].astype("bfloat16").dtype == "bfloat16"
