"""Sparse upcycling (arXiv 2212.05055; paper section 3): a dense encoder becomes an MoE encoder.

The feed-forward layers at the MoE positions are copied into every expert; routers start random. Two
rule tables say what becomes of the rest:

* `paper`: as the reference. The biases of the copied layers are dropped, and gates (softmax over
  all experts, not renormalised) sum to less than 1: with equal experts the MoE branch starts at
  about 0.4 of the dense branch (8 experts, top-2, fresh router: 0.43 for tokens of unit variance at
  width 768, 0.37 for two thirds of that variance, 0.25 at least), and the upcycled model is not the
  dense one at step 0.
* `preserving`: biases move into the experts and gates are renormalised, so that the weighted sum of
  equal experts is the dense layer: the upcycled model's output is the dense model's at step 0.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.layers import by_layer, from_layers, shapes_by_layer
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.models.upcycle_config import UpcycleConfig

# Dense parameter -> (MoE parameter, whether every expert gets a copy), or None: dropped.
_COMMON = {
    "feed_forward/up/kernel": ("moe/w_in", True),
    "feed_forward/down/kernel": ("moe/w_out", True),
}
RULES = {
    "paper": _COMMON | {"feed_forward/up/bias": None, "feed_forward/down/bias": None},
    "preserving": _COMMON
    | {
        "feed_forward/up/bias": ("moe/bias_in", True),
        "feed_forward/down/bias": ("moe/bias", False),
    },
}


def upcycled_model(model: EncoderConfig, config: UpcycleConfig) -> EncoderConfig:
    """The architecture of the result. Raises `UserError` if `model` has experts already."""
    if model.num_moe_layers:
        raise UserError("the source has experts already: only a dense encoder can be upcycled")
    preserving = config.mode == "preserving"
    return dataclasses.replace(
        model,
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        moe_every=config.moe_every,
        normalize_gates=preserving,
        expert_bias=preserving,
        expert_output_bias=config.expert_output_bias,
    )


def upcycle(
    model: EncoderConfig, params: dict, config: UpcycleConfig
) -> tuple[EncoderConfig, dict]:
    """(MoE architecture, parameters as NumPy float32) from a dense encoder."""
    target = upcycled_model(model, config)
    return target, from_layers(target, _arrays(by_layer(model, params), target, config))


def _arrays(
    dense: dict[str, np.ndarray], target: EncoderConfig, config: UpcycleConfig
) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(config.seed)
    rules = RULES[config.mode]
    shapes = shapes_by_layer(target)
    given = set()
    for path, array in dense.items():
        _, _, rest = path.partition("/")
        layer, _, inner = rest.partition("/")
        if not (path.startswith("layers/") and target.is_moe(int(layer)) and inner in rules):
            given.add(path)
            yield path, array
        elif rules[inner] is not None:
            name, every_expert = rules[inner]
            name = f"layers/{layer}/{name}"
            if every_expert:
                array = np.broadcast_to(array, (config.num_experts, *array.shape))
            if config.noise and array.ndim == 3:
                scale = config.noise * array[0].std()
                array = array + scale * rng.standard_normal(array.shape, np.float32)
            given.add(name)
            yield name, array
    for name, shape in shapes.items():
        if name.endswith("/moe/router/kernel"):
            yield name, target.initializer_range * rng.standard_normal(shape, np.float32)
        elif name not in given:  # the layer's output bias in mode `paper`
            yield name, np.zeros(shape, np.float32)
