"""Weights as int8 with a float32 scale per output channel, for inference.

An `Int8Weight` stands where an array would stand in the parameters, and behaves as one towards the
code of the layers: they take it with `[...]`, bring it to their dtype with `.astype` and multiply
with it. JAX asks it for an array (`__jax_array__`) when it meets a product, and no sooner: inside
the scans over layers and over experts, float32 values exist of the one matrix at work.

Symmetric: value = int8 * scale, scale = max |value| / 127 over the inputs of an output channel, so
that zero stays zero and no value is off by more than half a scale. That is the usual weight-only
scheme (absmax, "vector-wise" in LLM.int8(), arXiv 2208.07339, section 2.1).
"""

import dataclasses
import re

import jax
import numpy as np

LEVELS = 127  # -127 ... 127; -128 is not used, as usual in symmetric schemes
PIECE = 1 << 22  # values that are rounded at a time, at least one first index's

# Parameters that become int8, and the axis of an output channel's inputs. The router decides which
# experts a token meets, and is small; norms and biases are vectors: they stay float32.
INPUT_AXIS = (
    (r"embeddings/token$", -1),  # [V, D]: a row is read, not multiplied with
    (r"/(qkv|out|up|down)/kernel$", -2),  # [..., inputs, outputs]
    (r"/moe/w_(in|out)$", -2),  # [..., E, inputs, outputs]
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Weight:
    """`values` int8 and `scale`, of one length along the axis of inputs; arrays or host arrays.

    `dtype` is the scale's: what the weight is as an array.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self):
        return self.scale.dtype

    def __len__(self) -> int:
        return len(self.values)

    def astype(self, dtype) -> "Int8Weight":
        """The same weight, to be an array of `dtype`."""
        return dataclasses.replace(self, scale=self.scale.astype(dtype))

    def __getitem__(self, index):
        """`[...]` is the weight itself; an array of indices reads rows, as an array."""
        if index is ...:
            return self
        return Int8Weight(self.values[index], self.scale[index]).__jax_array__()

    def __jax_array__(self) -> jax.Array:
        return self.values.astype(self.dtype) * self.scale


def input_axis(path: str) -> int | None:
    """The axis over which the parameter at `path` is scaled; None: it stays as it is."""
    return next((axis for pattern, axis in INPUT_AXIS if re.search(pattern, path)), None)


def quantized(path: str, array: np.ndarray) -> "np.ndarray | Int8Weight":
    """The parameter at `path` (by layer or stacked) as int8 if it is one of those that become it,
    else as it is.

    In pieces along the first axis: a word table needs no second float32 copy of itself.
    """
    axis = input_axis(path)
    if axis is None:
        return array
    array = np.asarray(array)
    largest = np.maximum(array.max(axis, keepdims=True), -array.min(axis, keepdims=True))
    scale = np.maximum(largest / LEVELS, np.finfo(np.float32).tiny).astype(np.float32)
    of_row = np.broadcast_to(scale, (len(array), *scale.shape[1:]))
    values = np.empty(array.shape, np.int8)
    step = max(1, PIECE // max(array[:1].size, 1))
    for begin in range(0, len(array), step):
        piece = slice(begin, begin + step)
        scaled = array[piece] / of_row[piece]
        values[piece] = np.clip(np.rint(scaled, out=scaled), -LEVELS, LEVELS, out=scaled)
    return Int8Weight(values, scale)
