"""The dense oracle: every expert on every token. Tests compare the other back ends with it."""

import jax
import jax.numpy as jnp

from moe_embed_jax.routing.rows import count_experts


def reference(expert_mlp, x_TD, expert_TK, gate_TK, weights) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the chosen experts' outputs.

    Args:
      expert_mlp: (x_TD, weights of one expert) -> y_TD, in the dtype of x.
      x_TD: tokens.
      expert_TK: int32 expert ids; `E` means "not routed" (padding) and contributes zero.
      gate_TK: weight of each choice.
      weights: pytree of arrays with a leading axis E.

    Returns:
      y_TD: sum over K of `gate * expert_mlp(x, weights[e])`.
      dropped: float32 scalar, number of assignments that were left out: none here.
    """
    # A copy of the tokens for each expert: else one side of the weight gradient has no axis of
    # experts, and XLA for CPUs lacks that product in bfloat16 with float32 sums.
    experts = count_experts(weights)
    x_ETD = jnp.broadcast_to(x_TD, (experts, *x_TD.shape))
    y_ETD = jax.vmap(expert_mlp)(x_ETD, weights)
    gate_TE = jnp.einsum("TK,TKE->TE", gate_TK, jax.nn.one_hot(expert_TK, experts))
    y_TD = jnp.einsum("ETD,TE->TD", y_ETD, gate_TE.astype(x_TD.dtype))
    return y_TD, jnp.zeros((), jnp.float32)
