"""Whether numbers are finite: of arrays on devices, and on the host at the speed of memory."""

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def leaves_finite(tree):
    """Of each array of a tree a bool [] on its devices."""
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)


def all_finite(array: np.ndarray) -> bool:
    """Of a float array on the host. The sum tells it of nearly every array."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum()
    return bool(np.isfinite(total) or np.isfinite(array).all())
