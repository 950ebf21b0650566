"""Rematerialisation over slices of rows: the activations of one slice exist at a time.

Rows are independent of each other, so a block of layers can work on a few of them at a time::

    forward     weights = gather(cast(params))
                for each slice of rows:  y, statistics, residuals = block(weights, x)
                saved: params, x, context, residuals

    backward    weights = gather(cast(params))                                   once more
                for each slice of rows:  block(weights, x, residuals)            once more
                                         dweights, dx = its vjp(dy)
                sum dweights over slices in float32, then scatter the sum once

The block may be a group of layers (models/encoder.py) or the whole encoder (GradCache, in the
training step). GradCache saves token ids alone. It costs one forward pass more if groups work in
slices too. If the block ends in a sum of losses, its gradient is known up to a factor before the
rest of the batch is: `accumulated_loss` needs no second forward pass.
"""

import functools

import jax
import jax.numpy as jnp


def rematerialised_map(block, *, gather, cast, slices: int, params, x_RLD, context):
    """(y_RLD, statistics summed over slices) of `block` on all rows.

    Args:
      block: (weights, rows of x, rows of context, residuals) -> (rows of y, statistics, residuals).
        Its residuals are None in the forward pass. In the backward pass they are what it returned;
        it uses them with `use_saved` and need not compute them again.
      gather: sharded params -> whole ones (linear).
      cast: params -> the same in the dtypes that `block` computes in.
      slices: how many; must divide R.
      x_RLD: None for a block that makes its own.
      context: pytree of arrays with leading R that takes no gradient.

    Gradients of params are summed over slices in float32, whatever `block` computes in.
    """
    return _map(block, gather, cast, slices, params, x_RLD, context)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _map(block, gather, cast, slices, params, x_RLD, context):
    return _map_fwd(block, gather, cast, slices, params, x_RLD, context)[0]


def _map_fwd(block, gather, cast, slices, params, x_RLD, context):
    weights = gather(cast(params))
    rows = _split((x_RLD, context), slices)
    y, statistics, residuals = jax.lax.map(lambda rows: block(weights, *rows, None), rows)
    return (_join(y), _sum(statistics)), (params, x_RLD, context, residuals)


def _map_bwd(block, gather, cast, slices, saved, gradients):
    params, x_RLD, context, residuals = saved
    dy_RLD, dstatistics = gradients
    weights = gather(cast(params))

    def add_slice(total, rows):
        (x_rLD, context, dy_rLD), residuals = rows
        _, vjp = jax.vjp(lambda w, x: block(w, x, context, residuals)[:2], weights, x_rLD)
        dweights, dx_rLD = vjp((dy_rLD, dstatistics))
        return _add(total, dweights), dx_rLD

    rows = _split((x_RLD, context, dy_RLD), slices)
    total, dx = jax.lax.scan(add_slice, _zeros(weights), (rows, residuals))
    _, gather_vjp = jax.vjp(gather, params)
    (dparams,) = gather_vjp(_in_dtypes(total, params))
    return dparams, _join(dx), None


_map.defvjp(_map_fwd, _map_bwd)


@jax.custom_vjp
def use_saved(computed, saved):
    """`saved`, with the gradient of `computed`, whose value is then dead code.

    `saved` None: `computed`.
    """
    return computed if saved is None else saved


use_saved.defvjp(
    lambda computed, saved: (use_saved(computed, saved), saved),
    lambda saved, gradient: (gradient, jax.tree.map(jnp.zeros_like, saved)),
)


def accumulated_loss(block, *, cast, slices: int, params, x_RLD, context):
    """(loss, others), both summed over slices, of `block(weights, x_rLD, context)`.

    Args: as of `rematerialised_map`; `block` returns (loss, others), of which only the scalar loss
      has a gradient.

    The gradient is computed together with the value, and multiplied by the cotangent later. The
    cotangent must be the same on all devices whose losses depend on each other's shards of params.
    """
    return _loss(block, cast, slices, params, x_RLD, context)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(block, cast, slices, params, x_RLD, context):
    weights = cast(params)
    rows = _split((x_RLD, context), slices)
    return _sum(jax.lax.map(lambda rows: block(weights, *rows), rows))


def _loss_fwd(block, cast, slices, params, x_RLD, context):
    weights = cast(params)
    value_and_gradients = jax.value_and_grad(block, argnums=(0, 1), has_aux=True)

    def add_slice(total, rows):
        value, (dweights, dx_rLD) = value_and_gradients(weights, *rows)
        return _add(total, dweights), (value, dx_rLD)

    rows = _split((x_RLD, context), slices)
    total, (values, dx) = jax.lax.scan(add_slice, _zeros(weights), rows)
    return _sum(values), (_in_dtypes(total, params), _join(dx))


def _loss_bwd(block, cast, slices, gradients, cotangents):
    factor, _ = cotangents
    dparams, dx_RLD = jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), gradients)
    return dparams, dx_RLD, None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _zeros(weights):
    """What gradients are summed in: float32."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), weights)


def _add(total, gradients):
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradients)


def _in_dtypes(total, params):
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), total, params)


def _split(tree, slices: int):
    return jax.tree.map(lambda x: x.reshape(slices, -1, *x.shape[1:]), tree)


def _join(tree):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _sum(tree):
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), tree)
