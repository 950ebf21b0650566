"""The layout of `nomic-embed-text-v2-moe` (148 tensors for 12 layers), in both directions.

Names, shapes and traps: the released checkpoint's contract. Two of them: `experts.mlp.w2` is used
untransposed, and `experts.bias` is one output bias per layer, added once after the weighted sum.

`pooling` in config.json ("cls", "last"; absent: "mean") is for `embed` of our modelling file; other
readers take the pooling from the modules of sentence-transformers.

`moe_expert_output_bias` false says that `experts.bias` is zero and stays so here. Other readers
need not know.

Extensions of ours, absent from the published model and unknown to other runtimes, each with a key
in config.json: `moe_expert_bias` (tensor `experts.mlp.b1`), `moe_normalize_expert_weights` true,
`moe_every_n_layers` 1, `moe_shared_expert_width` (a shared expert: tensors `mlp.fc1` and `mlp.fc2`
beside `mlp.experts`), and learned positions (`rotary_emb_fraction` 0, tensor
`embeddings.position_embeddings.weight`; the reference code knows these). Such a model calls itself
`moe_embed`, so that a runtime that implements `nomic_bert` itself refuses it instead of computing
something else.
"""

from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.rules import Rule, check_architecture, layer_norm, linear, mlm_head
from moe_embed_jax.json_file import flag, real, text, whole
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.models.encoder_config import LIMITS

_LAYER = "encoder.layers.{i}."
RULES = (
    Rule("embeddings/token", ("embeddings.word_embeddings.weight",)),
    Rule("embeddings/token_type", ("embeddings.token_type_embeddings.weight",)),
    Rule("embeddings/position", ("embeddings.position_embeddings.weight",)),
    *layer_norm("embeddings/norm", "emb_ln"),
    *linear("layers/{i}/attention/qkv", _LAYER + "attn.Wqkv"),
    *linear("layers/{i}/attention/out", _LAYER + "attn.out_proj"),
    *layer_norm("layers/{i}/norm_1", _LAYER + "norm1"),
    *layer_norm("layers/{i}/norm_2", _LAYER + "norm2"),
    *linear("layers/{i}/feed_forward/up", _LAYER + "mlp.fc1"),
    *linear("layers/{i}/feed_forward/down", _LAYER + "mlp.fc2"),
    Rule("layers/{i}/moe/router/kernel", (_LAYER + "mlp.router.layer.weight",), "linear"),
    Rule("layers/{i}/moe/w_in", (_LAYER + "mlp.experts.mlp.w1",), "experts_in"),
    Rule("layers/{i}/moe/bias_in", (_LAYER + "mlp.experts.mlp.b1",), "experts_bias"),
    Rule("layers/{i}/moe/w_out", (_LAYER + "mlp.experts.mlp.w2",), "experts_out"),
    Rule("layers/{i}/moe/bias", (_LAYER + "mlp.experts.bias",)),
)
# The head of the backbone (nomic-xlm-2048): names as its code has them, unverified on the file.
_TRANSFORM = "cls.predictions.transform."
HEAD_RULES = mlm_head(
    _TRANSFORM + "dense", _TRANSFORM + "layer_norm", "cls.predictions.decoder.bias"
)
PREFIXES = ("bert.", "trunk.")
TIED = ("cls.predictions.decoder.weight",)  # to the word embeddings
IGNORED = ()
# Zero in the file of a model without an output bias of its experts.
OUTPUT_BIAS = r"encoder\.layers\.\d+\.mlp\.experts\.bias"

# transformers from 5.5 on has a built-in class for model_type "nomic_bert", which knows neither
# experts nor biases and takes random weights in their place, without an error. It wants a string in
# `hidden_act`, which no other reader of this layout uses (they read `activation_function`): a list
# stops it, and its error shows these words. The same text stands in torch_model.py.
NATIVE_CLASS_GUARD = [
    "the nomic_bert class inside transformers reads other keys than this config.json has, and "
    "fills what it misses with random numbers: pass trust_remote_code=True to use "
    "modeling_moe_embed.py of this folder"
]

# What the encoder can be: config.json key -> values that mean it; absent means the first.
_FIXED = {
    "activation_function": ("gelu",),
    "prenorm": (False,),
    "parallel_block": (False,),
    "causal": (False,),
    "qkv_proj_bias": (True,),
    "mlp_fc1_bias": (True,),
    "mlp_fc2_bias": (True,),
    "use_rms_norm": (None, False),
    "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (None,),
    "rotary_scaling_factor": (None,),
    "expert_choice_router": (False,),
    "num_shared_experts": (0, None),
    "ffn_div": (1, 1.0),
    "quantization_config": (None,),
}
# What the absence of a key means, here and in torch_model.py: as in the published model.
ABSENT = {
    "type_vocab_size": 1,
    "layer_norm_epsilon": 1e-5,
    "rotary_emb_base": 10_000,
    "rotary_emb_fraction": 1,
    "num_experts": 0,
    "moe_top_k": 2,
    "moe_every_n_layers": 2,
    "moe_normalize_expert_weights": False,
    "moe_expert_bias": False,
    "moe_expert_output_bias": True,
    "moe_shared_expert_width": 0,
}


def model_from_config(config: dict, names, where: str) -> EncoderConfig:
    """The encoder that a `nomic_bert` config.json describes.

    Args:
      names: the names of the checkpoint's tensors. They decide what `moe_every_n_layers: 1` means:
        the reference code then builds no expert at all, we write it for experts in every layer.
      where: what messages call the file.

    Raises:
      UserError: a value that this encoder cannot be, or a missing key, named.
    """
    check_architecture(config, _FIXED, where)
    # transformers writes null for these three where nothing was set.
    nullable = ("num_experts", "moe_every_n_layers", "n_inner")
    config = {key: x for key, x in config.items() if x is not None or key not in nullable}
    fraction = config.get("rotary_emb_fraction", ABSENT["rotary_emb_fraction"])
    if fraction not in (0, 1):
        raise UserError(f"{where}: rotary_emb_fraction={fraction!r:.40} must be 1 (or 0: learned)")

    def size(key: str, field: str, least: int = 1) -> int:
        return whole(config, key, where, LIMITS[field], least, ABSENT.get(key))

    def switch(key: str) -> bool:
        return flag(config, key, where, ABSENT[key])

    num_experts = size("num_experts", "num_experts", 0)
    moe_every = size("moe_every_n_layers", "num_layers", 0) if num_experts else 0
    if moe_every == 1 and "encoder.layers.0.mlp.router.layer.weight" not in names:
        moe_every = 0
    experts = {}
    if moe_every:
        experts = {
            "num_experts": num_experts,
            "experts_per_token": size("moe_top_k", "num_experts"),
            "normalize_gates": switch("moe_normalize_expert_weights"),
            "expert_bias": switch("moe_expert_bias"),
            "expert_output_bias": switch("moe_expert_output_bias"),
            "shared_expert_width": size("moe_shared_expert_width", "shared_expert_width", 0),
        }
    width = size("n_embd", "width")
    return EncoderConfig(
        vocab_size=size("vocab_size", "vocab_size"),
        num_layers=size("n_layer", "num_layers"),
        width=width,
        num_heads=size("n_head", "num_heads"),
        ffn_width=whole({"n_inner": 4 * width} | config, "n_inner", where, LIMITS["ffn_width"]),
        moe_every=moe_every,
        positions="rotary" if fraction else "learned",
        max_positions=0 if fraction else size("n_positions", "max_positions"),
        rotary_base=real(config, "rotary_emb_base", where, ABSENT["rotary_emb_base"]),
        pooling=text(config, "pooling", where, "mean"),
        token_types=size("type_vocab_size", "token_types"),
        norm_epsilon=real(config, "layer_norm_epsilon", where, ABSENT["layer_norm_epsilon"]),
        **experts,
    )


def config_from_model(model: EncoderConfig, max_length: int, pad_id: int) -> dict:
    """The published config.json's fields for `model`; without what belongs to the folder."""
    learned = model.positions == "learned"
    # llama.cpp's converter takes no other pair than 2048 / 2048 with rotary positions.
    positions = model.max_positions if learned else max(2048, max_length)
    ours = bool(extensions(model))
    config = {
        "architectures": ["MoeEmbedModel" if ours else "NomicBertModel"],
        "model_type": "moe_embed" if ours else "nomic_bert",
        "hidden_act": NATIVE_CLASS_GUARD,
        "activation_function": "gelu",
        "add_pooling_layer": False,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_embd": model.width,
        "n_inner": model.ffn_width,
        "n_positions": positions,
        "max_trained_positions": positions,
        "vocab_size": model.vocab_size,
        "pad_vocab_size_multiple": 64 if model.vocab_size % 64 == 0 else 1,
        "pad_token_id": pad_id,
        "bos_token_id": None,
        "eos_token_id": None,
        "type_vocab_size": model.token_types,
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.initializer_range,
        "prenorm": False,
        "parallel_block": False,
        "parallel_block_tied_norm": False,
        "causal": False,
        "qkv_proj_bias": True,
        "mlp_fc1_bias": True,
        "mlp_fc2_bias": True,
        "use_rms_norm": None,
        "rotary_emb_fraction": 0.0 if learned else 1.0,
        "rotary_emb_base": _number(model.rotary_base),
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "num_experts": model.num_experts if model.moe_every else 0,
        "moe_top_k": model.experts_per_token,
        "moe_every_n_layers": model.moe_every,
        "moe_impl": "megablocks",
        "moe_normalize_expert_weights": model.normalize_gates,
        "expert_choice_router": False,
        "num_shared_experts": 0,
        "ffn_div": 1,
        "router_aux_loss_coef": 0.1,
        "resid_pdrop": 0.0,
        "moe_resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "dense_seq_output": True,
        "fused_bias_fc": True,
        "fused_dropout_add_ln": True,
        "use_flash_attn": True,
        "use_xentropy": True,
        "torch_dtype": "float32",
    }
    if model.pooling != "mean":
        config["pooling"] = model.pooling
    if model.moe_every and model.expert_bias:
        config["moe_expert_bias"] = True
    if model.moe_every and not model.expert_output_bias:
        config["moe_expert_output_bias"] = False
    if model.shared_expert_width:
        config["moe_shared_expert_width"] = model.shared_expert_width
    return config


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def extensions(model: EncoderConfig) -> list[str]:
    """What of `model` the published architecture does not have, in words; empty: nothing."""
    present = {
        "a hidden bias in every expert": model.moe_every and model.expert_bias,
        "normalised gates": model.moe_every and model.normalize_gates,
        "a shared expert": model.shared_expert_width > 0,
        "experts in every layer": model.moe_every == 1,
        "learned positions": model.positions == "learned",
    }
    return [what for what, is_present in present.items() if is_present]
