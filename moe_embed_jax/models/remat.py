"""A block that works on a few rows at a time, so that the activations of one piece exist at a time.

`in_pieces` computes them again for the backward pass; `loss_in_pieces` need not.

Rows are independent of each other, so `in_pieces` keeps only the input of the block, and what it
asks for. The block may be a group of layers (models/encoder.py), or the whole encoder (GradCache,
training/step.py): that keeps no more than token ids, and where groups work in pieces inside, costs
a forward pass more. Where the block ends in a sum of losses, its gradient is known up to a factor
before the rest of the batch is: `loss_in_pieces` adds it up piece by piece.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def in_pieces(block, gather, cast, pieces: int, params, x_RLD, context):
    """(y_RLD, statistics summed over pieces) of `block(weights, x_rLD, context, None)`.

    Args:
      block: (weights, rows of x, rows of context, kept) -> (rows of y, statistics, kept). What it
        gives as `kept` is saved, and given back to it in the backward pass, to be used by `instead`
        in place of computing it again; None in the forward pass.
      gather: params as they are sharded -> whole ones (linear).
      cast: params -> the same in the dtypes that `block` computes in.
      pieces: how many; must divide R.
      x_RLD: or None, for a block that makes its own.
      context: pytree of arrays with leading R that takes no gradient.

    Gradients of params are summed over pieces in float32, whatever `block` computes in.
    """
    return _fwd(block, gather, cast, pieces, params, x_RLD, context)[0]


def _fwd(block, gather, cast, pieces, params, x_RLD, context):
    weights = gather(cast(params))
    rows = _split((x_RLD, context), pieces)
    y, statistics, kept = jax.lax.map(lambda piece: block(weights, *piece, None), rows)
    return (_join(y), _sum(statistics)), (params, x_RLD, context, kept)


def _bwd(block, gather, cast, pieces, saved, gradients):
    params, x_RLD, context, kept = saved
    dy_RLD, dstatistics = gradients
    weights = gather(cast(params))

    def add_piece(total, piece):
        (x_rLD, context, dy_rLD), kept = piece
        _, vjp = jax.vjp(lambda w, x: block(w, x, context, kept)[:2], weights, x_rLD)
        dweights, dx_rLD = vjp((dy_rLD, dstatistics))
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, dweights), dx_rLD

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), weights)
    rows = _split((x_RLD, context, dy_RLD), pieces)
    total, dx = jax.lax.scan(add_piece, zeros, (rows, kept))
    _, gather_vjp = jax.vjp(gather, params)
    total = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), total, params)
    (dparams,) = gather_vjp(total)
    return dparams, _join(dx), None


in_pieces.defvjp(_fwd, _bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def loss_in_pieces(block, cast, pieces: int, params, x_RLD, context):
    """(loss, others), both summed over pieces, of `block(weights, x_rLD, context)`.

    Args: as those of `in_pieces`; `block` gives (loss, others), of which only the scalar loss has a
    gradient. It is computed together with the value, and multiplied by the cotangent later; that
    must be the same on all devices whose losses depend on each other's shards of params.
    """
    weights = cast(params)
    rows = _split((x_RLD, context), pieces)
    return _sum(jax.lax.map(lambda piece: block(weights, *piece), rows))


def _loss_fwd(block, cast, pieces, params, x_RLD, context):
    weights = cast(params)
    value_and_gradients = jax.value_and_grad(block, argnums=(0, 1), has_aux=True)

    def add_piece(total, piece):
        value, (dweights, dx_rLD) = value_and_gradients(weights, *piece)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, dweights), (value, dx_rLD)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), weights)
    total, (values, dx) = jax.lax.scan(add_piece, zeros, _split((x_RLD, context), pieces))
    dparams = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), total, params)
    return _sum(values), (dparams, _join(dx))


def _loss_bwd(block, cast, pieces, gradients, cotangents):
    factor, _ = cotangents
    dparams, dx_RLD = jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), gradients)
    return dparams, dx_RLD, None


loss_in_pieces.defvjp(_loss_fwd, _loss_bwd)


@jax.custom_vjp
def instead(computed, kept):
    """`kept`, with the gradient of `computed`: what only leads to its value is not computed."""
    return computed if kept is None else kept


instead.defvjp(
    lambda computed, kept: (instead(computed, kept), kept),
    lambda kept, gradient: (gradient, jax.tree.map(jnp.zeros_like, kept)),
)


def _split(tree, pieces: int):
    return jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), tree)


def _join(tree):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _sum(tree):
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), tree)
