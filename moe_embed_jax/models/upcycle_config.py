"""How a dense encoder becomes an MoE encoder, as flags state it. Imports no jax."""

import dataclasses

from moe_embed_jax.config import setting
from moe_embed_jax.errors import UserError
from moe_embed_jax.models.encoder_config import EncoderConfig

MODES = ("paper", "preserving")  # what they do: upcycle.py


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    mode: str = "paper"  # or "preserving"
    num_experts: int = setting(EncoderConfig.num_experts, flag="of a layer")
    experts_per_token: int = setting(EncoderConfig.experts_per_token, flag="that work on a token")
    moe_every: int = setting(EncoderConfig.moe_every, flag="one layer in this many has experts")
    # Standard deviation added to each expert's matrices, in units of their own.
    noise: float = setting(0.0, flag="on the experts, relative")
    seed: int = setting(0, flag="of the routers and the noise")
    expert_output_bias: bool = EncoderConfig.expert_output_bias  # of the result

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"upcycling mode {self.mode!r}: choose from {', '.join(MODES)}")
        if self.moe_every < 1:
            raise UserError(
                f"moe_every={self.moe_every}: upcycling needs layers with experts (>= 1)"
            )
        if self.mode == "preserving" and not self.expert_output_bias:
            raise UserError(
                "mode 'preserving' with expert_output_bias=False: the dense layer's output bias "
                "would be lost, and no GGUF file is made of this architecture; use mode 'paper'"
            )
        if self.noise < 0:
            raise UserError(f"noise={self.noise} must not be negative")
        if self.mode == "preserving" and self.experts_per_token == 1:
            raise UserError(
                "mode 'preserving' with experts_per_token=1: the only gate would always be 1 and "
                "the router would learn nothing from the loss; use 2 or more, or mode 'paper'"
            )
