"""BERT and XLM-RoBERTa encoders of transformers: the same blocks with learned positions.

The tables serve both directions for BERT; XLM-RoBERTa comes in and leaves as BERT (its two unused
rows of positions are dropped, so that positions count from 0).
"""

from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.rules import Rule
from moe_embed_jax.json_file import real, whole
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.models.encoder_config import LIMITS

_LAYER = "encoder.layer.{i}."
_SELF = _LAYER + "attention.self."
RULES = (
    Rule("embeddings/token", ("embeddings.word_embeddings.weight",)),
    Rule("embeddings/token_type", ("embeddings.token_type_embeddings.weight",)),
    Rule("embeddings/position", ("embeddings.position_embeddings.weight",)),
    Rule("embeddings/norm/scale", ("embeddings.LayerNorm.weight",)),
    Rule("embeddings/norm/bias", ("embeddings.LayerNorm.bias",)),
    Rule(
        "layers/{i}/attention/qkv/kernel",
        (_SELF + "query.weight", _SELF + "key.weight", _SELF + "value.weight"),
        "linear",
    ),
    Rule(
        "layers/{i}/attention/qkv/bias",
        (_SELF + "query.bias", _SELF + "key.bias", _SELF + "value.bias"),
    ),
    Rule("layers/{i}/attention/out/kernel", (_LAYER + "attention.output.dense.weight",), "linear"),
    Rule("layers/{i}/attention/out/bias", (_LAYER + "attention.output.dense.bias",)),
    Rule("layers/{i}/norm_1/scale", (_LAYER + "attention.output.LayerNorm.weight",)),
    Rule("layers/{i}/norm_1/bias", (_LAYER + "attention.output.LayerNorm.bias",)),
    Rule("layers/{i}/feed_forward/up/kernel", (_LAYER + "intermediate.dense.weight",), "linear"),
    Rule("layers/{i}/feed_forward/up/bias", (_LAYER + "intermediate.dense.bias",)),
    Rule("layers/{i}/feed_forward/down/kernel", (_LAYER + "output.dense.weight",), "linear"),
    Rule("layers/{i}/feed_forward/down/bias", (_LAYER + "output.dense.bias",)),
    Rule("layers/{i}/norm_2/scale", (_LAYER + "output.LayerNorm.weight",)),
    Rule("layers/{i}/norm_2/bias", (_LAYER + "output.LayerNorm.bias",)),
)
BERT_HEAD_RULES = (
    Rule("mlm_head/dense/kernel", ("cls.predictions.transform.dense.weight",), "linear"),
    Rule("mlm_head/dense/bias", ("cls.predictions.transform.dense.bias",)),
    Rule("mlm_head/norm/scale", ("cls.predictions.transform.LayerNorm.weight",)),
    Rule("mlm_head/norm/bias", ("cls.predictions.transform.LayerNorm.bias",)),
    Rule("mlm_head/bias", ("cls.predictions.bias",)),
)
ROBERTA_HEAD_RULES = (
    Rule("mlm_head/dense/kernel", ("lm_head.dense.weight",), "linear"),
    Rule("mlm_head/dense/bias", ("lm_head.dense.bias",)),
    Rule("mlm_head/norm/scale", ("lm_head.layer_norm.weight",)),
    Rule("mlm_head/norm/bias", ("lm_head.layer_norm.bias",)),
    Rule("mlm_head/bias", ("lm_head.bias",)),
)
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
    """The encoder that a BERT or XLM-RoBERTa config.json describes, tables as long as the file's.

    `names` is not needed here. Raises `UserError` naming the key.
    """
    del names
    for key, allowed in _FIXED.items():
        if key in config and config[key] not in allowed:
            raise UserError(
                f"{where}: {key}={config[key]!r:.60} is an architecture that this encoder is not "
                f"({key} must be {allowed[0]!r})"
            )

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
