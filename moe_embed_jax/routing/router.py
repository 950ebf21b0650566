"""The router: top-k choice of experts, what it reports, and the load-balancing loss.

The loss is the paper's equation 1, normalised so that perfect balance gives 1. It is
E * sum_e f_e p_e (Switch Transformer, arXiv 2101.03961): f_e is the fraction of the T * K
assignments that expert e received, p_e its mean router probability. The statistics are summed over
queries and documents and over all devices *before* the product, so a batch from a single source is
not forced to use every expert on every device. The reference code takes the product per device and
per pass, and adds the two terms; `loss.balance_over="device"` takes it per device, over queries and
documents together.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RoutingStatistics:
    """Sums over the valid tokens of one or more layers.

    Several layers have a leading axis Y of MoE layers. Statistics that are kept apart per device
    have an axis of devices before it.

    assignments_E: number of (token, choice) pairs of each expert, float32.
    probability_E: sum of router probabilities, float32.
    entropy: sum of the routers' entropies in nats, float32.
    tokens: number of valid tokens, float32.
    dropped: number of assignments that were not computed, float32.
    expert_RLK: no sum. int32, the experts of each token, best first, and E for padding; None unless
      the encoder was asked for it (`models.encoder.expert_choices`).
    """

    assignments_E: jax.Array
    probability_E: jax.Array
    entropy: jax.Array
    tokens: jax.Array
    dropped: jax.Array
    expert_RLK: jax.Array | None = None


def route(logits_RLE, valid_RL, experts_per_token: int, normalize_gates: bool = False):
    """The K experts of each token: top-k of the softmax over all experts.

    Args:
      logits_RLE: of the router. valid_RL: False for padding.
      normalize_gates: the gates of a token sum to 1. Otherwise they are probabilities, and sum to
        less than 1.

    Returns:
      `expert_RLK` int32 (E for padding: not routed), `gate_RLK` float32, and `RoutingStatistics`.
    """
    probability_RLE = jax.nn.softmax(logits_RLE.astype(jnp.float32), axis=-1)
    gate_RLK, expert_RLK = jax.lax.top_k(probability_RLE, experts_per_token)
    if normalize_gates:
        gate_RLK /= jnp.sum(gate_RLK, axis=-1, keepdims=True)
    statistics = routing_statistics(probability_RLE, expert_RLK, valid_RL)
    expert_RLK = jnp.where(valid_RL[..., None], expert_RLK, logits_RLE.shape[-1])
    return expert_RLK, gate_RLK, statistics


def gates_of_all(logits_RLE, expert_RLK, normalize_gates: bool = False):
    """gate_RLE float32: what the gate of every expert would be, chosen or not, zero for padding.

    Args:
      expert_RLK: the choice of `route`. With `normalize_gates` its probabilities sum to 1.
    """
    experts = logits_RLE.shape[-1]
    probability_RLE = jax.nn.softmax(logits_RLE.astype(jnp.float32), axis=-1)
    if normalize_gates:
        chosen_RLE = jax.nn.one_hot(expert_RLK, experts).sum(axis=-2)
        chosen_RL1 = jnp.sum(chosen_RLE * probability_RLE, axis=-1, keepdims=True)
        probability_RLE /= jnp.where(chosen_RL1 > 0, chosen_RL1, 1.0)
    return jnp.where(expert_RLK[..., :1] < experts, probability_RLE, 0.0)


def routing_statistics(probability_TE, expert_TK, valid_T) -> RoutingStatistics:
    """Statistics of the valid tokens; `probability_TE` float32, padding contributes nothing.

    `dropped` is 0 here, because only the expert layer knows it.
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
    """Scalar, mean over MoE layers (and devices, if their statistics are apart).

    It is 1 at perfect balance, and E if one expert takes everything.
    """
    assigned_YE = statistics.assignments_E
    fraction_YE = assigned_YE / jnp.maximum(assigned_YE.sum(-1, keepdims=True), 1.0)
    mean_YE = statistics.probability_E / jnp.maximum(statistics.tokens, 1.0)[..., None]
    return assigned_YE.shape[-1] * jnp.mean(jnp.sum(fraction_YE * mean_YE, axis=-1))


def routing_metrics(statistics: RoutingStatistics) -> dict:
    """Metrics of a step.

    The load of an expert is its share of the assignments over the share at balance (1 / E).
    `dropped` is the share of assignments that were not computed.
    """
    assigned_YE = statistics.assignments_E
    share_YE = assigned_YE / assigned_YE.sum(-1, keepdims=True)
    load_YE = share_YE * assigned_YE.shape[-1]
    return {
        "router_entropy": jnp.mean(statistics.entropy / statistics.tokens),
        "dropped": jnp.sum(statistics.dropped) / jnp.sum(assigned_YE),
        "expert_load": share_YE,
        "expert_load_max": jnp.max(load_YE),
        "expert_load_min": jnp.min(load_YE),
    }


def effective_experts(load_E: np.ndarray) -> np.ndarray:
    """Number of experts in use, 1 to E: exp(entropy) of the shares over the last axis."""
    load_E = np.asarray(load_E, np.float64)
    entropy = -np.sum(load_E * np.log(np.where(load_E > 0, load_E, 1.0)), axis=-1)
    return np.exp(entropy)
