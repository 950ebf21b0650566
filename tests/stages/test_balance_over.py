"""`loss.balance_over`: the balance of the batch, or of every device's part of it.

`python tests/stages/test_balance_over.py` runs in a process of its own, on 8 fake devices.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers.forked import run_forked
from test_meshes import DEVICES, MODEL, PAIRS, SLOTS, make_batch

from moe_embed_jax.data.batches import PairBatch, batch_shardings
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import ROWS_SPEC, MeshConfig, make_mesh, single_device_mesh
from moe_embed_jax.models.encoder import init_params
from moe_embed_jax.routing.router import RoutingStatistics, balance_loss
from moe_embed_jax.stages.contrastive import Contrastive
from moe_embed_jax.training.run_config import LossConfig


def test_balance_of_devices_is_the_mean_of_their_balances():
    rng = np.random.default_rng(0)
    devices, layers, experts, tokens = 3, 2, 4, np.array([5.0, 20.0, 11.0])
    assigned_NME = rng.multinomial(40, np.ones(experts) / experts, (devices, layers)).astype(float)
    probability_NME = rng.dirichlet(np.ones(experts), (devices, layers)) * tokens[:, None, None]
    token_NM = np.repeat(tokens[:, None], layers, axis=1)
    apart = RoutingStatistics(assigned_NME, probability_NME, token_NM, token_NM, token_NM)
    expected = []
    for device in range(devices):
        for layer in range(layers):
            fraction = assigned_NME[device, layer] / 40
            mean = probability_NME[device, layer] / tokens[device]
            expected.append(experts * np.sum(fraction * mean))
    np.testing.assert_allclose(balance_loss(apart), np.mean(expected), rtol=1e-6)
    together = jax.tree.map(lambda leaf: leaf.sum(axis=0), apart)
    fraction_ME = assigned_NME.sum(axis=0) / (40 * devices)
    mean_ME = probability_NME.sum(axis=0) / tokens.sum()
    expected = experts * (fraction_ME * mean_ME).sum(axis=-1).mean()
    np.testing.assert_allclose(balance_loss(together), expected, rtol=1e-6)


def test_unknown_values_are_refused():
    with pytest.raises(UserError, match=r"loss\.balance_over='pod': choose 'batch' or 'device'"):
        LossConfig(balance_over="pod")


@functools.cache
def compiled(over: str, mesh, model):
    config = Contrastive(model, LossConfig(balance_over=over), SLOTS)

    def balance(params, batch):
        loss, metrics = config.loss_and_metrics(params, batch)
        return metrics["balance"], (loss - metrics["contrastive_loss"], metrics["expert_load"])

    function = jax.value_and_grad(balance, has_aux=True)
    return jax.jit(function)


def balance_and_gradient(over: str, mesh, batch: PairBatch, model=MODEL):
    """The balance loss of `batch` on `mesh`, its gradient and the load, on the host."""
    params = {"encoder": init_params(model, jax.random.key(0))}
    # Routers that are far from even: devices then differ.
    params["encoder"]["groups"]["block_1"]["moe"]["router"]["kernel"] *= 30
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, batch_shardings(type(batch), mesh))
        results = compiled(over, mesh, model)(params, batch)
    (value, (in_loss, load)), gradient = jax.device_get(results)
    np.testing.assert_allclose(in_loss, value, rtol=1e-4)  # what is reported is what is trained on
    return value, gradient, load


def assert_same_gradients(actual, expected):
    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(np.abs(b).max(), 1e-3))

    jax.tree.map(check, actual, expected)


@pytest.mark.slow
def test_one_device_is_the_batch():
    """Chunks of a batch and pieces of a layer add up to one statistic of the device."""
    mesh, pieces = single_device_mesh(), dataclasses.replace(MODEL, remat_rows=5)
    expected, gradient, _ = balance_and_gradient("batch", mesh, make_batch(1, chunks=1))
    value, of_device, _ = balance_and_gradient("device", mesh, make_batch(1, chunks=2), pieces)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert_same_gradients(of_device, gradient)


@pytest.mark.slow
def test_eight_devices():
    result = run_forked(["tests/stages/test_balance_over.py"], devices=DEVICES)
    assert result.returncode == 0, result.stderr
    assert "equal" in result.stdout


def main():
    """On 8 devices: the mean over runs of one device each on its part of the batch."""
    whole = make_batch(DEVICES, chunks=2)
    mesh = make_mesh(MeshConfig(data=4, expert=2))
    value, gradient, load = balance_and_gradient("device", mesh, whole)
    alone = [
        balance_and_gradient("device", single_device_mesh(), part_of(whole, device))
        for device in range(DEVICES)
    ]
    np.testing.assert_allclose(value, np.mean([v for v, _, _ in alone]), rtol=1e-5)
    gradients = [gradient for _, gradient, _ in alone]
    assert_same_gradients(gradient, jax.tree.map(lambda *g: np.mean(g, axis=0), *gradients))
    over_batch, _, load_of_batch = balance_and_gradient("batch", mesh, whole)
    np.testing.assert_array_equal(load, load_of_batch)  # metrics are of the batch either way
    assert value > over_batch + 0.01, "the two are no different on this batch"
    print(f"equal: {value:.4f} over devices, {over_batch:.4f} over the batch")


def part_of(batch: PairBatch, device: int) -> PairBatch:
    rows = batch.token_CRL.shape[1] // DEVICES
    parts = {}
    for field in dataclasses.fields(PairBatch):
        array = getattr(batch, field.name)
        if field.metadata["spec"] == ROWS_SPEC:
            parts[field.name] = array[:, device * rows : (device + 1) * rows]
        else:
            parts[field.name] = array[device * PAIRS : (device + 1) * PAIRS]
    return PairBatch(**parts)


if __name__ == "__main__":
    main()
