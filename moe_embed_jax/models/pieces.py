"""A block that works on a few rows at a time, and computes its activations again for the backward
pass.

Rows are independent of each other, so only the input of the block is kept, and the activations of
one piece exist at a time, forward and backward. Compared with one jax.checkpoint around an encoded
chunk (GradCache, training/step.py) this saves a forward pass, and costs the inputs of all blocks.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def in_pieces(block, gather, cast, pieces: int, params, x_RLD, context):
    """(y_RLD, statistics summed over pieces) of `block(weights, x_rLD, context)`.

    Args:
      block: (weights, rows of x, rows of context) -> (rows of y, statistics).
      gather: params as they are sharded -> whole ones (linear).
      cast: params -> the same in the dtypes that `block` computes in.
      pieces: how many; must divide R.
      context: pytree of arrays with leading R that takes no gradient.

    Gradients of params are summed over pieces in float32, whatever `block` computes in.
    """
    weights = gather(cast(params))
    rows = _split((x_RLD, context), pieces)
    y, statistics = jax.lax.map(lambda piece: block(weights, *piece), rows)
    return _join(y), jax.tree.map(lambda leaf: leaf.sum(axis=0), statistics)


def _fwd(block, gather, cast, pieces, params, x_RLD, context):
    result = in_pieces(block, gather, cast, pieces, params, x_RLD, context)
    return result, (params, x_RLD, context)


def _bwd(block, gather, cast, pieces, saved, gradients):
    params, x_RLD, context = saved
    dy_RLD, dstatistics = gradients
    weights = gather(cast(params))

    def add_piece(total, piece):
        x_rLD, context, dy_rLD = piece
        _, vjp = jax.vjp(lambda weights, x: block(weights, x, context), weights, x_rLD)
        dweights, dx_rLD = vjp((dy_rLD, dstatistics))
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, dweights), dx_rLD

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), weights)
    total, dx = jax.lax.scan(add_piece, zeros, _split((x_RLD, context, dy_RLD), pieces))
    _, gather_vjp = jax.vjp(gather, params)
    total = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), total, params)
    (dparams,) = gather_vjp(total)
    return dparams, _join(dx), None


in_pieces.defvjp(_fwd, _bwd)


def _split(tree, pieces: int):
    return jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), tree)


def _join(tree):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
