"""How the planner prices kernels: by their limiting unit."""

import pytest

from moe_embed_jax.planning.chips import CHIPS
from moe_embed_jax.planning.cost import Cost, Kernel, Unestimated
from moe_embed_jax.planning.roofline import (
    SCHEDULED_OPERATIONS,
    VECTOR_OPERATIONS,
    predict,
    vector_operations_of,
)


@pytest.mark.parametrize("shares", [(1.0, 0.5, 0.25), (0.5, 1.0, 0.25), (0.25, 0.5, 1.0)])
def test_a_kernel_takes_the_time_of_its_busiest_unit(shares):
    """FLOPs, bytes and vector operations of one kernel overlap: the longest counts, not the sum.
    Products in kernels reach a share of the peak."""
    chip = CHIPS["v5e"]
    peaks = chip.peak_flops, chip.hbm_bandwidth, chip.vector_operations
    flops, moved, operations = (
        1e-3 * part * peak for part, peak in zip(shares, peaks, strict=True)
    )
    cost = Cost()
    in_kernel = flops * chip.kernel_share, moved, operations / VECTOR_OPERATIONS
    cost.kernels[Kernel("gmm", *in_kernel)] = 3
    cost.unestimated[Unestimated("sort", moved, flops, operations)] = 2
    times = predict(cost, chip)
    assert times.kernels == pytest.approx(3e-3)
    assert times.unestimated == pytest.approx(2e-3)


def test_a_kernel_with_a_schedule_has_its_own_operations():
    """By its name, with what the compiler writes around it."""
    forward = SCHEDULED_OPERATIONS["blocked_attention"]
    backward = SCHEDULED_OPERATIONS["blocked_attention_backward"]
    for name, count in (
        ("jvp_blocked_attention_", forward),
        ("transpose_jvp_blocked_attention_backward__", backward),
        ("attention", VECTOR_OPERATIONS),
    ):
        assert vector_operations_of(name) == count
        cost = Cost()
        cost.kernels[Kernel(name, 0.0, 0.0, 1e9)] = 1
        seconds = 1e9 * count / CHIPS["v6e"].vector_operations
        assert predict(cost, CHIPS["v6e"]).kernels == pytest.approx(seconds)
