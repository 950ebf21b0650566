"""NomicBERT with a sparse mixture of experts, in plain PyTorch: text in, token states out.

This file travels with an exported checkpoint as `modeling_moe_embed.py` and needs only torch and
transformers (4.57 or 5.x). Load the folder with `trust_remote_code=True`:

    AutoModel.from_pretrained(folder, trust_remote_code=True)
    SentenceTransformer(folder, trust_remote_code=True)

Tensors are named and shaped as in nomic-embed-text-v2-moe (arXiv 2502.07972, section 3).
Shape letters: B texts, L positions, T = B * L tokens, D width, H heads, C head size, F hidden width
of a feed-forward, E experts, K experts per token, n tokens of one expert.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# transformers >= 5.5 has its own class for model_type "nomic_bert", which knows neither these
# keys nor experts. It wants a string in `hidden_act`: a list stops it, and its error shows it.
NATIVE_CLASS_GUARD = [
    "the nomic_bert class inside transformers reads other keys than this config.json has, and "
    "fills what it misses with random numbers: pass trust_remote_code=True to use "
    "modeling_moe_embed.py of this folder"
]

# Fields of the published config.json which this file reads, and what absence means.
_DEFAULTS = {
    "vocab_size": 250048,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,  # null: 4 * n_embd
    "n_positions": 2048,
    "type_vocab_size": 1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "rotary_emb_base": 10000,
    "num_experts": 0,
    "moe_top_k": 2,
    "moe_every_n_layers": 2,
    "moe_normalize_expert_weights": False,  # true: the K gates of a token sum to 1
    "moe_expert_bias": False,  # ours: every expert has a hidden bias, `experts.mlp.b1`
    "moe_shared_expert_width": 0,  # ours: a feed-forward beside the experts, `mlp.fc1`, `mlp.fc2`
    "pooling": "mean",  # ours, of `embed`: or "cls" (the first token) or "last"
}

# Fields whose other values would need code that is not here; the first value is the default.
_SUPPORTED = {
    "activation_function": ("gelu",),
    "rotary_emb_fraction": (1, 0),  # 0: learned positions (ours)
    "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (None,),
    "rotary_scaling_factor": (None,),
    "prenorm": (False,),
    "parallel_block": (False,),
    "causal": (False,),
    "use_rms_norm": (None, False),
    "qkv_proj_bias": (True,),
    "mlp_fc1_bias": (True,),
    "mlp_fc2_bias": (True,),
    "expert_choice_router": (False,),
    "num_shared_experts": (0,),
    "ffn_div": (1,),
}


class NomicBertConfig(PretrainedConfig):
    """The fields of the published config.json; unknown ones are kept and written back.

    Raises `ValueError` naming the field for an architecture that this file does not implement.
    """

    model_type = "nomic_bert"
    attribute_map = {  # noqa: RUF012 (transformers wants a plain class attribute)
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "layer_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    }

    def __init__(self, pad_token_id=1, **kwargs):
        for name in ("model_type", "hidden_act"):  # the guard is written, never read
            kwargs.pop(name, None)
        kwargs = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        for name, default in _DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        for name, values in _SUPPORTED.items():
            value = kwargs.pop(name, values[0])
            if value not in values:
                raise ValueError(f"config.json: {name}={value!r} is not supported, only {values}")
            setattr(self, name, value)
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
        if self.n_embd % (2 * self.n_head):
            sizes = f"n_embd={self.n_embd} is not a multiple of 2 * n_head={self.n_head}"
            raise ValueError(f"config.json: {sizes}")
        super().__init__(pad_token_id=pad_token_id, **kwargs)
        # transformers 5.5 to 5.12 save any model with this `model_type`, custom code or not, under
        # the tensor names of their own class. So it differs in memory; config.json keeps it.
        self.model_type = "nomic_bert_moe"

    def is_moe_layer(self, index: int) -> bool:
        """Layers 1, 3, 5, ... for `moe_every_n_layers` 2; all for 1; none for 0."""
        every = self.moe_every_n_layers
        return bool(self.num_experts and every) and index % every == (1 if every > 1 else 0)

    def is_published_architecture(self) -> bool:
        """Whether other runtimes for `nomic_bert` compute this model: no extension of ours."""
        special = self.moe_expert_bias or self.moe_normalize_expert_weights
        special = special or self.moe_shared_expert_width or self.moe_every_n_layers == 1
        ours = self.num_experts and self.moe_every_n_layers and special
        return bool(self.rotary_emb_fraction) and not ours

    def to_dict(self):
        fields = super().to_dict() | {"hidden_act": list(NATIVE_CLASS_GUARD)}
        if self.is_published_architecture():
            return fields | {"model_type": "nomic_bert"}
        # A name that no other runtime knows: an error there, where "nomic_bert" would be wrong.
        return fields | {"model_type": "moe_embed", "architectures": ["MoeEmbedModel"]}


class Embeddings(nn.Module):
    """Word, token type and (only with `rotary_emb_fraction` 0) learned position."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.n_embd)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.n_embd)
        if not config.rotary_emb_fraction:
            self.position_embeddings = nn.Embedding(config.n_positions, config.n_embd)

    def forward(self, words, token_type_ids, position_ids):
        """Rows of words [B, L, D], type ids [B, L], position ids [1 or B, L] -> [B, L, D]."""
        types = self.token_type_embeddings
        x = words + (types.weight[0] if token_type_ids is None else types(token_type_ids))
        if hasattr(self, "position_embeddings"):
            x = x + self.position_embeddings(position_ids)
        return x


def rotary_tables(position_ids, head_size: int, base: float):
    """cos and sin [1 or B, 1, L, C / 2] of the angles, in float32.

    No buffer: it would be lost when transformers builds on the meta device. The frequencies are
    Python's: the float32 power of a processor may differ, and a position of 400 makes that 3e-5.
    """
    half = head_size // 2
    frequencies = [float(base) ** (-i / half) for i in range(half)]
    frequency = torch.tensor(frequencies, dtype=torch.float32, device=position_ids.device)
    angle = position_ids[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turns the pairs (c, c + C / 2) of each head (NeoX layout); x [B, H, L, C]."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


def eager_attention_forward(module, q, k, v, key_mask, scaling, **kwargs):
    """q, k, v [B, H, L, C], key_mask bool [B, 1, 1, L] or None -> ([B, L, H, C], weights)."""
    scores = q @ k.transpose(-1, -2) * scaling
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


# `torch.nn`: where transformers finds the text "Attention(nn.Module)" in this file, it wants one
# spelling of the call below, which differs between 4.57 and 5.
class Attention(torch.nn.Module):
    """Bidirectional; q, k, v in one matrix laid out [q | k | v], heads contiguous in each.

    Computed by what `attn_implementation` names: eager, sdpa, flash attention, a server's own.
    """

    is_causal = False

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.n_head = config.n_head
        self.scaling = (config.n_embd // config.n_head) ** -0.5
        self.Wqkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, key_mask, rotary):
        """x [B, L, D]; key_mask as the implementation takes it; rotary (cos, sin) or None."""
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4).unbind()
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        attend = ALL_ATTENTION_FUNCTIONS.get(
            self.config._attn_implementation, eager_attention_forward
        )
        context, _ = attend(self, q, k, v, key_mask, scaling=self.scaling, dropout=0.0)
        return self.out_proj(context.reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.n_embd, config.n_inner)
        self.fc2 = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x, valid):
        return self.fc2(F.gelu(self.fc1(x)))  # the exact (erf) GELU


class Router(nn.Module):
    """Softmax over all experts in float32, then the K largest; by default they sum to < 1."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.moe_top_k
        self.normalize = config.moe_normalize_expert_weights
        self.layer = nn.Linear(config.n_embd, config.num_experts, bias=False)

    def forward(self, x):
        """x [T, D] -> gates float32 [T, K], expert ids [T, K]."""
        logits = F.linear(x.float(), self.layer.weight.float())
        gates, experts = logits.softmax(dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.normalize:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        return gates, experts


class ExpertWeights(nn.Module):
    """The matrices of all experts, one below the other, as they are stored."""

    def __init__(self, config):
        super().__init__()
        self.shape = (config.num_experts, config.n_inner, config.n_embd)
        rows = config.num_experts * config.n_inner
        self.w1 = nn.Parameter(torch.empty(rows, config.n_embd))
        self.w2 = nn.Parameter(torch.empty(rows, config.n_embd))
        self.b1 = nn.Parameter(torch.empty(rows)) if config.moe_expert_bias else None

    def forward(self, x, expert: int):
        """The outputs [n, D] of one expert for its tokens x [n, D]."""
        w1, w2 = self.w1.view(self.shape)[expert], self.w2.view(self.shape)[expert]  # [F, D]
        b1 = None if self.b1 is None else self.b1.view(self.shape[:2])[expert]
        return F.gelu(F.linear(x, w1, b1)) @ w2


class Experts(nn.Module):
    """Sum of the chosen experts, weighted by the gates, plus one bias shared by all."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.mlp = ExpertWeights(config)
        self.bias = nn.Parameter(torch.empty(config.n_embd))

    def forward(self, x, gates, experts):
        """x [T, D], gates [T, K], experts [T, K] (E: none) -> [T, D]; no decision needs a value."""
        y = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, slot = torch.where(experts == expert)  # [n] each
            out = self.mlp(x[token], expert) * gates[token, slot].unsqueeze(-1)
            y = y.index_add(0, token, out.to(y.dtype))
        return y + self.bias


class MoE(nn.Module):
    """Section 3: E experts, of which a token uses K; and a shared one, if the config has it."""

    def __init__(self, config):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        if width := config.moe_shared_expert_width:
            self.fc1, self.fc2 = nn.Linear(config.n_embd, width), nn.Linear(width, config.n_embd)

    def forward(self, x, valid):
        """x [B, L, D]; valid bool [B, L] or None (all): padding is not routed."""
        flat = x.flatten(0, 1)
        gates, experts = self.router(flat)
        if valid is not None:
            experts = experts.where(valid.flatten().unsqueeze(-1), self.experts.num_experts)
        y = self.experts(flat, gates, experts).view_as(x)
        return y + self.fc2(F.gelu(self.fc1(x))) if hasattr(self, "fc1") else y


class Block(nn.Module):
    """Post-norm: attention, add, norm; feed-forward or experts, add, norm."""

    def __init__(self, config, index: int):
        super().__init__()
        self.attn = Attention(config, index)
        self.norm1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MoE(config) if config.is_moe_layer(index) else FeedForward(config)
        self.norm2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, x, valid, key_mask, rotary):
        x = self.norm1(self.attn(x, key_mask, rotary) + x)
        return self.norm2(self.mlp(x, valid) + x)


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])

    def forward(self, x, valid, key_mask, rotary):
        for layer in self.layers:
            x = layer(x, valid, key_mask, rotary)
        return x


class NomicBertModel(PreTrainedModel):
    config_class = NomicBertConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True  # another function may compute attention

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.emb_ln = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.encoder = Encoder(config)
        self.post_init()

    def _init_weights(self, module):
        """Normal weights, zero biases, unit norms; only for tensors that no checkpoint gave."""
        for name, tensor in module.named_parameters(recurse=False):
            if getattr(tensor, "_is_hf_initialized", False):
                continue
            if name in ("bias", "b1"):
                nn.init.zeros_(tensor)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(tensor)
            else:
                nn.init.normal_(tensor, std=self.config.initializer_range)

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        return_dict=None,
        **kwargs,
    ):
        """Token states [B, L, D]; at padding they are finite and mean nothing.

        input_ids [B, L]; attention_mask [B, L], 0 for padding (None: no padding); token_type_ids
        [B, L] (None: type 0); position_ids [1 or B, L] (None: the column index);
        inputs_embeds [B, L, D] stands for the rows of words of `input_ids`.
        """
        config = self.config
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.word_embeddings(input_ids)
        if position_ids is None:
            length = inputs_embeds.shape[1]
            position_ids = torch.arange(length, device=inputs_embeds.device)[None]
        valid = key_mask = rotary = None
        if attention_mask is not None:
            valid = attention_mask.bool()
            # An empty text attends to its padding: a softmax over nothing would be NaN.
            key_mask = valid | ~valid.any(dim=-1, keepdim=True)
            if "flash" not in config._attn_implementation:  # which counts tokens in [B, L]
                key_mask = key_mask[:, None, None, :]
        if config.rotary_emb_fraction:
            head_size = config.n_embd // config.n_head
            rotary = rotary_tables(position_ids, head_size, config.rotary_emb_base)
        x = self.emb_ln(self.embeddings(inputs_embeds, token_type_ids, position_ids))
        x = self.encoder(x, valid, key_mask, rotary)
        return (x,) if return_dict is False else BaseModelOutput(last_hidden_state=x)

    def embed(self, input_ids, attention_mask=None, dim: int | None = None, normalize: bool = True):
        """Text embeddings [B, dim]: the real tokens' states pooled, cut, then normalised.

        Pooled to their mean, or to the first or last of them, as config.json says. `dim` keeps the
        first features (Matryoshka).
        """
        x = self(input_ids, attention_mask, return_dict=False)[0].float()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.to(x.dtype).unsqueeze(-1)
        if self.config.pooling != "mean":  # a mask of one token
            order = mask.cumsum(dim=1) if self.config.pooling == "cls" else mask.flip(1).cumsum(1)
            is_it = (order == 1) if self.config.pooling == "cls" else (order == 1).flip(1)
            mask = mask * is_it
        pooled = (x * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
        pooled = pooled[:, :dim]
        return F.normalize(pooled, dim=-1) if normalize else pooled
