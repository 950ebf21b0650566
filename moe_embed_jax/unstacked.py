"""Parameters of layers and experts as arrays of their own, for inference on a CPU.

Training stacks the weights of all layers, and of all experts, so that a scan compiles one layer.
On a CPU each step of a scan copies its slice of them before it multiplies with it, so that one
short text costs a copy of the whole model. An `Unstacked` stands where the stacked array would
stand, and behaves as one towards the code of the layers; loops over it are unrolled instead.

Its matrices are `Turned`. XLA packs a matrix that lies by inputs before it multiplies, which was a
quarter (float32) to a half (bfloat16) of the call for a short text.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turned:
    """The matrix [D, N] of inputs and outputs that lies in memory as `by_output_ND`."""

    by_output_ND: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        return self.by_output_ND.shape[::-1]

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self):
        return self.by_output_ND.dtype

    def astype(self, dtype) -> "Turned":
        return Turned(self.by_output_ND.astype(dtype))

    def __getitem__(self, index):
        return self if index is ... else jnp.asarray(self)[index]

    def __jax_array__(self) -> jax.Array:
        """For layers that need the matrix itself."""
        return self.by_output_ND.T


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unstacked:
    """`pieces`: what stacked along a new first axis would be the array [n, ...]; arrays, `Turned`
    ones, or `Unstacked` themselves."""

    pieces: tuple

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.pieces), *self.pieces[0].shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self):
        return self.pieces[0].dtype

    def astype(self, dtype) -> "Unstacked":
        return Unstacked(tuple(piece.astype(dtype) for piece in self.pieces))

    def __getitem__(self, index):
        """`[...]` is the parameter itself, a number one of its pieces."""
        return self if index is ... else self.pieces[index]

    def __jax_array__(self) -> jax.Array:
        """For layers that need the stacked array: a copy."""
        return jnp.stack([jnp.asarray(piece) for piece in self.pieces])

    def arrays(self) -> Iterator[jax.Array]:
        """The arrays that make the stacked array, one after the other."""
        for piece in self.pieces:
            yield from piece.arrays() if isinstance(piece, Unstacked) else [jnp.asarray(piece)]

    def specs(self, spec: P) -> "Unstacked":
        """The PartitionSpecs of the pieces, from that of the stacked array; its first axis must not
        be split."""
        rest = P(*spec[1:])
        return Unstacked(
            tuple(p.specs(rest) if isinstance(p, Unstacked) else rest for p in self.pieces)
        )


def is_unstacked(tree) -> bool:
    """Whether a tree of parameters holds one."""
    return any(isinstance(leaf, Unstacked) for leaf in jax.tree.leaves(tree, is_leaf=_is_one))


def _is_one(node) -> bool:
    return isinstance(node, Unstacked)


def piece_of(tree, index: int):
    """A tree of `Unstacked` parameters -> that of their pieces at `index`."""
    return jax.tree.map(lambda leaf: leaf[index], tree, is_leaf=_is_one)


def unstack(array, axes: int, is_matrix: bool, device) -> "Unstacked | Turned | jax.Array":
    """A stacked parameter on a CPU `device`, whose first `axes` axes become pieces. Matrices are
    turned; other arrays share their memory with the pieces where JAX can."""
    if axes:
        pieces = (unstack(piece, axes - 1, is_matrix, device) for piece in np.asarray(array))
        return Unstacked(tuple(pieces))
    if is_matrix:
        return Turned(jax.device_put(np.ascontiguousarray(array.T), device))
    return jax.device_put(array, device)
