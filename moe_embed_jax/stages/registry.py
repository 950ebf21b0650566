"""Which stage trains what `objective` of a config names."""

from moe_embed_jax.stages.contrastive import Contrastive
from moe_embed_jax.stages.masked_lm import MaskedLM
from moe_embed_jax.stages.stage import Stage

STAGES: dict[str, type[Stage]] = {stage.objective: stage for stage in (Contrastive, MaskedLM)}
