"""A checkpoint with experts in the published layout, and texts of two languages for it."""

import pathlib
import shutil

from helpers import published_models, synthetic_data
from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.evaluation.labelled_texts import LabelledText

CONFIG = published_models.NOMIC | {"vocab_size": 512, "n_positions": 128}


def labelled(count: int = 12) -> list[LabelledText]:
    """Sentences of 3 topics, the same in two languages; of very different lengths."""
    texts = []
    for language in ("aa", "bb"):
        for i, text in enumerate(synthetic_data.documents(language, count, seed=3)):
            texts.append(LabelledText(text[: 9 + 23 * i], language, f"topic {i % 3}", str(i)))
    return texts


def write_model(folder: pathlib.Path, data_dir: pathlib.Path, **changes) -> pathlib.Path:
    """Random weights, and the tokenizer of the synthetic data; `changes` of CONFIG."""
    config = CONFIG | changes
    tensors = published_models.random_tensors(published_models.nomic_shapes(config))
    published_models.write_folder(folder, config, tensors)
    vocabulary = vocabulary_path(synthetic_data.PREPARATION, data_dir)
    shutil.copy(vocabulary, folder / "sentencepiece.model")
    return folder
