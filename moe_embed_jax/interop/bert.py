"""BERT and XLM-RoBERTa encoders of transformers: the same blocks with learned positions.

The tables serve both directions for BERT; XLM-RoBERTa comes in and leaves as BERT (its two unused
rows of positions are dropped, so that positions count from 0).
"""

from moe_embed_jax.interop.rules import Rule, check_architecture, layer_norm, linear, mlm_head
from moe_embed_jax.json_file import real, whole
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.models.encoder_config import LIMITS

_LAYER = "encoder.layer.{i}."
_SELF = _LAYER + "attention.self."
RULES = (
    Rule("embeddings/token", ("embeddings.word_embeddings.weight",)),
    Rule("embeddings/token_type", ("embeddings.token_type_embeddings.weight",)),
    Rule("embeddings/position", ("embeddings.position_embeddings.weight",)),
    *layer_norm("embeddings/norm", "embeddings.LayerNorm"),
    *linear("layers/{i}/attention/qkv", _SELF + "query", _SELF + "key", _SELF + "value"),
    *linear("layers/{i}/attention/out", _LAYER + "attention.output.dense"),
    *layer_norm("layers/{i}/norm_1", _LAYER + "attention.output.LayerNorm"),
    *linear("layers/{i}/feed_forward/up", _LAYER + "intermediate.dense"),
    *linear("layers/{i}/feed_forward/down", _LAYER + "output.dense"),
    *layer_norm("layers/{i}/norm_2", _LAYER + "output.LayerNorm"),
)
_TRANSFORM = "cls.predictions.transform."
BERT_HEAD_RULES = mlm_head(_TRANSFORM + "dense", _TRANSFORM + "LayerNorm", "cls.predictions.bias")
ROBERTA_HEAD_RULES = mlm_head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
PREFIXES = ("bert.", "roberta.")
TIED = ("cls.predictions.decoder.weight", "lm_head.decoder.weight")  # to the word embeddings
# Not part of an embedding: the pooler over <s>, the next-sentence head, a buffer that old
# files hold, and a second name of the head's bias.
IGNORED = (
    r"pooler\..*",
    r"cls\.seq_relationship\..*",
    r"embeddings\.position_ids",
    r"(cls\.predictions|lm_head)\.decoder\.bias",
)

_FIXED = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
    "auto_map": (None,),
}


def model_from_config(config: dict, names, where: str) -> EncoderConfig:
    """The encoder that a BERT or XLM-RoBERTa config.json describes, with its table sizes.

    `names` is not needed here. Raises `UserError` naming the key.
    """
    del names
    check_architecture(config, _FIXED, where)

    def size(key: str, field: str) -> int:
        return whole(config, key, where, LIMITS[field])

    return EncoderConfig(
        vocab_size=size("vocab_size", "vocab_size"),
        num_layers=size("num_hidden_layers", "num_layers"),
        width=size("hidden_size", "width"),
        num_heads=size("num_attention_heads", "num_heads"),
        ffn_width=size("intermediate_size", "ffn_width"),
        moe_every=0,
        positions="learned",
        max_positions=size("max_position_embeddings", "max_positions"),
        token_types=size("type_vocab_size", "token_types"),
        norm_epsilon=real(config, "layer_norm_eps", where, 1e-12),
    )


def first_position(config: dict, where: str) -> int:
    """The row of the position table that a text's first token takes.

    RoBERTa counts from `pad_token_id` + 1, and never reads the rows before; BERT counts from 0.
    Raises `UserError` naming the key.
    """
    if config["model_type"] == "bert":
        return 0
    limit = config["max_position_embeddings"] - 2  # at least one position is left
    return 1 + whole(config, "pad_token_id", where, limit, least=0, default=1)


def config_from_model(model: EncoderConfig, pad_id: int) -> dict:
    """config.json of transformers' `BertModel` for a dense encoder with learned positions."""
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.ffn_width,
        "max_position_embeddings": model.max_positions,
        "type_vocab_size": model.token_types,
        "layer_norm_eps": model.norm_epsilon,
        "initializer_range": model.initializer_range,
        "position_embedding_type": "absolute",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": pad_id,
        "torch_dtype": "float32",
    }
