"""Vectors rounded to the numbers that a device multiplies fast, and how far products may be off.

A product of rounded vectors x~ = x - dx with float32 sums differs from the inner product by::

    |q.d - fl(q~.d~)|  =  |dq.d + q~.dd + (q~.d~ - fl(q~.d~))|
                      <=  |dq| |d|  +  |q~| |dd|  +  c |q~| |d~|  +  2 D 2^-126

The first two terms are Cauchy-Schwarz. The third is the error of D products and D sums in any
order (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1): D u times both norms
at most, with u = 2^-24, or 2^-23 where a unit cuts off instead of rounding; c = (D + 16) 2^-23
leaves room for computing the bound itself in float32. The last is what numbers below 2^-126 may
lose, which units take as zero. A vector keeps three numbers, so that the bound is two products::

    |q.d - fl(q~.d~)|  <=  slope_q size_d + size_q residue_d
    size = |x|,  residue = |dx|,  slope_q = |dq| + 2 c |q|

All three are rounded up, and raised by 2^-61 sqrt(D): that is more than squares below 2^-126 can
add to a norm, and its square is more than the last term. A size above 2^60 becomes infinite, and so
does its bound; products of the others cannot overflow. Where a bound is infinite, the product may
be no number: the caller must take it as "anything".
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rounded(NamedTuple):
    """x_ND: rounded. size_N, residue_N, slope_N: float32, as above."""

    x_ND: jax.Array
    size_N: jax.Array
    residue_N: jax.Array
    slope_N: jax.Array


def rounded(x_ND: jax.Array, dtype) -> Rounded:
    """Rows of `x_ND` as `dtype` (bfloat16, or float32, which rounds nothing).

    Two programs, so not for use in another one: there XLA would take out the conversion to and fro,
    and the residue would be 0. What would stop it, `lax.reduce_precision`, takes twice the time.
    """
    if isinstance(x_ND, jax.core.Tracer):
        raise TypeError("rounded() is made of programs of its own; do not call it inside jax.jit")
    near_ND = _converted(x_ND, dtype)
    return Rounded(near_ND, *_sizes(x_ND, near_ND))


@functools.partial(jax.jit, static_argnums=1)
def _converted(x_ND, dtype):
    return x_ND.astype(jnp.float32).astype(dtype)


@jax.jit
def _sizes(x_ND, near_ND):
    """size_N, residue_N, slope_N."""
    D, rounds = x_ND.shape[1], near_ND.dtype != jnp.float32
    x_ND = x_ND.astype(jnp.float32)
    residue_N = _norm(x_ND - near_ND.astype(jnp.float32)) if rounds else jnp.zeros(len(x_ND))
    c = (D + 16) * 2.0**-23
    least = 2.0**-61 * D**0.5
    # |x~| exceeds |x| by less than the factor 1 + 2^-7.
    size_N = _norm(x_ND) * (1 + c) * (1 + 2.0**-7 if rounds else 1) + least
    size_N = jnp.where(size_N < 2.0**60, size_N, jnp.inf)
    residue_N = residue_N * (1 + c) + least
    return size_N, residue_N, residue_N + 2 * c * size_N


def _norm(x_ND):
    return jnp.sqrt(jnp.square(x_ND).sum(axis=1))
