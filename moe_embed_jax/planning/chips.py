"""What the TPU generations can do: the constants of every prediction.

Sources. Peak FLOP/s, HBM bandwidth, inter-chip bandwidth and cores per chip: the "System
architecture" pages of Google Cloud (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e). Those give
the inter-chip bandwidth of a chip in both directions over all its ports; a link one way is that
over 2 x ports on v4 and v5e, and what a `ppermute` of 64 MiB was measured to reach of 100 GB/s on
v5p and v6e (marin-community/marin issue 6736). HBM bytes: what the compiler says is available
("exceeds available HBM (15.75G)"), a little less than the 16, 32, 32 and 95 GB of the pages.

Clock, in which the compiler's `estimated_cycles` count: peak / (2 x multipliers of all matrix
units), 4 units of 128 x 128 per core (v4 and v5p: two cores work as one device). The v6e page
speaks of two units of 256 x 256, but the compiler's estimates pass their FLOPs per cycle; with
four, the clock is 1.75 GHz. Cross-checks with libtpu 0.0.42: at these clocks the compiler's
estimate of an 8192-cubed bfloat16 matmul comes to 88 % (v5e), 90 % (v5p), 93 % (v4) and 70 % (v6e)
of peak, and that of a float32 addition in HBM to 81 %, 72 %, 77 % and 86 % of the bandwidth.

Share of the peak that products inside kernels reach: what was measured of a large product, 92 % on
v5e (8192-cubed, by XLA and by a Pallas kernel: jax docs/pallas/tpu/matmul.ipynb) and 70 % on v6e
(benchmarks/planner_validation.py); the compiler's estimate above on v4 and v5p.

Between slices: the pages give the bandwidth of the data center network per pod of 256 chips for v5e
(6.4 Tbit/s) and v6e (25.6 Tbit/s), and per chip for v5p (50 Gbit/s); that of v4 gives none, and
v5p's is taken. No page gives a latency: DCN_SECONDS is an assumption, of what a transfer from chip
to host, to another host and to its chip takes.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip = one device of the topology."""

    name: str
    peak_flops: float  # bfloat16 FLOP/s
    hbm_bytes: int  # available to a program
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s of one inter-chip link, one way
    dcn_bandwidth: float  # bytes/s, one way, of a chip's share of the network between slices
    torus_dims: int
    clock_hz: float
    kernel_share: float  # of peak_flops, that products inside a kernel are taken to reach
    cores: int
    wraps_at: int  # a torus dimension that is a multiple of it is closed to a ring
    example: str  # a topology that exists

    def product_flops(self, precision: str) -> float:
        """FLOP/s of what the compiler gives no cycles for, in any `matmul.precision`."""
        return self.peak_flops

    @property
    def vector_operations(self) -> float:
        """Per second: 8 x 128 lanes with four units each, per core and cycle."""
        return self.clock_hz * self.cores * 8 * 128 * 4


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", 275e12, int(30.75 * GIB), 1228e9, 50e9, 6.25e9, 3, 1.05e9, 0.93, 2, 4, "v4:2x2x1"
        ),
        Chip(
            "v5e", 197e12, int(15.75 * GIB), 819e9, 50e9, 3.125e9, 2, 1.5e9, 0.92, 1, 16, "v5e:4x4"
        ),
        Chip(
            "v5p",
            459e12,
            int(95.74 * GIB),
            2765e9,
            86.3e9,
            6.25e9,
            3,
            1.75e9,
            0.90,
            2,
            4,
            "v5p:2x2x1",
        ),
        Chip(
            "v6e",
            918e12,
            int(31.25 * GIB),
            1638e9,
            86.8e9,
            12.5e9,
            2,
            1.75e9,
            0.70,
            1,
            16,
            "v6e:2x2",
        ),
    )
}
DEVICE_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
DCN_SECONDS = 3e-4  # latency of one transfer between slices
HOP_SECONDS = 1e-6  # latency of one step of a ring: Austin et al., "How to Scale Your Model" (2025)
