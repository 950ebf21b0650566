"""How a layer's tokens meet its experts on a mesh.

Tokens are sharded over all mesh axes. Here every device holds the experts it needs (the weights are
gathered by the partitioner from wherever the sharding table keeps them) and routes its own tokens
locally: no token moves. Sorting by expert must stay inside a device, hence the `shard_map`.
"""

import jax
from jax.sharding import PartitionSpec as P

from moe_embed_jax.mesh import BATCH_SPEC
from moe_embed_jax.routing.blocked import blocked
from moe_embed_jax.routing.reference import reference

BACKENDS = {"reference": reference, "blocked": blocked}


def apply_experts(
    x_RLD, expert_RLK, gate_RLK, w_in_EDF, bias_in_EF, w_out_EFD, activation, backend: str
):
    """Weighted expert outputs y_RLD; needs a mesh in context (`jax.set_mesh`).

    `expert_RLK == E` marks tokens that are not routed (padding): they get zero.
    """

    def local(x_RLD, expert_RLK, gate_RLK, *weights):
        flat = [a.reshape(-1, a.shape[-1]) for a in (x_RLD, expert_RLK, gate_RLK)]
        y_TD = BACKENDS[backend](*flat, *weights, activation)
        return y_TD.reshape(x_RLD.shape)

    # check_vma is off because the hand-written VJPs return per-device weight gradients; shard_map
    # sums the cotangents of replicated inputs over the mesh itself.
    return jax.shard_map(
        local,
        in_specs=(BATCH_SPEC, BATCH_SPEC, BATCH_SPEC, P(), P(), P()),
        out_specs=BATCH_SPEC,
        check_vma=False,
    )(x_RLD, expert_RLK, gate_RLK, w_in_EDF, bias_in_EF, w_out_EFD)
