"""From nothing, or a folder of pairs, to a token store: get the pairs, make a vocabulary, tokenise.

    python -m moe_embed_jax.preparation.tokenize --data_dir=DIR [--wheels_dir=DIR] \\
        --config_json='{"vocabulary": {"kind": "train", "size": 16384}, "document_length": 128}'

The pairs come from the default wheels, or from a prepared folder ("pairs": DIR in the config).
With "documents" in the config whole documents are prepared instead, for masked language modelling.

Every part is cached by what it depends on: a second call finds the token store and returns without
importing TensorFlow. The training process runs this as a separate process.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tqdm
from absl import app, flags

from moe_embed_jax import launching, storage
from moe_embed_jax.data.data_spec import (
    CUT_TEXTS,
    MIXTURES,
    STATISTICS,
    complete_config,
    held_out_path,
    pair_sources,
    planned_store_path,
    source_checksums,
    token_store_path,
    vocabulary_path,
)
from moe_embed_jax.data.text_files import written_whole
from moe_embed_jax.data.token_records import Negatives
from moe_embed_jax.data.token_store import TokenStoreWriter
from moe_embed_jax.errors import UserError
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.preparation import document_store
from moe_embed_jax.preparation import held_out_sets as retrieval_sets
from moe_embed_jax.preparation.builders import package_texts, statistics
from moe_embed_jax.preparation.document_store import import_tasks
from moe_embed_jax.tokenizers.tokenizer_json import open_vocabulary
from moe_embed_jax.tokenizers.vocabulary import (
    DOCUMENT_PREFIX,
    QUERY_PREFIX,
    Vocabulary,
    content_ids,
    train_vocabulary,
)

QUANTILES = (0.5, 0.9, 0.99)
NAMED_ROWS = 10  # dropped rows listed per group


def prepare(
    config: Mapping, data_dir: str | os.PathLike, wheels_dir: str | os.PathLike | None = None
) -> Path:
    """Prepares the training data of `config` and the held-out sets; returns the token store.

    Args:
      config: see `data_spec.complete_config`; missing keys have defaults.
      data_dir: everything is kept here; see the README for its layout.
      wheels_dir: a folder with the pinned wheels, for machines without a network.

    Raises:
      UserError: bad configuration, no network and no wheels, a damaged file.
    """
    data_dir = storage.path(data_dir).expanduser()
    config = complete_config(config)
    folder = planned_store_path(config, data_dir)
    if _is_prepared(config, data_dir):
        print(f"data: prepared before, {folder}")
        return folder
    seconds = {}
    start = time.monotonic()
    if "documents" in config:
        document_store.fetch(config, data_dir, wheels_dir)
    elif config["pairs"]:
        PairFolder(config["pairs"]).verify()
    else:
        package_texts.prepare(data_dir, wheels_dir=wheels_dir)
        retrieval_sets.prepare(data_dir)
    seconds["pairs"] = time.monotonic() - start
    with package_texts.preparation_lock(data_dir):
        if _is_prepared(config, data_dir):  # by another process, while this one waited
            return folder
        start = time.monotonic()
        vocabulary = _make_vocabulary(config, data_dir)
        seconds["vocabulary"] = time.monotonic() - start

        start = time.monotonic()
        write = document_store.write if "documents" in config else _write_store
        tasks = write(config, data_dir, vocabulary, folder)
        seconds["tokens"] = time.monotonic() - start
        section = {"store": folder.name, "tasks": tasks, "seconds": seconds}
        statistics.store_section(data_dir, "tokens", section)
    table = document_store.format_statistics if "documents" in config else format_statistics
    print(table(tasks))
    print("data: " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    return folder


def _is_prepared(config: dict, data_dir: Path) -> bool:
    if "documents" in config:
        held_out = held_out_path(config, data_dir).is_dir()
    else:
        sets = data_dir / retrieval_sets.FOLDER / statistics.FILE_NAME
        held_out = bool(config["pairs"]) or sets.is_file()
    return (
        held_out
        and token_store_path(config, data_dir) is not None
        and vocabulary_path(config, data_dir).is_file()
    )


# ---- Vocabulary ----------------------------------------------------------------------------------


def _make_vocabulary(config: dict, data_dir: Path) -> Vocabulary:
    path = vocabulary_path(config, data_dir)
    if path.is_file():
        return open_vocabulary(path)
    if config["vocabulary"]["kind"] == "file":
        vocabulary = open_vocabulary(config["vocabulary"]["path"])
        with written_whole(path) as file:  # by one process: the lock of the data directory is held
            file.write(vocabulary.model_bytes)
        return vocabulary
    size = config["vocabulary"]["size"]
    print(f"data: training a vocabulary of {size} ids")
    texts = document_store.texts if "documents" in config else _training_texts
    return train_vocabulary(texts(config, data_dir), path, size)


def _training_texts(config: dict, data_dir: Path) -> Iterator[str]:
    """Every query and document of the mixture, or of the folder of pairs."""
    tasks = import_tasks()

    if config["pairs"]:
        folder = PairFolder(config["pairs"])
        sources = [tasks.FolderSource(folder, name) for name in pair_sources(folder.folder)]
    else:
        mixture = MIXTURES[config["mixture"]]
        sources = [tasks.PairSource(data_dir, task, name) for task, name in mixture.items()]
    for source in sources:
        for batch in source.read_batches("train"):
            for name in ("query", "document"):
                yield from (text.decode("utf-8", errors="replace") for text in batch[name])


# ---- Tokens --------------------------------------------------------------------------------------


def _write_store(config: dict, data_dir: Path, vocabulary: Vocabulary, folder: Path) -> dict:
    """Runs the seqio tasks on the train split into a token store; returns its statistics."""
    tasks = import_tasks()

    lengths = (config["query_length"], config["document_length"])
    if config["pairs"]:
        folder_of_pairs = PairFolder(config["pairs"])
        mixture = tasks.register_pairs(folder_of_pairs, vocabulary, *lengths, config["rates"])
        origin = {"pairs": folder_of_pairs.content_hash}
    else:
        name = config["mixture"]
        mixture = tasks.register(data_dir, vocabulary, *lengths, config["rates"], name)
        origin = {"mixture": name, "source_checksums": source_checksums()}
    spec = {
        **origin,
        "vocabulary": {"sha256": vocabulary.content_hash, "size": vocabulary.size},
        "query_length": config["query_length"],
        "document_length": config["document_length"],
        "prefixes": [QUERY_PREFIX, DOCUMENT_PREFIX],
    }
    # A text that adds nothing to its prefix is empty for the model, whatever it looks like.
    empty = np.array([len(vocabulary.encode(prefix)) + 2 for prefix in spec["prefixes"]])
    limits = np.array([config["query_length"], config["document_length"]])
    if (limits <= empty).any():
        raise UserError(
            f"query_length {limits[0]} and document_length {limits[1]} leave no room for text: "
            f"the prefixes and specials alone take {empty[0]} and {empty[1]} tokens"
        )
    total_rate = sum(mixture.get_rate(task) for task in mixture.tasks)
    described = {}
    with TokenStoreWriter(folder, spec) as writer:
        for task in mixture.tasks:
            described[task.name] = _write_task(
                task, mixture.get_rate(task) / total_rate, writer, empty
            )
        writer.write_json(STATISTICS, described)
    return described


def _write_task(task, rate: float, writer: TokenStoreWriter, empty) -> dict:
    """Tokenises one task into `writer`, one group per language."""
    tasks = import_tasks()

    groups = {
        language: bounds
        for language, bounds in task.source.groups["train"].items()
        if bounds[1] > bounds[0]
    }
    expected = np.concatenate([np.arange(start, stop) for start, stop in groups.values()])
    ends = np.cumsum([stop - start for start, stop in groups.values()])
    names = list(groups)
    dropped: dict[str, dict] = {}
    kept_lengths = []
    hard = {"texts": 0, "tokens": 0}
    cut = {name: np.zeros(2, np.int64) for name in CUT_TEXTS}
    position = 0
    group = -1
    title = f"tokenise {task.name}"
    with tqdm.tqdm(total=len(expected), desc=title, unit=" pairs", mininterval=0.5) as bar:
        for batch in tasks.read_tokens(task, "train"):
            rows, ids, lengths, content, negatives, scores = _arrays(batch)
            if negatives is not None:
                negatives = negatives.longer_than(empty[1])
            if not np.array_equal(rows, expected[position : position + len(rows)]):
                raise RuntimeError(f"{task.name}: tf.data returned rows in another order")
            keep = (lengths > empty).all(axis=1)
            _count_cut(cut, batch, keep)
            group_of_row = np.searchsorted(ends, position + np.arange(len(rows)), side="right")
            for current in np.unique(group_of_row).tolist():
                if current != group:
                    group = current
                    writer.start_group(task.name, names[group], rate)
                chosen = keep & (group_of_row == group)
                tokens = [ids[i][np.repeat(chosen, lengths[:, i])] for i in range(lengths.shape[1])]
                own = None if negatives is None else negatives.of_rows(chosen)
                writer.write_batch(tokens, lengths[chosen], content[chosen], own, scores[chosen])
                if own is not None:
                    hard["texts"] += len(own.lengths)
                    hard["tokens"] += int(own.lengths.sum())
                _count_dropped(dropped, names[group], rows[(group_of_row == group) & ~keep])
            kept_lengths.append(lengths[keep])
            position += len(rows)
            bar.update(len(rows))
    if position != len(expected):
        raise RuntimeError(f"{task.name}: tf.data returned {position} of {len(expected)} rows")
    return _describe_lengths(np.concatenate(kept_lengths)) | {
        "cut": {name: [int(n) for n in found] for name, found in cut.items() if found[0]},
        "languages": len(groups),
        "rate": rate,
        "empty": dropped,
        **({"negatives": hard} if hard["texts"] else {}),
    }


def _arrays(
    batch: Mapping,
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray, np.ndarray, Negatives | None, np.ndarray]:
    """Row numbers [n], tokens (query, document), lengths [n, 2], content ids [n, 2, 2], hard
    negatives where the source has them, and the documents' scores [n], NaN where there is none."""
    names = ("query", "document")
    ids = [batch[name].flat_values.numpy() for name in names]
    lengths = np.stack([np.diff(batch[name].row_splits.numpy()) for name in names], axis=1)
    content = np.stack([content_ids(batch[f"{name}_text"].numpy()) for name in names], axis=1)
    negatives, document_scores = None, np.full(len(lengths), np.nan, np.float32)
    if "negatives" in batch:
        tokens, texts = batch["negatives"], batch["negatives_text"]
        counts = np.diff(texts.row_splits.numpy())
        document_scores, negative_scores = _scores(batch["scores"], counts)
        negatives = Negatives(
            tokens.flat_values.numpy(),
            np.diff(tokens.values.row_splits.numpy()),
            content_ids(texts.flat_values.numpy()),
            counts,
            negative_scores,
        )
    return batch["row"].numpy(), ids, lengths, content, negatives, document_scores


def _scores(scores, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [n] of the documents, [J] of their negatives) of ragged `scores`, whose rows have
    one for the document and each of its `counts` negatives, or none."""
    values, starts = scores.flat_values.numpy(), scores.row_splits.numpy()[:-1]
    is_scored = scores.row_lengths().numpy() > 0
    document = np.full(len(counts), np.nan, np.float32)
    document[is_scored] = values[starts[is_scored]]
    negative = np.full(counts.sum(), np.nan, np.float32)
    negative[np.repeat(is_scored, counts)] = np.delete(values, starts[is_scored])
    return document, negative


def _count_cut(cut: dict[str, np.ndarray], batch: Mapping, keep: np.ndarray) -> None:
    """Adds to `cut` the texts of the kept rows that were cut, and the tokens that they lost."""
    for name, found in cut.items():
        if name not in batch:
            continue
        lost = batch[f"{name}_cut"]
        if name == "negatives":
            rows = np.repeat(keep, np.diff(lost.row_splits.numpy()))
            lost = lost.flat_values.numpy()[rows]
        else:
            lost = lost.numpy()[keep]
        found += np.count_nonzero(lost), lost.sum()


def _count_dropped(dropped: dict[str, dict], language: str, rows: np.ndarray) -> None:
    if len(rows):
        entry = dropped.setdefault(language, {"pairs": 0, "rows": []})
        entry["pairs"] += len(rows)
        entry["rows"] = (entry["rows"] + rows.tolist())[:NAMED_ROWS]


# ---- Statistics ----------------------------------------------------------------------------------


def _describe_lengths(lengths: np.ndarray) -> dict:
    described: dict = {"pairs": len(lengths)}
    for column, name in enumerate(("query", "document")):
        values = lengths[:, column]
        if not len(values):
            continue
        described[name] = {
            "tokens": int(values.sum()),
            "mean": round(float(values.mean()), 2),
            **{f"p{q * 100:.0f}": int(np.quantile(values, q)) for q in QUANTILES},
            "max": int(values.max()),
        }
    return described


def format_statistics(tasks: Mapping[str, dict]) -> str:
    """A table with one line per task and role, then a line per language with empty texts."""
    quantiles = "".join(f"{f'p{q * 100:.0f}':>6}" for q in QUANTILES)
    lines = [
        f"{'task':<14}{'pairs':>9}{'lang.':>6}{'rate':>7}  {'tokens of':<9}"
        f"{'mean':>7}{quantiles}{'max':>6}{'cut':>10}"
    ]
    for task, entry in tasks.items():
        head = f"{task:<14}{entry['pairs']:>9,}{entry['languages']:>6}{entry['rate']:>7.3f}"
        for name in ("query", "document"):
            values = entry.get(name)
            if values is None:
                continue
            numbers = "".join(f"{values[f'p{q * 100:.0f}']:>6}" for q in QUANTILES)
            share = entry["cut"].get(name, [0])[0] / entry["pairs"]
            lines.append(
                f"{head}  {name:<9}{values['mean']:>7.1f}{numbers}{values['max']:>6}{share:>10.1%}"
            )
            head = " " * len(head)
    for task, entry in tasks.items():
        for name, (texts, tokens) in entry["cut"].items():
            lines.append(f"cut: {texts:,} {CUT_TEXTS[name]} of {task} lose {tokens:,} tokens")
        if hard := entry.get("negatives"):
            lines.append(
                f"hard negatives of {task}: {hard['texts']:,} "
                f"({hard['texts'] / entry['pairs']:.1f} per pair), {hard['tokens']:,} tokens"
            )
        for language, found in entry["empty"].items():
            rows = ", ".join(map(str, found["rows"]))
            lines.append(
                f"left out: {found['pairs']} pairs of {task}/{language} with an empty text "
                f"(rows {rows}{', ...' if found['pairs'] > len(found['rows']) else ''})"
            )
    return "\n".join(lines)


# ---- Command line --------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    del argv
    sys.exit(launching.run(_main))


def _main() -> None:
    try:
        config = json.loads(FLAGS.config_json)
    except ValueError as error:
        raise UserError(f"--config_json is not JSON ({error}): {FLAGS.config_json}") from error
    if not isinstance(config, dict):
        raise UserError(f"--config_json must be a JSON object, got {FLAGS.config_json}")
    folder = prepare(config, FLAGS.data_dir, FLAGS.wheels_dir)
    print(f"token store: {folder}")


if __name__ == "__main__":
    # TensorFlow only moves strings and ids here; keep it quiet and off any accelerator.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    FLAGS = flags.FLAGS
    flags.DEFINE_string("data_dir", None, "Directory of prepared data.", required=True)
    flags.DEFINE_string("wheels_dir", None, "Folder with the pinned wheels (no network needed).")
    flags.DEFINE_string("config_json", "{}", "Data configuration; see data_spec.complete_config.")
    app.run(main)
