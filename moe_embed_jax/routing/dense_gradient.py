"""The router's gradient from every expert's output (DenseMixer, Yao et al. 2025).

A token gets the gated sum of its K experts, as always. The top-k choice has no gradient, so a
router learns from the outputs of the chosen experts alone. Here the gradient of each gate, also of
the experts that were not chosen, is that of the mix of all experts::

    y_t = sum over the K chosen e of g_te f_e(x_t)          forward
    dL/dg_te = dL/dy_t . f_e(x_t)    for all E experts e     backward (straight-through)

Gradients of x and of the experts' weights are those of the chosen experts. The outputs of all
experts are computed in the backward pass, one expert on all tokens at a time: E forward passes of
an expert on T tokens, and T F numbers of memory.
"""

import functools

import jax
import jax.numpy as jnp


def dense_router_gradient(layer, expert_mlp, x_TD, expert_TK, gates, weights):
    """The result of `layer`, a dropless back end, with this gradient of the gates.

    Args:
      layer: (x_TD, expert_TK, gate_TK, weights) -> (y_TD, dropped).
      gates: gate_TK, of the chosen experts, and gate_TE, of all that `weights` has
        (`router.gates_of_all`).
    """
    gate_TK, gate_TE = gates
    y_TD, dropped = layer(x_TD, expert_TK, jax.lax.stop_gradient(gate_TK), weights)
    return _with_gradient(expert_mlp, y_TD, x_TD, gate_TE, weights), dropped


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradient(expert_mlp, y_TD, x_TD, gate_TE, weights):
    """`y_TD`; the gates of all experts have the gradient of their mix."""
    return y_TD


def _forward(expert_mlp, y_TD, x_TD, gate_TE, weights):
    return y_TD, (x_TD, weights)


def _backward(expert_mlp, saved, dy_TD):
    x_TD, weights = saved

    def one_expert(_, weights):
        y_TD = expert_mlp(x_TD, weights)
        return None, jnp.sum(y_TD.astype(jnp.float32) * dy_TD.astype(jnp.float32), axis=1)

    _, dgate_ET = jax.lax.scan(one_expert, None, weights)
    return dy_TD, None, dgate_ET.T, None


_with_gradient.defvjp(_forward, _backward)
