"""Two training steps on every kind of mesh of 8 devices against one device.

`python tests/stages/test_meshes.py` runs in a process of its own, on 8 fake devices.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest
from helpers.forked import run_forked

from moe_embed_jax.data.batches import FullPairBatch, abstract_batch, batch_shardings
from moe_embed_jax.data.packing import fill_rows, pack
from moe_embed_jax.losses.distillation_config import DistillationConfig
from moe_embed_jax.mesh import MeshConfig, make_mesh
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.stages.contrastive import Contrastive, batch_shapes, full_shapes
from moe_embed_jax.training.optimizer import make_optimizer
from moe_embed_jax.training.run_config import LossConfig, OptimizerConfig
from moe_embed_jax.training.state import abstract_state, create_state
from moe_embed_jax.training.step import jit_train_step

DEVICES, PAIRS, NEGATIVES, ROW_LENGTH, SLOTS, CHUNKS = 8, 4, 2, 24, 4, 2  # pairs per device
MODEL = EncoderConfig(
    vocab_size=128,
    num_layers=2,
    width=32,
    num_heads=2,
    ffn_width=48,
    num_experts=8,
    shared_expert_width=16,
)
TEACHER_WIDTH = 6
LOSS = LossConfig(
    dims={"32": 1.0, "8": 0.5},
    learn_temperature=True,
    distillation=DistillationConfig(
        vectors=0.5, scores=0.5, batch_scores=0.5, teacher_temperature=1.0
    ),
)
# (data, fsdp, expert, slice), what is different about the model there, chunks
MATRIX = [
    ((8, 1, 1), {}, CHUNKS),
    ((4, 2, 1), dict(remat_rows=1), CHUNKS),
    ((1, 8, 1), dict(remat_rows=2), 1),
    ((4, 1, 2), {}, CHUNKS),
    ((2, 2, 2), {}, CHUNKS),
    ((1, 1, 8), {}, 1),
    ((2, 1, 4), dict(expert_exchange="all_to_all", capacity_factor=8.0), CHUNKS),
    ((2, 2, 2), dict(expert_exchange="all_to_all", capacity_factor=8.0), 1),
    ((2, 1, 2, 2), {}, CHUNKS),
    ((2, 2, 1, 2), dict(remat_rows=1), 1),
]


@pytest.mark.slow
def test_every_mesh_equals_one_device():
    result = run_forked(["tests/stages/test_meshes.py"], devices=DEVICES, timeout=800)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal") == len(MATRIX), result.stdout


def make_batch(devices: int, chunks: int) -> FullPairBatch:
    """The same 32 pairs with ragged hard negatives, packed as 8 devices do, for 8 or for one."""
    rng = np.random.default_rng(0)
    width, parts = 2 + NEGATIVES, []
    for device in range(DEVICES):
        lengths = rng.integers(3, 14, width * PAIRS)
        packing = pack(lengths, ROW_LENGTH, SLOTS)
        texts = [rng.integers(4, 128, n) for n in lengths]
        rows = 2 * PAIRS * width // SLOTS  # enough for all, and a multiple of the chunks
        first_slot = device * rows * SLOTS if devices == 1 else 0
        slot = packing.slot(SLOTS).reshape(width, PAIRS) + first_slot
        parts.append((*fill_rows(packing, texts, rows, ROW_LENGTH, 1), slot[0], slot[1:].T))
    token, text_index, position, query_slot, document_slot = map(
        np.concatenate, zip(*parts, strict=True)
    )

    def in_chunks(array_RL):
        """Every device has the first half of its rows in the first chunk."""
        per_device = array_RL.reshape(devices, chunks, -1, ROW_LENGTH)
        return per_device.swapaxes(0, 1).reshape(chunks, -1, ROW_LENGTH)

    B = DEVICES * PAIRS
    ids = rng.integers(-(2**31), 2**31, (B, width, 2)).astype(np.int32)
    there = np.arange(1 + NEGATIVES) <= rng.integers(0, NEGATIVES + 1, B)[:, None]
    rows = map(in_chunks, (token, text_index, position))
    texts = query_slot, document_slot, ids[:, 0], ids[:, 1:], there
    teacher = rng.normal(size=(2, B, TEACHER_WIDTH)).astype(np.float32)
    scores = rng.normal(size=there.shape).astype(np.float32)
    return FullPairBatch(*rows, *texts, *teacher, scores, np.arange(B) % 2 == 0)


def train(mesh, model: EncoderConfig, chunks: int):
    """Metrics of two steps and the state after them."""
    config = Contrastive(model, LOSS, SLOTS, TEACHER_WIDTH)
    optimizer = make_optimizer(
        OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=1, epsilon=1e-6), 10
    )
    host = make_batch(mesh.size, chunks)
    batch = jax.device_put(host, batch_shardings(FullPairBatch, mesh))
    documents = 1 + NEGATIVES
    shapes = batch_shapes(host.token_CRL.shape, DEVICES * PAIRS, documents)
    shapes |= full_shapes(LOSS, DEVICES * PAIRS, documents, TEACHER_WIDTH)
    abstract = abstract_batch(mesh, FullPairBatch, **shapes)
    state = create_state(config, optimizer, mesh, seed=0)
    with jax.set_mesh(mesh):
        step = jit_train_step(config, optimizer, mesh).jitted
        lowered = step.lower(abstract_state(config, optimizer, mesh), abstract)
        compiled = lowered.compile()
        history = []
        for _ in range(2):
            state, metrics = compiled(state, batch)
            history.append(jax.device_get(metrics))
    return history, state


def check_placement(shape, state):
    """Moments are split over all axes of a slice (ZeRO), experts and theirs live on their shard."""
    data, fsdp, expert = shape[:3]
    adam = state.opt_state[1][0]
    for w_in, splits in (
        (state.params["encoder"]["groups"]["block_1"]["moe"]["w_in"], (expert, fsdp, 1)),
        (adam.mu["encoder"]["groups"]["block_1"]["moe"]["w_in"], (expert, fsdp, data)),
    ):
        held = w_in.addressable_shards[0].data
        assert held.size * math.prod(splits) == w_in.size, (shape, held.shape)
        assert held.shape[1] <= MODEL.num_experts // expert


def main():
    expected, one_state = train(make_mesh(MeshConfig(1), jax.devices()[:1]), MODEL, CHUNKS)
    one = jax.device_get(one_state.params)
    for shape, changes, chunks in MATRIX:
        model = dataclasses.replace(MODEL, **changes)
        history, state = train(make_mesh(MeshConfig(*shape)), model, chunks)
        for ours, theirs in zip(history, expected, strict=True):
            assert ours["dropped"] == 0
            # A router tie that falls the other way would be no fault of the mesh: say so.
            np.testing.assert_allclose(ours["expert_load"], theirs["expert_load"], atol=1e-6)
            for name in ours:
                np.testing.assert_allclose(
                    ours[name], theirs[name], rtol=1e-5, atol=1e-5, err_msg=f"{shape} {name}"
                )
        params = jax.device_get(state.params)
        jax.tree_util.tree_map_with_path(
            lambda path, a, b, shape=shape: np.testing.assert_allclose(
                a, b, rtol=0, atol=1e-5, err_msg=f"{shape} {jax.tree_util.keystr(path)}"
            ),
            params,
            one,
        )
        check_placement(shape, state)
        print(f"{shape} {changes} in {chunks} chunk(s): equal", flush=True)


if __name__ == "__main__":
    main()
