"""A small prepared data directory in the project's own formats, made without network or TensorFlow.

A "language" here is a spelling of the same 300 words, so that pairs are translations which a model
can learn, in three languages and two tasks.
"""

import gzip
import json
import math
import pathlib

import numpy as np

from moe_embed_jax.checksums import write_checksums
from moe_embed_jax.data.data_spec import (
    held_out_path,
    planned_store_path,
    source_checksums,
    vocabulary_path,
)
from moe_embed_jax.data.token_store import TokenStoreWriter
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.pairs.row import PairRow
from moe_embed_jax.preparation.pair_writer import PairWriter
from moe_embed_jax.tokenizers.tokenizer_json import open_vocabulary
from moe_embed_jax.tokenizers.vocabulary import (
    DOCUMENT_PREFIX,
    QUERY_PREFIX,
    Vocabulary,
    content_ids,
    train_vocabulary,
)

LANGUAGES = ("aa", "bb", "cc")
PREPARATION = {
    "mixture": "package_texts",
    "vocabulary": {"kind": "train", "size": 512},
    "query_length": 16,
    "document_length": 24,
    "rates": None,
}
DOCUMENTS_PREPARATION = {
    "documents": "package_documents",
    "texts": "",
    "vocabulary": {"kind": "train", "size": 512},
}
GROUP_ROWS = {"translations": (210, 90, 37), "descriptions": (64, 50, 9)}


def _word(index: int, language: str) -> str:
    vowels = {"en": "aeiou", "aa": "eioua", "bb": "iouae", "cc": "ouaei"}[language]
    consonants = {"en": "bcdfghjklm", "aa": "nprstvbcdf", "bb": "kghjlmnprs", "cc": "tvbdfgklmn"}
    letters = consonants[language]
    return "".join(
        letters[(index // 10**i) % 10] + vowels[(index // (7 * (i + 1))) % 5] for i in range(3)
    )


def _text(words, language: str) -> str:
    return " ".join(_word(int(word), language) for word in words)


def pairs(task: str, language: str, count: int, seed: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng([seed, len(task), LANGUAGES.index(language)])
    query_language = "en" if task == "translations" else language
    result = []
    for _ in range(count):
        words = rng.integers(0, 300, rng.integers(2, 7))
        # The document says the same in another order and, for descriptions, a little more.
        more = rng.integers(0, 300, 0 if task == "translations" else 2)
        document = rng.permutation(np.concatenate([words, more]))
        result.append((_text(words, query_language), _text(document, language)))
    return result


def write_data(data_dir: pathlib.Path, group_rows=GROUP_ROWS) -> pathlib.Path:
    """Vocabulary, token store and held-out sets under `data_dir`."""
    train = _train_pairs(group_rows)
    path = vocabulary_path(PREPARATION, data_dir)
    texts = [text for group in train.values() for pair in group for text in pair]
    train_vocabulary(texts * 3, path, PREPARATION["vocabulary"]["size"])
    write_store(planned_store_path(PREPARATION, data_dir), train, Vocabulary.load(path))
    for task in GROUP_ROWS:
        for language in LANGUAGES:
            write_beir(data_dir / "retrieval" / task / language, pairs(task, language, 24, seed=2))
    write_checksums(data_dir / "retrieval")
    return data_dir


def write_tokens(data_dir: pathlib.Path, preparation: dict) -> None:
    """Vocabulary and token store of the same pairs for another `preparation` (kind "file")."""
    vocabulary = open_vocabulary(preparation["vocabulary"]["path"])
    path = vocabulary_path(preparation, data_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(vocabulary.model_bytes)
    write_store(planned_store_path(preparation, data_dir), _train_pairs(GROUP_ROWS), vocabulary)


def documents(language: str, count: int, seed: int) -> list[str]:
    """Texts of up to 60 words, in runs of neighbouring words, which a model can learn to guess."""
    rng = np.random.default_rng([seed, LANGUAGES.index(language)])
    texts = []
    for _ in range(count):
        starts = rng.integers(0, 300, rng.integers(1, 7))
        texts.append(_text((starts[:, None] + np.arange(10)).reshape(-1) % 300, language))
    return texts


def write_documents(
    data_dir: pathlib.Path, preparation: dict = DOCUMENTS_PREPARATION
) -> pathlib.Path:
    """Vocabulary, token store of documents and held-out documents under `data_dir`."""
    train = {language: documents(language, 120, seed=1) for language in LANGUAGES}
    path = vocabulary_path(preparation, data_dir)
    if preparation["vocabulary"]["kind"] == "train":
        train_vocabulary([t for texts in train.values() for t in texts], path, 512)
    elif not path.exists():
        path.parent.mkdir(parents=True)
        path.write_bytes(pathlib.Path(preparation["vocabulary"]["path"]).read_bytes())
    vocabulary = open_vocabulary(path)
    spec = {"vocabulary": {"sha256": vocabulary.content_hash, "size": vocabulary.size}}
    with TokenStoreWriter(planned_store_path(preparation, data_dir), spec) as writer:
        for place, (language, texts) in enumerate(train.items()):
            # The first language has two sources.
            half = len(texts) // 2 if place == 0 else len(texts)
            for task, part in (("one", texts[:half]), ("two", texts[half:])):
                if part:
                    writer.start_group(task, language, 1.0)
                    ids, lengths = vocabulary.encode_flat(part)
                    content = content_ids(part)[:, np.newaxis]
                    writer.write_batch([ids], lengths[:, np.newaxis], content)
    folder = held_out_path(preparation, data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        with gzip.open(folder / f"{language}.jsonl.gz", "wt") as file:
            for text in documents(language, 10, seed=2):
                file.write(json.dumps({"source": "one", "text": text}) + "\n")
    write_checksums(folder)
    return data_dir


def _train_pairs(group_rows):
    return {
        (task, language): pairs(task, language, rows, seed=1)
        for task, counts in group_rows.items()
        for language, rows in zip(LANGUAGES, counts, strict=True)
    }


def write_store(folder, train, vocabulary: Vocabulary) -> None:
    spec = {
        "mixture": PREPARATION["mixture"],
        "vocabulary": {"sha256": vocabulary.content_hash, "size": vocabulary.size},
        "query_length": PREPARATION["query_length"],
        "document_length": PREPARATION["document_length"],
        "prefixes": [QUERY_PREFIX, DOCUMENT_PREFIX],
        "source_checksums": source_checksums(),
    }
    with TokenStoreWriter(folder, spec) as writer:
        for (task, language), group in train.items():
            writer.start_group(task, language, {"translations": 0.7, "descriptions": 0.3}[task])
            for query, document in group:
                sequences = [
                    vocabulary.encode_text(QUERY_PREFIX + query, spec["query_length"]),
                    vocabulary.encode_text(DOCUMENT_PREFIX + document, spec["document_length"]),
                ]
                writer.write(sequences, content_ids([query, document]))


PAIR_GROUPS = (("descriptions", "cc", 33), ("translations", "aa", 90), ("translations", "bb", 41))


def write_pairs(folder: pathlib.Path, seed: int = 1) -> PairFolder:
    """A prepared folder of pairs: row i of a group has i % 5 hard negatives; some are empty to the
    model. Every third row has scores, exact in float32, a last one that is not known."""
    with PairWriter(folder, {"seed": seed}, rows_per_shard=50) as writer:
        for source, language, count in PAIR_GROUPS:
            pairs_ = pairs(source, language, count, seed)
            documents = [document for _, document in pairs_]
            for i, (query, document) in enumerate(pairs_):
                negatives = [documents[(i + 3 * k) % count] for k in range(1, 1 + i % 5)]
                if i == 4:
                    negatives[1] = "\u0007"  # the model deletes control characters
                scores = [1 - (i % 64) / 128 - k / 8 for k in range(1 + len(negatives))]
                if len(scores) == 5:
                    scores[-1] = math.nan
                row = PairRow(query, document, tuple(negatives), source, language)
                writer.write(row._replace(scores=() if i % 3 else tuple(scores)))
    return PairFolder(folder)


def write_beir(folder: pathlib.Path, pairs_: list[tuple[str, str]]) -> None:
    folder.mkdir(parents=True)
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as file:
        for i, (_, document) in enumerate(pairs_):
            file.write(json.dumps({"_id": f"d{i}", "title": "", "text": document}) + "\n")
    with gzip.open(folder / "queries.jsonl.gz", "wt") as file:
        for i, (query, _) in enumerate(pairs_):
            file.write(json.dumps({"_id": f"q{i}", "text": query}) + "\n")
    with gzip.open(folder / "qrels.tsv.gz", "wt") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for i in range(len(pairs_)):
            file.write(f"q{i}\td{i}\t1\n")


# For `data` of a config: each batch has the same number of rows, so a run compiles one step.
ONE_ROW_COUNT = dict(row_length=48, texts_per_row=2)


def config_text(data_dir: pathlib.Path, **top) -> str:
    """A config file for a tiny model on this data.

    `top` replaces top-level values, and of `data` what it names. With `init` it states no model
    and no vocabulary: the source decides both.
    """
    values = dict(
        # A token whose second and third expert tie to rounding may go either way on another mesh;
        # that moved a loss by 2e-4 with seed 3, and by more with 4. None does in 24 steps of 5.
        seed=5,
        batch_size=16,
        steps=12,
        log_every=3,
        eval_every=6,
        eval_languages=2,
        checkpoint_every=4,
        model=dict(
            vocab_size=512,
            num_layers=4,
            width=32,
            num_heads=2,
            ffn_width=64,
            num_experts=4,
            experts_per_token=2,
            moe_every=2,
        ),
        data=dict(
            dir=str(data_dir),
            vocabulary=dict(kind="train", size=512),
            query_length=16,
            document_length=24,
            row_length=48,
            texts_per_row=6,
        ),
        # Adam's first updates are signs of gradients far above epsilon: 1e-8 turned 1e-10 of
        # rounding, in one gradient that is nearly 0, into 5e-6 of weight and 2e-5 of loss.
        optimizer=dict(peak_learning_rate=3e-3, warmup_steps=2, epsilon=1e-6),
    )
    top["data"] = values["data"] | top.get("data", {})
    return _config_text(values | top)


def _config_text(values: dict) -> str:
    if "init" in values:
        del values["model"], values["data"]["vocabulary"]
    return f"def get_config(variant=''):\n    return {values!r}\n"


def masked_config_text(data_dir: pathlib.Path, **top) -> str:
    """A config file of masked language modelling for a tiny model on the documents."""
    values = dict(
        objective="masked_lm",
        seed=5,
        batch_size=8,
        steps=12,
        log_every=2,
        eval_every=6,
        eval_languages=2,
        checkpoint_every=4,
        keep_checkpoints=3,
        model=dict(vocab_size=512, num_layers=2, width=32, num_heads=2, ffn_width=64, moe_every=0),
        data=dict(dir=str(data_dir), vocabulary=dict(kind="train", size=512), row_length=64),
        optimizer=dict(peak_learning_rate=3e-3, warmup_steps=2, epsilon=1e-6),
        loss=dict(predictions_at_once=64),
    )
    return _config_text(values | top)
