"""Rematerialisation over slices of rows: the activations of one slice exist at a time.

Rows are independent of each other, so a block of layers can work on a few of them at a time::

    forward     weights = gather(cast(params))
                for each slice of rows:  y, statistics = block(weights, x)
                saved: params, x, context, and the values of `saved_names`

    backward    weights = gather(cast(params))                                 once more
                for each slice of rows:  block(weights, x), without what leads to saved values only
                                         dweights, dx = its vjp(dy)
                sum dweights over slices in float32, then scatter the sum once

The block may be a group of layers (models/encoder.py) or the whole encoder (GradCache, in
stages/contrastive.py). GradCache saves token ids alone. It costs one forward pass more if groups
work in slices too. If the block ends in a sum of losses, its gradient is known up to a factor
before the rest of the batch is: `accumulated_loss` needs no second forward pass.
"""

import functools

import jax
import jax.numpy as jnp


def rematerialised_map(
    block, *, gather, cast, slices: int, params, x_RLD, context, saved_names: tuple[str, ...] = ()
):
    """(y_RLD, statistics summed over slices) of `block` on all rows.

    Args:
      block: (weights, rows of x, rows of context) -> (rows of y, statistics).
      gather: sharded params -> whole ones (linear).
      cast: params -> the same in the dtypes that `block` computes in.
      slices: how many; must divide R.
      x_RLD: None for a block that makes its own.
      context: pytree of arrays with leading R that takes no gradient.
      saved_names: of values in `block` (`jax.ad_checkpoint.checkpoint_name`) that the backward pass
        does not compute again.

    Gradients of params are summed over slices in float32, whatever `block` computes in.
    """
    policy = jax.checkpoint_policies.save_only_these_names(*saved_names)

    @functools.partial(jax.checkpoint, policy=policy)
    def all_rows(params, x_RLD, context):
        weights = gather(cast(params))

        @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
        def one_slice(float32, rows):
            return block(_in_dtypes(float32, weights), *rows)

        # The scan sums the gradient of what it closes over in its dtype.
        float32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)
        _, (y, statistics) = jax.lax.scan(
            lambda _, rows: (None, one_slice(float32, rows)), None, _split((x_RLD, context), slices)
        )
        return _join(y), _sum(statistics)

    return all_rows(params, x_RLD, context)


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
