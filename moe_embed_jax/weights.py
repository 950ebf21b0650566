"""What the weights of a model are kept as while it embeds: `Embedder.load(folder, weights=...)`.

Imports no jax until a model is loaded.
"""

from collections.abc import Callable

from moe_embed_jax.errors import UserError

# "auto": "bfloat16" on one CPU device that multiplies it faster than float32, else "float32".
WEIGHTS = ("float32", "bfloat16", "int8", "auto")


def chosen(weights: str, mesh) -> str:
    """`weights` for a model on `mesh`, with "auto" decided.

    Raises `UserError` for what is not one of `WEIGHTS`, and for bfloat16 and int8 on a mesh that is
    not one CPU device.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights={weights!r}: choose one of {', '.join(WEIGHTS)}")
    device, *others = mesh.devices.flat
    is_one_cpu = not others and device.platform == "cpu"
    if weights == "auto":
        from moe_embed_jax.kernels.cpu_products import bfloat16_is_faster

        return "bfloat16" if is_one_cpu and bfloat16_is_faster() else "float32"
    if weights != "float32" and not is_one_cpu:
        raise UserError(
            f"weights={weights!r} is for one CPU device; this mesh has {mesh.size} of platform "
            f"{device.platform}: use weights='float32'"
        )
    return weights


def form_of(weights: str) -> Callable:
    """(path, array) -> what becomes the parameter, for weights that were `chosen`."""
    import ml_dtypes
    import numpy as np

    from moe_embed_jax.models.int8_weight import input_axis, quantized

    def rounded(path: str, array):
        is_matrix = input_axis(path) is not None
        return np.asarray(array).astype(ml_dtypes.bfloat16) if is_matrix else array

    return {"float32": lambda _, array: array, "bfloat16": rounded, "int8": quantized}[weights]
