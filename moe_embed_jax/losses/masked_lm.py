"""The masked language-model loss: cross entropy of the masked tokens (arXiv 1810.04805).

Only masked tokens have logits, and only some of them at a time (models/heads.py). The results are
sums, which may be added over slices, chunks and devices before `means`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_embed_jax.shapes import PADDING


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class MaskedSums:
    """Sums over predictions, float32 scalars: `loss` in nats, number of `correct` ones, `count`."""

    loss: jax.Array
    correct: jax.Array
    count: jax.Array

    def means(self) -> tuple[jax.Array, jax.Array]:
        """(loss, share of correct ones) per prediction; 0 without predictions."""
        count = jnp.maximum(self.count, 1.0)
        return self.loss / count, self.correct / count


def masked_cross_entropy(logits_TV, target_T) -> MaskedSums:
    """
    Args:
      logits_TV: float32.
      target_T: int32, the token that was masked; -1 (padding): nothing is predicted there.

    A prediction is correct if no token has a higher logit than the masked one.
    """
    is_target_TV = jnp.arange(logits_TV.shape[-1]) == target_T[:, None]
    # A sum, where a gather's gradient would be a scatter into another [T, V].
    own_T = jnp.sum(jnp.where(is_target_TV, logits_TV, 0.0), axis=-1)
    loss_T = jax.nn.logsumexp(logits_TV, axis=-1) - own_T
    best_T = jnp.max(jax.lax.stop_gradient(logits_TV), axis=-1)
    return sums_of(loss_T, own_T, best_T, target_T)


def sums_of(loss_T, own_T, best_T, target_T) -> MaskedSums:
    """Sums over the tokens that have a target.

    Args:
      loss_T, own_T, best_T: cross entropy, logit of the target, and largest logit, float32.
      target_T: as for `masked_cross_entropy`.
    """
    there_T = target_T != PADDING
    return MaskedSums(
        loss=jnp.sum(jnp.where(there_T, loss_T, 0.0)),
        correct=jnp.sum(there_T & (own_T >= best_T)).astype(jnp.float32),
        count=jnp.sum(there_T).astype(jnp.float32),
    )
