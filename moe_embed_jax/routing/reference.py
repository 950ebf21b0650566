"""The dense oracle: every expert on every token. Slow, obviously right, the judge of the others."""

import jax
import jax.numpy as jnp

from moe_embed_jax.routing.rows import add_bias


def reference(
    x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD, activation
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the chosen experts' outputs.

    Args:
      x_TD: tokens.
      expert_TK: int32 expert ids; `E` means "not routed" (padding) and contributes zero.
      gate_TK: weight of each choice.
      w_in_EDF, bias_in_EF, w_out_EFD: the experts' two matrices and the bias of their hidden
        layer (None: none). The output bias is the layer's, added once, elsewhere.
      activation: elementwise function between them.

    Returns:
      y_TD: sum over K of `gate * activation(x @ w_in[e] + bias_in[e]) @ w_out[e]`.
      dropped: float32 scalar, number of assignments that were left out: none here.
    """
    experts = w_in_EDF.shape[0]
    gate_TE = jnp.einsum("TK,TKE->TE", gate_TK, jax.nn.one_hot(expert_TK, experts))
    hidden_TEF = jnp.einsum("TD,EDF->TEF", x_TD, w_in_EDF)
    if bias_in_EF is not None:
        hidden_TEF = add_bias(hidden_TEF, bias_in_EF)
    y_TD = jnp.einsum(
        "TEF,EFD,TE->TD", activation(hidden_TEF), w_out_EFD, gate_TE.astype(x_TD.dtype)
    )
    return y_TD, jnp.zeros((), jnp.float32)
