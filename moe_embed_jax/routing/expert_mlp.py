"""What an expert computes. Another expert MLP is one function, made of `matmul`, and its
kernels."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_embed_jax.kernels.cpu_products import product
from moe_embed_jax.mesh import platform

PRODUCT = "expert_product"  # the results of `matmul`, which `blocked` saves for its backward pass


@dataclasses.dataclass(frozen=True)
class ExpertMLP:
    """The network of one expert, in the forms that back ends take. It does not know who brings the
    tokens.

    function: (x_TD, weights of one expert, a pytree) -> y_TD, for `blocked`, `capacity` and
      `reference`. y and the operands of all products have the dtype of x, whatever that of the
      weights is.
    kernel: the same on tiles of sorted rows, for `grouped` (`kernels.experts.ActivationMLP` says
      what it must have); None: `grouped` cannot compute this MLP.
    triton_kernel: likewise for `ragged` (`kernels.triton_experts.TritonMLP`).
    """

    function: Callable
    kernel: Any = None
    triton_kernel: Any = None


def matmul(x_TD, w_DF):
    """`x_TD @ w_DF`, operands in the dtype of x; the result, too, but on CPUs float32, as products
    of bfloat16 are there. The gradient of w is summed in float32, and in w's dtype.

    The result is named PRODUCT, so that a checkpoint policy can save it.
    """
    if platform() == "cpu":
        return checkpoint_name(product(x_TD, w_DF), PRODUCT)
    return checkpoint_name(_matmul(x_TD, w_DF), PRODUCT)


@jax.custom_vjp
def _matmul(x_TD, w_DF):
    return x_TD @ w_DF.astype(x_TD.dtype)


def _matmul_bwd(saved, dy_TF):
    x_TD, w_DF = saved
    dx_TD = dy_TF @ w_DF.astype(dy_TF.dtype).T
    dw_DF = jnp.matmul(x_TD.T, dy_TF, preferred_element_type=jnp.float32)
    return dx_TD, dw_DF.astype(w_DF.dtype)


_matmul.defvjp(lambda x_TD, w_DF: (_matmul(x_TD, w_DF), (x_TD, w_DF)), _matmul_bwd)
