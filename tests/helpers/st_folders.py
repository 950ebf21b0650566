"""Small random models saved by sentence-transformers and transformers, which stay the oracle."""

import pathlib

import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "fast",
    "hello",
    "world",
    "new",
    "york",
]
TEXTS = [
    "Hello World New York",
    "a dog ran [Q] fast fast the cat",
    "the cat [SEP] sat on a mat",
    "été CAFÉ",
    "",
]
SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
    initializer_range=0.2,
)


def word_pieces(lowercase: bool = False) -> tokenizers.Tokenizer:
    """Words and single characters, upper and lower case, of BERT's kind."""
    characters = [chr(c) for c in range(33, 127)] + list("éÉ")
    vocabulary = [*SPECIAL, *WORDS, *characters, *(f"##{c}" for c in characters)]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.add_special_tokens(SPECIAL)
    return made


def save_tokenizer(folder: pathlib.Path, made: tokenizers.Tokenizer, **options) -> int:
    """Saves `made` as transformers does; returns its size."""
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    special = {f"{name}_token": token for name, token in names.items()}
    options = {"model_max_length": 48} | special | options
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **options).save_pretrained(folder)
    return made.get_vocab_size()


def save_encoder(folder: pathlib.Path, kind: str = "Bert", **sizes):
    """A random encoder of transformers with biases and norms that matter."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | sizes))
    model = getattr(transformers, f"{kind}Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.eval()


def save_model(
    folder: pathlib.Path, kind: str = "Bert", pooling: str = "mean", normalize: bool = True, **sizes
) -> pathlib.Path:
    """A folder as `SentenceTransformer.save` writes it."""
    from sentence_transformers import models

    plain = folder.with_name(f"{folder.name}-plain")
    size = save_tokenizer(plain, word_pieces())
    save_encoder(plain, kind, **({"vocab_size": size} | sizes))
    transformer = models.Transformer(str(plain))
    parts = [transformer, models.Pooling(SIZES["hidden_size"], pooling)]
    parts += [models.Normalize()] * normalize
    load(parts).save(str(folder))
    return folder


def load(folder):
    """The model of sentence-transformers in a folder, or of modules."""
    options = {"device": "cpu"}
    if isinstance(folder, list):
        return sentence_transformers.SentenceTransformer(modules=folder, **options)
    return sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, **options)


def vectors(folder, texts=tuple(TEXTS), **options):
    """float32 [N, D] of unit norm, by sentence-transformers."""
    return load(folder).encode(list(texts), normalize_embeddings=True, **options)
