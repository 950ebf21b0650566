"""From counted work to seconds.

A step is taken to be the sum of

  * the compiler's cycle estimates over the chip's clock;
  * Pallas kernels, for which it has none: max(FLOPs / rate of large products, bytes / bandwidth,
    operations of the vector unit) of each call, `vector_operations_of` for every transcendental;
  * other instructions without an estimate (gathers, scatters, sorts): the same, from the bytes that
    they touch in HBM, and for sorts the operations of the vector unit;
  * collectives that block;
  * transfers between slices, over the chip's share of the hosts' network cards, and DCN_SECONDS for
    each time that the program waits for them (gradients cross at the end of a step, documents
    before the loss: there is little to hide them behind);
  * what asynchronous collectives exceed all of the above by: they are taken to be hidden otherwise.

On GPUs the compiler gives no cycles: all instructions are of the third kind, and matrix products
run at the peak of their precision.

Asynchronous copies between HBM and on-chip memory are taken to be hidden. `serial_seconds` hides
nothing; the truth should lie between the two. Host input and launch gaps are not in it.
"""

import dataclasses

from moe_embed_jax.planning.cards import Card
from moe_embed_jax.planning.chips import DCN_SECONDS, Chip
from moe_embed_jax.planning.cost import Cost

# Per exponential, with the arithmetic around it (a GELU with its slope, a masked softmax); counted
# in the sources.
VECTOR_OPERATIONS = 25
# Of kernels whose schedule was read (benchmarks/kernel_schedules.py): what they take where the
# matrix units have less to do, as on v6e.
SCHEDULED_OPERATIONS = {
    "blocked_attention_backward": 26,
    "blocked_attention": 14,
    "fused_attention_backward": 41,
    "fused_attention": 24,
}


@dataclasses.dataclass(frozen=True)
class Times:
    """Predicted seconds of one step on one chip, by kind."""

    estimated: float
    kernels: float
    unestimated: float
    blocking_collectives: float
    async_collectives: float
    prefetches: float
    between_slices: float

    @property
    def busy(self) -> float:
        return self.estimated + self.kernels + self.unestimated

    @property
    def exposed_async(self) -> float:
        return max(0.0, self.async_collectives - self.busy)

    @property
    def step_seconds(self) -> float:
        return self.busy + self.blocking_collectives + self.between_slices + self.exposed_async

    @property
    def serial_seconds(self) -> float:
        return self.step_seconds - self.exposed_async + self.async_collectives + self.prefetches


def vector_operations_of(kernel: str) -> int:
    """Operations of the vector unit per exponential of the kernel of this name; the compiler writes
    what made it before and behind the name (`transpose_jvp_NAME_`)."""
    found = (count for name, count in SCHEDULED_OPERATIONS.items() if name in kernel)
    return next(found, VECTOR_OPERATIONS)


def predict(cost: Cost, chip: Chip | Card) -> Times:
    def roofline(
        flops: float, moved: float, vector_operations: float, precision: str = "bfloat16"
    ) -> float:
        return max(
            flops / chip.product_flops(precision),
            moved / chip.hbm_bandwidth,
            vector_operations / chip.vector_operations,
        )

    blocking, asynchronous, between_slices = 0.0, 0.0, cost.waits_for_slices * DCN_SECONDS
    for found, count in cost.collectives.items():
        seconds = found.seconds(chip) * count
        if found.between_slices:
            between_slices += seconds
        elif found.is_async:
            asynchronous += seconds
        else:
            blocking += seconds
    return Times(
        estimated=cost.cycles / chip.clock_hz,
        kernels=sum(
            roofline(
                (kernel.flops or 0.0) / chip.kernel_share,
                kernel.bytes or 0.0,
                (kernel.transcendentals or 0.0) * vector_operations_of(kernel.name),
                kernel.precision,
            )
            * count
            for kernel, count in cost.kernels.items()
        ),
        unestimated=sum(
            roofline(it.flops, it.bytes, it.vector_operations, it.precision) * count
            for it, count in cost.unestimated.items()
        ),
        blocking_collectives=blocking,
        async_collectives=asynchronous,
        prefetches=sum(moved * count for moved, count in cost.prefetches.items())
        / chip.hbm_bandwidth,
        between_slices=between_slices,
    )
