"""Taking the output bias of expert layers out of a model.

llama.cpp's converter drops this tensor, so that a GGUF file of a model that has one is another
model.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from moe_embed_jax.errors import UserError
from moe_embed_jax.models.encoder import EncoderConfig


def output_bias_size(arrays: Mapping[str, np.ndarray]) -> float:
    """Root mean square of the biases in {path by layer: array}; 0 without any."""
    biases = [array for path, array in arrays.items() if path.endswith("/moe/bias")]
    return float(np.sqrt(np.mean(np.square(biases, dtype=np.float64)))) if biases else 0.0


def check_output_bias(model: EncoderConfig) -> None:
    """Raises `UserError` for a model without the bias."""
    if not (model.num_moe_layers and model.expert_output_bias):
        raise UserError("this model has no output bias of experts: nothing to drop")


def drop_output_bias(model: EncoderConfig, params: dict) -> tuple[EncoderConfig, dict, float]:
    """(architecture and parameters without the bias, root mean square of what was dropped).

    Raises `UserError` for a model that has none.
    """
    check_output_bias(model)
    parts, biases = dict(params), {}
    for part in model.parts:
        parts[part] = dict(params[part])
        for block, layers in params[part].items():
            if "moe" in layers:
                kept = dict(layers["moe"])
                for layer, bias in enumerate(np.asarray(kept.pop("bias"))):
                    biases[f"{part}/{block}/{layer}/moe/bias"] = bias
                parts[part][block] = dict(layers) | {"moe": kept}
    without = dataclasses.replace(model, expert_output_bias=False)
    return without, parts, output_bias_size(biases)
