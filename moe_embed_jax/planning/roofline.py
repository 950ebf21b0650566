"""From counted work to seconds.

A step is taken to be the sum of

  * the compiler's cycle estimates over the chip's clock;
  * Pallas kernels, for which it has none: max(FLOPs / peak, bytes / bandwidth, operations of the
    vector unit) of each call, VECTOR_OPERATIONS for every transcendental;
  * other instructions without an estimate (gathers, scatters, sorts): the same, from the bytes that
    they touch in HBM, and for sorts the operations of the vector unit;
  * collectives that block;
  * what asynchronous collectives exceed all of the above by: they are taken to be hidden otherwise.

Asynchronous copies between HBM and on-chip memory are taken to be hidden. `serial_seconds` hides
nothing; the truth should lie between the two. Host input, launch gaps and slow links are not in it.
"""

import dataclasses

from moe_embed_jax.planning.chips import Chip
from moe_embed_jax.planning.cost import Cost

# Of a GELU with its slope, or of a masked softmax, per exponential; counted in the sources.
VECTOR_OPERATIONS = 25


@dataclasses.dataclass(frozen=True)
class Times:
    """Predicted seconds of one step on one chip, by kind."""

    estimated: float
    kernels: float
    unestimated: float
    blocking_collectives: float
    async_collectives: float
    prefetches: float

    @property
    def busy(self) -> float:
        return self.estimated + self.kernels + self.unestimated

    @property
    def exposed_async(self) -> float:
        return max(0.0, self.async_collectives - self.busy)

    @property
    def step_seconds(self) -> float:
        return self.busy + self.blocking_collectives + self.exposed_async

    @property
    def serial_seconds(self) -> float:
        return self.busy + self.blocking_collectives + self.async_collectives + self.prefetches


def predict(cost: Cost, chip: Chip) -> Times:
    def roofline(flops: float, moved: float, vector_operations: float) -> float:
        return max(
            flops / chip.peak_flops,
            moved / chip.hbm_bandwidth,
            vector_operations / chip.vector_operations,
        )

    collective = {True: 0.0, False: 0.0}
    for found, count in cost.collectives.items():
        collective[found.is_async] += found.seconds(chip) * count
    return Times(
        estimated=cost.cycles / chip.clock_hz,
        kernels=sum(
            roofline(
                kernel.flops or 0.0,
                kernel.bytes or 0.0,
                (kernel.transcendentals or 0.0) * VECTOR_OPERATIONS,
            )
            * count
            for kernel, count in cost.kernels.items()
        ),
        unestimated=sum(
            roofline(it.flops, it.bytes, it.vector_operations) * count
            for it, count in cost.unestimated.items()
        ),
        blocking_collectives=collective[False],
        async_collectives=collective[True],
        prefetches=sum(moved * count for moved, count in cost.prefetches.items())
        / chip.hbm_bandwidth,
    )
