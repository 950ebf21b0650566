"""Transfers between TPU slices in a compiled program.

On several slices the compiler cuts every collective that spans them into one inside each slice and
a `send` with a `recv` through the hosts ("Megascale"), with the kind of the whole as an attribute.
"""

import re

from moe_embed_jax.planning.collectives import Collective
from moe_embed_jax.planning.hlo import Computation, Instruction


def transfer(computation: Computation, it: Instruction, mesh) -> Collective | None:
    """The collective over slices that instruction `it` begins; None for another instruction."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', it.rest)
    if it.opcode != "send" or found is None:
        return None
    slices = mesh.shape["slice"]
    kind = found[1].lower().replace("_", "-").replace("one-to-one", "collective-permute")
    size = computation.operand_shapes(it)[0][0].bytes
    return Collective(
        kind=kind,
        bytes=size * slices if kind == "all-gather" else size,
        axes=("slice",),
        group_size=slices,
        links=1,
        is_async=False,
    )


def ends_transfer(it: Instruction) -> bool:
    """Whether instruction `it` waits for what another slice has sent."""
    return it.opcode == "recv-done" and "xla_megascale_runtime" in it.rest
