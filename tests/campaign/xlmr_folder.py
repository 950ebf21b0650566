"""A small random XLM-RoBERTa, as sentence-transformers saves it, with a fast tokenizer."""

import json
import pathlib

import numpy as np
from helpers import published_models
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))


def write(path: pathlib.Path) -> None:
    """XLM-RoBERTa's layout with modules of sentence-transformers and a fast tokenizer."""
    shape = dict(vocab_size=120, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    config = dict(
        model_type="xlm-roberta",
        architectures=["XLMRobertaModel"],
        hidden_act="gelu",
        num_hidden_layers=2,
        layer_norm_eps=1e-5,
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=1,
        position_embedding_type="absolute",
        **shape,
    )
    published_models.write_folder(path, config, _bert_tensors(config))
    _write_tokenizer(path / "tokenizer.json", 100)
    modules = [
        {"idx": i, "name": str(i), "path": where, "type": f"sentence_transformers.models.{kind}"}
        for i, (where, kind) in enumerate(MODULES)
    ]
    (path / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    prompts = {"query": "query: ", "document": "passage: "}
    for name, content in {
        "modules.json": modules,
        "1_Pooling/config.json": pooling | {"word_embedding_dimension": config["hidden_size"]},
        "sentence_bert_config.json": {"max_seq_length": 48, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": prompts, "default_prompt_name": None},
    }.items():
        (path / name).write_text(json.dumps(content))


def _bert_tensors(config: dict) -> dict[str, np.ndarray]:
    d, f = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], d),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], d),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        linear = {f"attention.self.{n}": (d, d) for n in ("query", "key", "value")}
        linear |= {"attention.output.dense": (d, d)}
        linear |= {"intermediate.dense": (f, d), "output.dense": (d, f)}
        for name, shape in linear.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}{name}.{p}": (d,) for p in ("weight", "bias")}
    return published_models.random_tensors(shapes)


def _write_tokenizer(path: pathlib.Path, size: int) -> None:
    """A small Unigram tokenizer of the form that XLM-RoBERTa has."""
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = [a + b for a in letters for b in "aeiou"]
    entries = ["<s>", "<pad>", "</s>", "<unk>", "▁", *letters, *words]
    scores = [(piece, -float(i) / 10) for i, piece in enumerate([*entries[: size - 1], "<mask>"])]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3))
    tokenizer.normalizer = normalizers.Replace(" {2,}", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.save(str(path))
