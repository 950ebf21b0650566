"""Heads of J features side by side in a group of W lanes, inside a TPU kernel.

The features of other heads are zeroed instead of cut out: matrix units contract and write 128
lanes in any case.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

LANES = 128
LOG2_E = float(np.log2(np.e))  # exp2 is one multiply less than exp
MASK_VALUE = -0.7 * float(jnp.finfo(jnp.float32).max)  # the score of a token of another text


def supports_heads(width: int, heads: int) -> bool:
    """Whether whole heads fill groups of lanes, and whole groups the width."""
    head = width // heads
    return width % LANES == 0 and (LANES % head == 0 or head % LANES == 0)


def rotation_lanes(rotation_RLJ, text_index_RL, head: int):
    """(cos, signed sin) of `attention.rotation` for each lane of a group, float32 [R, L, W].

    `rotation_RLJ` None: a rotation by angle 0.
    """
    if rotation_RLJ is None:
        shape = (*text_index_RL.shape, max(head, LANES))
        return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    return tuple(jnp.tile(table, max(head, LANES) // head) for table in rotation_RLJ)


def rotate(x_LW, cos_LW, sin_LW, head: int):
    """Rotary positions, in float32."""
    x_LW = x_LW.astype(jnp.float32)
    return x_LW * cos_LW + _exchange_halves(x_LW, head) * sin_LW


def rotate_back(x_LW, cos_LW, sin_LW, head: int):
    """The transpose of rotation: what a gradient goes through."""
    return x_LW * cos_LW + _exchange_halves(x_LW * sin_LW, head)


def _exchange_halves(x_LW, head: int):
    """The two halves of each head exchanged."""
    lanes, half = x_LW.shape[1], head // 2
    lane_LW = jax.lax.broadcasted_iota(jnp.int32, x_LW.shape, 1)
    from_right, from_left = pltpu.roll(x_LW, lanes - half, 1), pltpu.roll(x_LW, half, 1)
    return jnp.where(lane_LW % head < half, from_right, from_left)


def head_masks(shape: tuple[int, int], head: int):
    """[L, W] masks of the lanes of each head."""
    lane_LW = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    for first in range(0, shape[1], head):
        yield (lane_LW >= first) & (lane_LW < first + head)


def softmax_gradient(score_KQ, dweight_KQ, same_KQ, log_sum_1Q, mean_1Q):
    """(weights, gradient of the scores), [K, Q] each, of a softmax over the keys of each query.

    Args:
      score_KQ: to base 2. dweight_KQ: the gradient of the weights.
      same_KQ: whether key and query are of one text.
      log_sum_1Q: binary logarithm of the softmax's denominator.
      mean_1Q: of the weights' gradient by the weights; the context's product with its gradient.
    """
    weight_KQ = jnp.exp2(jnp.where(same_KQ, score_KQ, MASK_VALUE) - log_sum_1Q)
    return weight_KQ, weight_KQ * (dweight_KQ - mean_1Q)


def apply_mask(mask_LW, x_LW):
    """`x_LW` with zeros outside the mask of a head."""
    return jnp.where(mask_LW, x_LW, jnp.zeros_like(x_LW))
