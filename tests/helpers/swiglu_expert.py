"""An example of another expert MLP: SwiGLU (arXiv 2002.05202). This file is all that it takes, but
for the kernels that the back ends `grouped` and `ragged` need."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_embed_jax.routing.expert_mlp import ExpertMLP, matmul


def swiglu_mlp(x_TD, weights: dict):
    """(silu(x w_gate) * (x w_up)) w_down of one expert."""
    gate_TF, up_TF = (matmul(x_TD, weights[name]) for name in ("w_gate", "w_up"))
    hidden_TF = (jax.nn.silu(gate_TF) * up_TF).astype(x_TD.dtype)
    return matmul(hidden_TF, weights["w_down"]).astype(x_TD.dtype)


SWIGLU_MLP = ExpertMLP(swiglu_mlp)


def swiglu_weights(experts: int, width: int, ffn: int) -> dict:
    rng = np.random.default_rng(1)
    shapes = {"w_gate": (width, ffn), "w_up": (width, ffn), "w_down": (ffn, width)}
    return {
        name: jnp.asarray(rng.normal(size=(experts, *shape)) / shape[0] ** 0.5, jnp.float32)
        for name, shape in shapes.items()
    }
