"""The sizes of the device mesh, as configs state them. Imports no jax."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; `data=-1` takes all that the other axes leave."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
