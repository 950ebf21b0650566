"""The sparse feed-forward layer: router, experts, one output bias for all of them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_embed_jax.kernels.experts import ActivationMLP
from moe_embed_jax.kernels.triton_experts import TritonMLP
from moe_embed_jax.models.feed_forward import gelu, gelu_and_slope
from moe_embed_jax.models.linear import add_bias
from moe_embed_jax.routing.exchange import Experts, apply_experts
from moe_embed_jax.routing.expert_mlp import ExpertMLP, matmul
from moe_embed_jax.routing.router import RoutingStatistics, gates_of_all, route


def gelu_mlp(x_TD, weights: dict):
    """gelu(x w_in + bias_in) w_out of one expert, in the dtype of x; on CPUs in float32 between the
    products.

    The output bias is the layer's.
    """
    pre_TF = matmul(x_TD, weights["w_in"])
    if weights["bias_in"] is not None:
        pre_TF = add_bias(pre_TF, weights["bias_in"])
    hidden_TF = gelu(pre_TF).astype(x_TD.dtype)
    return matmul(hidden_TF, weights["w_out"]).astype(x_TD.dtype)


GELU_MLP = ExpertMLP(gelu_mlp, ActivationMLP(gelu), TritonMLP(gelu_and_slope))


class MoE(nnx.Module):
    """E experts of which each token uses K; the router always computes in float32."""

    def __init__(self, config, kernel_init, rngs: nnx.Rngs):
        experts, width, ffn = config.num_experts, config.width, config.ffn_width
        self.dtype = config.dtype
        self.experts_per_token = config.experts_per_token
        self.normalize_gates = config.normalize_gates
        self.experts = Experts(
            config.expert_backend,
            config.expert_exchange,
            config.capacity_factor,
            config.router_gradient,
        )
        self.router = nnx.Linear(
            width,
            experts,
            use_bias=False,
            dtype=jnp.float32,
            precision="highest",
            kernel_init=kernel_init,
            rngs=rngs,
        )
        self.w_in = nnx.Param(kernel_init(rngs.params(), (experts, width, ffn)))
        self.w_out = nnx.Param(kernel_init(rngs.params(), (experts, ffn, width)))
        self.bias_in = nnx.Param(jnp.zeros((experts, ffn))) if config.expert_bias else None
        self.bias = nnx.Param(jnp.zeros(width)) if config.expert_output_bias else None

    def __call__(self, x_RLD, valid_RL, keep_choices=False) -> tuple[jax.Array, RoutingStatistics]:
        logits_RLE = self.router(x_RLD.astype(jnp.float32))
        x_RLD = x_RLD.astype(self.dtype)
        expert_RLK, gates, statistics = route(
            logits_RLE, valid_RL, self.experts_per_token, self.normalize_gates
        )
        if self.experts.router_gradient == "dense":
            gates = gates, gates_of_all(logits_RLE, expert_RLK, self.normalize_gates)
        weights = {"w_in": self.w_in, "bias_in": self.bias_in, "w_out": self.w_out}
        weights = {
            name: None if w is None else w[...].astype(x_RLD.dtype) for name, w in weights.items()
        }
        y_RLD, dropped = apply_experts(GELU_MLP, x_RLD, expert_RLK, gates, weights, self.experts)
        kept_RLK = expert_RLK if keep_choices else None
        statistics = dataclasses.replace(statistics, dropped=dropped, expert_RLK=kept_RLK)
        if self.bias is not None:
            y_RLD = add_bias(y_RLD, self.bias[...].astype(x_RLD.dtype))
        return y_RLD, statistics
