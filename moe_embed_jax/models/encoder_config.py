"""The architecture of an encoder, as configs state it. Imports no jax."""

import dataclasses
import math

from moe_embed_jax.config import FREE_IF_DROPLESS, setting
from moe_embed_jax.errors import UserError

# Names in routing/exchange.py, whose functions need jax.
BACKENDS = ("blocked", "grouped", "ragged", "capacity")
EXCHANGES = ("ring", "all_to_all")
ROUTER_GRADIENTS = ("sparse", "dense")
POOLINGS = ("mean", "cls", "last")
# The largest sizes that are believed: a config that says more is damaged, and building that model
# would take hours or all memory.
LIMITS = {
    "vocab_size": 10_000_000,
    "num_layers": 1_000,
    "moe_every": 1_000,
    "width": 65_536,
    "num_heads": 4_096,
    "ffn_width": 1_048_576,
    "shared_expert_width": 1_048_576,
    "num_experts": 4_096,
    "max_positions": 1_048_576,
    "token_types": 1_024,
}
MAY_BE_0 = ("num_experts", "max_positions", "moe_every", "shared_expert_width")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Architecture. Defaults are the released model's (paper_facts: 475M total, 305M active)."""

    vocab_size: int = 250_048
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    ffn_width: int = 3072
    num_experts: int = 8
    experts_per_token: int = 2
    moe_every: int = 2  # 0: all dense; 1: every layer MoE; n: layers 1, n+1, 2n+1, ... (from 0)
    normalize_gates: bool = False  # gates of a token's experts sum to 1 (the paper: not)
    expert_bias: bool = False  # a hidden bias in every expert (the paper: none)
    # An output bias of each layer with experts, as published. llama.cpp's converter drops it, so
    # GGUF files are exact only for models without.
    expert_output_bias: bool = True
    # Hidden width of a dense feed-forward layer beside the experts, whose output every token adds
    # to theirs (DeepSeekMoE, arXiv 2401.06066, section 3.2). 0: none, as in the paper.
    shared_expert_width: int = 0
    positions: str = "rotary"  # or "learned": a table of max_positions rows, as BERT
    max_positions: int = 0  # 0 with rotary positions, which know no limit
    rotary_base: float = 10_000.0
    # Of the token states: their mean, that of the first token (BERT's [CLS]), or of the last one.
    pooling: str = "mean"
    token_types: int = 1  # rows of BERT's table of token types; row 0 is added to every token
    norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    # Of activations and matrix products; parameters stay float32.
    dtype: str = setting("float32", computes=True)
    # "auto": the fastest for the devices; or one of `BACKENDS`. "capacity" may drop tokens.
    expert_backend: str = setting("auto", FREE_IF_DROPLESS, computes=True)
    # Over a mesh with an expert axis; or "all_to_all", which may drop tokens.
    expert_exchange: str = setting("ring", FREE_IF_DROPLESS, computes=True)
    # Size of the cells of all_to_all and capacity; 1: equal shares.
    capacity_factor: float = setting(1.25, FREE_IF_DROPLESS, computes=True)
    # In training: from the chosen experts' outputs ("sparse"), or from all experts' ("dense",
    # routing/dense_gradient.py), for one more forward pass of every expert on every token.
    router_gradient: str = setting("sparse", computes=True)
    # Rows whose activations in a group of blocks exist at a time on a device; they are computed
    # again in the backward pass from what is kept: the group's input, and the sum before the last
    # norm of each block. 0: all rows at a time, and all is kept.
    remat_rows: int = setting(0, FREE_IF_DROPLESS, computes=True)

    def __post_init__(self):
        self._check_sizes()
        if self.positions not in ("rotary", "learned"):
            raise UserError(f"model.positions={self.positions!r:.60}: choose 'rotary' or 'learned'")
        if (self.positions == "learned") != (self.max_positions > 0):
            raise UserError(
                f"model.max_positions={self.max_positions} with positions={self.positions!r:.60}: "
                "learned positions need a table size above 0, rotary ones need none (0)"
            )
        unit = self.num_heads * (2 if self.positions == "rotary" else 1)
        if self.width % unit:
            raise UserError(
                f"model.width={self.width} must be divisible by {unit}: num_heads="
                f"{self.num_heads}"
                + (", and rotary positions turn pairs" * (unit > self.num_heads))
            )
        if self.moe_every and not 1 <= self.experts_per_token <= self.num_experts:
            raise UserError(
                f"model.experts_per_token={self.experts_per_token} must be between 1 and "
                f"num_experts={self.num_experts}"
            )
        if self.shared_expert_width and not self.num_moe_layers:
            raise UserError(
                f"model.shared_expert_width={self.shared_expert_width}, but no layer has experts "
                f"(moe_every={self.moe_every}, num_layers={self.num_layers}): leave it out"
            )
        for name, known in (
            ("dtype", ["float32", "bfloat16"]),  # float16 would need loss scaling
            ("pooling", list(POOLINGS)),
            ("expert_backend", ["auto", *BACKENDS]),
            ("expert_exchange", list(EXCHANGES)),
            ("router_gradient", list(ROUTER_GRADIENTS)),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"model.{name}={getattr(self, name)!r:.60}: choose from {known}")
        if self.router_gradient == "dense":
            for name, drops in (("expert_backend", "capacity"), ("expert_exchange", "all_to_all")):
                if getattr(self, name) == drops:
                    raise UserError(
                        f"model.router_gradient='dense' needs every expert on every token, and "
                        f"model.{name}={drops!r} drops tokens: choose another {name}"
                    )
        if self.remat_rows < 0:
            raise UserError(f"model.remat_rows={self.remat_rows} must be 0 (off) or more")

    def _check_sizes(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= limit:
                raise UserError(
                    f"model.{name}={value!r:.40} must be a whole number, at most {limit:,}"
                )
            if value == 0 and name not in MAY_BE_0:
                raise UserError(f"model.{name}=0 must be 1 or more")
        for name in ("rotary_base", "norm_epsilon", "initializer_range", "capacity_factor"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"model.{name}={value!r:.40} must be above 0, and finite")

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has experts: the published model's `i % n == 1`."""
        return self.moe_every > 0 and layer % self.moe_every == 1 % self.moe_every

    @property
    def group_size(self) -> int:
        return max(self.moe_every, 1)

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """{"groups": (G, blocks in a group), "tail": (1, blocks left over)}, without empty ones."""
        full, rest = divmod(self.num_layers, self.group_size)
        parts = {"groups": (full, self.group_size), "tail": (1, rest)}
        return {name: (count, size) for name, (count, size) in parts.items() if count and size}

    @property
    def moe_layers(self) -> list[int]:
        """Layers with experts, counted from 0, in the order of the routing statistics."""
        return [layer for layer in range(self.num_layers) if self.is_moe(layer)]

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)


# How a model is computed, instead of what it is.
COMPUTE_FIELDS = tuple(
    field.name for field in dataclasses.fields(EncoderConfig) if field.metadata.get("computes")
)


def architecture(config: EncoderConfig) -> dict:
    """The fields that decide what a model with given parameters computes."""
    not_seen = (*COMPUTE_FIELDS, "initializer_range")
    return {name: value for name, value in vars(config).items() if name not in not_seen}
