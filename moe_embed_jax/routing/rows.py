"""What the back ends share: rows by index, the sum over a token's experts, weights."""

import jax
import jax.numpy as jnp

from moe_embed_jax.sharding import is_array


def take(array_AX, index):
    """Rows of `array`; zero where the index is past the end."""
    return array_AX.at[index].get(mode="fill", fill_value=0)


def sum_choices(y_SD, slot_TK, gate_TK):
    """y_TD: gated sum of the K rows of every token; a slot past the end adds zero.

    One choice after the other, because a TPU would pad an axis of K to a whole tile.
    """
    return sum(
        gate_TK[:, k, None].astype(y_SD.dtype) * take(y_SD, slot_TK[:, k])
        for k in range(gate_TK.shape[1])
    )


def count_experts(weights) -> int:
    """The leading axis of the experts' weights."""
    return jax.tree.leaves(weights, is_leaf=is_array)[0].shape[0]


def in_float32(weights):
    """The weights in float32, which their gradients are then summed in."""
    return jax.tree.map(lambda w: w.astype(jnp.float32), weights)
