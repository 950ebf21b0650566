"""What GPUs can do, and how the compiler is told of one that is not there.

Sources. Peak FLOP/s without sparsity, memory bandwidth and links: NVIDIA's data sheets of the H100
SXM (989.4 TFLOP/s bfloat16, 494.7 TF32, 66.9 float32, 3.35 TB/s, NVLink 900 GB/s), the A100 SXM
(312, 156, 19.5, 1,555 and 2,039 GB/s, NVLink 600 GB/s) and the L4 (121, 60, 30.3, 300 GB/s, PCIe
Gen4 x16 64 GB/s). Those of links are sums of both ways. Cores, clocks, caches and the bytes that
the driver reports: XLA's own target descriptions (xla/backends/gpu/target_config/specs of
openxla/xla) for H100 and A100. XLA has none of an L4: cores (7,424 units / 128), cache and clock
are those of NVIDIA's data sheet and Ada architecture paper, the limits of a core those of compute
capability 8.9 in the CUDA C++ programming guide, bytes what PyTorch's out-of-memory messages name
(22.03 GiB). Latency of a collective: a step of a ring over NVLink or PCIe with the "simple"
protocol in NCCL's own model (src/graph/tuning.cc of NVIDIA/nccl). No number here was measured.
"""

import dataclasses

from moe_embed_jax.compute_capability import capability_of_name

GIB = 2**30
# jax takes this share of a card when it starts (XLA_PYTHON_CLIENT_MEM_FRACTION; jax's page "GPU
# memory allocation"), so a program has no more.
MEMORY_FRACTION = 0.75


@dataclasses.dataclass(frozen=True)
class Card:
    """One GPU = one device of the topology."""

    name: str
    peak_flops: float  # bfloat16 FLOP/s
    tf32_flops: float  # of float32 products in the default precision
    float32_flops: float  # of float32 products in the highest precision, and of other arithmetic
    memory_bytes: int  # that the driver reports
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s to the other cards of a host, one way
    link_seconds: float  # latency of one step of a ring
    most_cards: int  # of a host
    example: str
    cores: int  # streaming multiprocessors
    units: int  # float32 units of a core
    threads: int  # of a core
    clock_ghz: float
    cache_bytes: int  # level 2
    shared_bytes: int  # of a core
    block_bytes: int  # of shared memory, at most, for a block
    description: str  # its name, from which the compute capability follows
    kernel_share: float = 1.0  # as `chips.Chip`; nothing was measured

    @property
    def hbm_bytes(self) -> int:
        """Available to a program."""
        return int(self.memory_bytes * MEMORY_FRACTION)

    @property
    def clock_hz(self) -> float:
        return self.clock_ghz * 1e9

    @property
    def vector_operations(self) -> float:
        """Per second: one for each unit and cycle."""
        return self.clock_hz * self.cores * self.units

    def product_flops(self, precision: str) -> float:
        """FLOP/s of matrix products; `precision`: a key of `matmul.precision`."""
        peaks = {"bfloat16": self.peak_flops, "default": self.tf32_flops}
        return peaks.get(precision, self.float32_flops)

    @property
    def target_config(self) -> str:
        """Text of XLA's GpuTargetConfigProto."""
        major, minor = capability_of_name(self.description)
        # The "a" instructions of Hopper (asynchronous products) have to be asked for.
        extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_bytes}
  shared_memory_per_block_optin: {self.block_bytes}
  threads_per_core_limit: {self.threads}
  core_count: {self.cores}
  fpus_per_core: {self.units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(self.hbm_bandwidth)}
  l2_cache_size: {self.cache_bytes}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.description}"
"""


_A100 = Card(
    name="a100",
    peak_flops=312e12,
    tf32_flops=156e12,
    float32_flops=19.5e12,
    memory_bytes=42_331_013_120,
    hbm_bandwidth=1_555_200_000_000,
    link_bandwidth=300e9,
    link_seconds=3.4e-6,
    most_cards=8,
    example="a100:8",
    cores=108,
    units=64,
    threads=2048,
    clock_ghz=1.41,
    cache_bytes=41_943_040,
    shared_bytes=167_936,
    block_bytes=166_912,
    description="NVIDIA A100-SXM4-40GB",
)
CARDS = {
    card.name: card
    for card in (
        Card(
            name="h100",
            peak_flops=989.4e12,
            tf32_flops=494.7e12,
            float32_flops=66.9e12,
            memory_bytes=84_942_979_072,
            hbm_bandwidth=3_352_320_000_000,
            link_bandwidth=450e9,
            link_seconds=3.4e-6,
            most_cards=8,
            example="h100:8",
            cores=132,
            units=128,
            threads=2048,
            clock_ghz=1.98,
            cache_bytes=52_428_800,
            shared_bytes=233_472,
            block_bytes=232_448,
            description="NVIDIA H100 80GB HBM3",
        ),
        _A100,
        dataclasses.replace(
            _A100,
            name="a100_80gb",
            memory_bytes=85_100_068_864,
            hbm_bandwidth=2_039_040_000_000,
            example="a100_80gb:8",
            description="NVIDIA A100-SXM4-80GB",
        ),
        Card(
            name="l4",
            peak_flops=121e12,
            tf32_flops=60e12,
            float32_flops=30.3e12,
            memory_bytes=int(22.03 * GIB),
            hbm_bandwidth=300e9,
            link_bandwidth=32e9,
            link_seconds=5.7e-6,
            most_cards=8,
            example="l4:1",
            cores=58,
            units=128,
            threads=1536,
            clock_ghz=2.04,
            cache_bytes=48 * 2**20,
            shared_bytes=102_400,
            block_bytes=101_376,
            description="NVIDIA L4",
        ),
    )
}
