"""Reading rows by index, and the sum over a token's experts: what all static layouts share."""

import jax.numpy as jnp


def take(array_AX, index):
    """Rows of `array`; zero where the index is past the end."""
    return array_AX.at[index].get(mode="fill", fill_value=0)


def sum_choices(y_SD, slot_TK, gate_TK):
    """y_TD: gated sum of the K rows of every token; a slot past the end adds zero.

    One choice after the other: a TPU would pad an axis of K to a whole tile.
    """
    return sum(
        gate_TK[:, k, None].astype(y_SD.dtype) * take(y_SD, slot_TK[:, k])
        for k in range(gate_TK.shape[1])
    )


def add_bias(hidden, bias):
    """`hidden + bias` in the dtype of `hidden`; the gradient of the bias, a sum over tokens, is
    computed in float32. `bias` is broadcast."""
    return (hidden.astype(jnp.float32) + bias.astype(jnp.float32)).astype(hidden.dtype)
