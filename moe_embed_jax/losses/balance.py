"""Load-balancing loss from global statistics (paper eq. 1, normalised so that balance = 1).

Switch-style: E * sum_e f_e p_e, with f_e the fraction of the T*K assignments that expert e
received and p_e its mean router probability. The statistics are summed over queries and documents
and over all devices *before* the product: single-source batches are not forced to use every expert
on every device. The reference takes the product per device (and per pass, adding two such terms);
`loss.balance_over="device"` does so too, over queries and documents together.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RoutingStatistics:
    """Sums over the valid tokens of one or more layers (a leading axis M per MoE layer, and before
    it one per device where the statistics of devices are kept apart).

    assignments_E: how many (token, choice) pairs went to each expert, float32.
    probability_E: sum of router probabilities, float32.
    entropy: sum of the routers' entropies in nats, float32.
    tokens: number of valid tokens, float32.
    dropped: number of assignments that were not computed, float32.

    expert_RLK is no sum: int32, the experts of every token, best first, and E for padding. It is
    there only where the encoder is asked for it (models/encoder.py, expert_choices).
    """

    assignments_E: jax.Array
    probability_E: jax.Array
    entropy: jax.Array
    tokens: jax.Array
    dropped: jax.Array
    expert_RLK: jax.Array | None = None


def routing_statistics(probability_TE, expert_TK, valid_T) -> RoutingStatistics:
    """Statistics of the valid tokens; `probability_TE` float32, padding contributes nothing.

    Nothing is dropped yet: that is for the expert layer to say.
    """
    experts = probability_TE.shape[-1]
    chosen_TE = jax.nn.one_hot(expert_TK, experts, dtype=jnp.float32).sum(axis=-2)
    valid_T1 = valid_T[..., None].astype(jnp.float32)
    axes = tuple(range(valid_T.ndim))
    entropy_T = -jnp.sum(probability_TE * jnp.log(probability_TE + 1e-20), axis=-1)
    return RoutingStatistics(
        assignments_E=jnp.sum(chosen_TE * valid_T1, axis=axes),
        probability_E=jnp.sum(probability_TE * valid_T1, axis=axes),
        entropy=jnp.sum(entropy_T * valid_T1[..., 0], axis=axes),
        tokens=jnp.sum(valid_T1),
        dropped=jnp.zeros((), jnp.float32),
    )


def balance_loss(statistics: RoutingStatistics):
    """Scalar, mean over MoE layers (and devices, if their statistics were not added up); 1 at
    perfect balance, E when one expert takes everything."""
    assigned_ME = statistics.assignments_E
    fraction_ME = assigned_ME / jnp.maximum(assigned_ME.sum(-1, keepdims=True), 1.0)
    mean_ME = statistics.probability_E / jnp.maximum(statistics.tokens, 1.0)[..., None]
    return assigned_ME.shape[-1] * jnp.mean(jnp.sum(fraction_ME * mean_ME, axis=-1))


def effective_experts(load_E: np.ndarray) -> np.ndarray:
    """exp(entropy) of shares over the last axis: 1 to E, the number of experts in use."""
    load_E = np.asarray(load_E, np.float64)
    entropy = -np.sum(load_E * np.log(np.where(load_E > 0, load_E, 1.0)), axis=-1)
    return np.exp(entropy)


def routing_metrics(statistics: RoutingStatistics) -> dict:
    """Load of an expert: its share of the assignments over the share at balance (1 / E). `dropped`
    is the share of assignments that were not computed."""
    assigned_ME = statistics.assignments_E
    share_ME = assigned_ME / assigned_ME.sum(-1, keepdims=True)
    load_ME = share_ME * assigned_ME.shape[-1]
    return {
        "router_entropy": jnp.mean(statistics.entropy / statistics.tokens),
        "dropped": jnp.sum(statistics.dropped) / jnp.sum(assigned_ME),
        "expert_load": share_ME,
        "expert_load_max": jnp.max(load_ME),
        "expert_load_min": jnp.min(load_ME),
    }
