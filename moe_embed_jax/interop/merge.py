"""Merging: one model from several of one architecture that were trained from one start.

* `average`: the weighted mean of every parameter (model soups, arXiv 2203.05482).
* `slerp`: every parameter on the arc between two models' (Shoemake 1985, as merges of checkpoints
  use it): sin((1-t) w) / sin(w) a + sin(t w) / sin(w) b, w the angle between a and b as vectors.

Two models with experts may hold the same experts in another order, because a model's output does
not depend on it. `match_experts` finds the order of a model's experts in which router and weights
are nearest to another model's (Hungarian algorithm), layer by layer.
"""

import numpy as np
import scipy.optimize

from moe_embed_jax.models.encoder import EncoderConfig

ROUTER = "router/kernel"
EXPERT_AXIS = {ROUTER: -1, "w_in": 0, "bias_in": 0, "w_out": 0}  # of the arrays of a layer
# Nearly parallel vectors: the arc is a line to float32's precision, and sin(w) near 0. Between
# opposite ones there are many arcs.
SMALLEST_ANGLE = 1e-4


def match_experts(
    model: EncoderConfig, arrays: dict[str, np.ndarray], like: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[int, np.ndarray]]:
    """Permutes the experts of each layer so that they fit those of `like`.

    Args:
      arrays, like: {path by layer: array} of two models, see `layers.by_layer`.

    Returns:
      (arrays in the new order, {layer: order_E}): expert e of the result was expert order_E[e].
      Equal experts keep their order.
    """
    matched, orders = dict(arrays), {}
    for layer in model.moe_layers:
        paths = {f"layers/{layer}/moe/{name}": axis for name, axis in EXPERT_AXIS.items()}
        paths = {path: axis for path, axis in paths.items() if path in arrays}
        # Squared distances less what no order changes; every array counts alike, whatever its size.
        closeness_EE = np.zeros((model.num_experts, model.num_experts))
        for path, axis in paths.items():
            ours_EN = _by_expert(arrays[path], axis)
            theirs_EN = _by_expert(like[path], axis)
            size = max(np.linalg.norm(ours_EN) * np.linalg.norm(theirs_EN), 1e-30)
            closeness_EE += theirs_EN @ ours_EN.T / size
        _, order_E = scipy.optimize.linear_sum_assignment(closeness_EE, maximize=True)
        unchanged_E = np.arange(model.num_experts)
        gain = closeness_EE[unchanged_E, order_E].sum() - closeness_EE.trace()
        if gain <= 1e-6 * abs(closeness_EE).sum():
            order_E = unchanged_E
        orders[layer] = order_E
        for path, axis in paths.items():
            matched[path] = np.take(arrays[path], order_E, axis)
    return matched, orders


def _by_expert(array: np.ndarray, axis: int) -> np.ndarray:
    """float32 [E, N]: what the array says of each expert."""
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def merge(
    method: str, models: list[dict[str, np.ndarray]], shares: list[float]
) -> dict[str, np.ndarray]:
    """{path: float32 array} of the merged model.

    Args:
      models: {path: array} each, with equal paths and shapes; two for "slerp".
      shares: of each model; they sum to 1.
    """
    if method == "slerp":
        first, second = models
        return {path: slerp(first[path], second[path], shares[1]) for path in first}
    return {
        path: sum(
            share * model[path].astype(np.float64)
            for share, model in zip(shares, models, strict=True)
        ).astype(np.float32)
        for path in models[0]
    }


def slerp(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """float32, in the shape of a: a where `share` is 0, b where it is 1."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a64) * np.linalg.norm(b64)
    cosine = np.vdot(a64, b64) / lengths if lengths else 1.0
    angle = np.arccos(np.clip(cosine, -1, 1))
    if min(angle, np.pi - angle) < SMALLEST_ANGLE:
        return ((1 - share) * a64 + share * b64).astype(np.float32)
    parts = np.sin([(1 - share) * angle, share * angle]) / np.sin(angle)
    return (parts[0] * a64 + parts[1] * b64).astype(np.float32)
