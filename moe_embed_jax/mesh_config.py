"""The sizes of the device mesh, as configs state them. Imports no jax."""

import dataclasses

from moe_embed_jax.config import FREE_IF_DROPLESS, setting


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; `data=-1` takes all that the other axes leave.

    slice: TPU slices, which only the network of the data centre connects (multislice); -1: as many
      as the devices are in, nearly always 1. The other axes count the devices of one slice.
    """

    data: int = setting(-1, FREE_IF_DROPLESS)
    fsdp: int = setting(1, FREE_IF_DROPLESS)
    expert: int = setting(1, FREE_IF_DROPLESS)
    slice: int = setting(-1, FREE_IF_DROPLESS)
