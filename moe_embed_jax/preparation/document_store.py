"""Documents for masked language modelling: tokenised into a token store, some held out as text.

A document is a row of a builder or of a prepared folder: its query and its document, one after the
other (for a page whose first line became the query, that is the page). A store has one sequence per
document, whole and without specials: how documents are cut into rows is the run's business. Belongs
to preparation.
"""

import gzip
import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import tqdm

from moe_embed_jax.checksums import FILE_NAME, write_checksums
from moe_embed_jax.data.data_spec import DOCUMENTS, held_out_path, pair_sources, source_checksums
from moe_embed_jax.data.token_store import TokenStoreWriter
from moe_embed_jax.new_folder import new_folder
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.preparation.builders import package_texts
from moe_embed_jax.safe_names import check_name
from moe_embed_jax.tokenizers.vocabulary import Vocabulary, clean_text, content_ids

DOCUMENTS_PER_READ = 64  # some are long
# Of a prepared folder, by the hash of a document; the builders decide for themselves.
HELD_OUT_OF = 50
MOST_HELD_OUT = 100  # documents per source and language that are kept as text, evenly spaced


def fetch(config: Mapping, data_dir: Path, wheels_dir) -> None:
    """Makes the text of `config` available: prepares the builders, or checks the folder."""
    if config["texts"]:
        PairFolder(config["texts"]).verify()
    else:
        builders = tuple(DOCUMENTS[config["documents"]].values())
        package_texts.prepare(data_dir, wheels_dir, builders)


def texts(config: Mapping, data_dir: Path) -> Iterator[str]:
    """Every document for training, to train a vocabulary on."""
    for source in _sources(config, data_dir).values():
        for batch in source.read_batches("train", DOCUMENTS_PER_READ):
            yield from _joined(batch)


def _sources(config: Mapping, data_dir: Path) -> dict:
    """Task -> its source of rows."""
    tasks = import_tasks()
    if config["texts"]:
        folder = PairFolder(config["texts"])
        return {name: tasks.FolderSource(folder, name) for name in pair_sources(folder.folder)}
    chosen = DOCUMENTS[config["documents"]]
    return {task: tasks.PairSource(data_dir, task, name) for task, name in chosen.items()}


def _joined(batch: Mapping) -> list[str]:
    pairs = zip(batch["query"], batch["document"], strict=True)
    return ["\n".join(clean_text(text) for text in pair if text) for pair in pairs]


def write(config: Mapping, data_dir: Path, vocabulary: Vocabulary, folder: Path) -> dict:
    """Runs the seqio tasks into a token store, and the held-out texts beside; returns counts."""
    tasks = import_tasks()
    sources = _sources(config, data_dir)
    mixture = tasks.register_documents(config["documents"], sources, vocabulary)
    if config["texts"]:
        origin = {"texts": PairFolder(config["texts"]).content_hash}
    else:
        origin = {"documents": config["documents"], "source_checksums": source_checksums()}
    spec = {
        **origin,
        "vocabulary": {"sha256": vocabulary.content_hash, "size": vocabulary.size},
    }
    counts = {}
    held_out_folder = held_out_path(config, data_dir)
    with TokenStoreWriter(folder, spec) as writer, _HeldOut(held_out_folder) as held_out:
        for task in mixture.tasks:
            counts[task.name] = _write_task(task, writer, held_out)
    return counts


def _write_task(task, writer: TokenStoreWriter, held_out: "_HeldOut") -> dict:
    """One group per language."""
    tasks = import_tasks()
    groups = {name: b for name, b in task.source.groups["train"].items() if b[1] > b[0]}
    has_test = "test" in task.source.groups
    counts = dict.fromkeys(("documents", "tokens", "longest", "empty", "held_out"), 0)
    language_at = {start: language for language, (start, _) in groups.items()}
    language = ""
    total = sum(stop - start for start, stop in groups.values())
    with tqdm.tqdm(total=total, desc=f"tokenise {task.name}", unit=" documents") as bar:
        for batch in tasks.read_tokens(task, "train", DOCUMENTS_PER_READ):
            first = int(batch["row"][0])
            if first in language_at:  # batches never mix languages
                language = language_at[first]
                writer.start_group(task.name, language, 1.0)
            lengths = np.diff(batch["document"].row_splits.numpy())
            texts = batch["document_text"].numpy()
            content = content_ids(texts)
            chosen = (content[:, 0] % HELD_OUT_OF == 0) & (not has_test)
            for place in np.flatnonzero(chosen):
                held_out.add(task.name, language, texts[place])
            keep = (lengths > 0) & ~chosen
            ids = batch["document"].flat_values.numpy()[np.repeat(keep, lengths)]
            writer.write_batch([ids], lengths[keep, None], content[keep, None])
            counts["documents"] += int(keep.sum())
            counts["tokens"] += int(lengths[keep].sum())
            counts["longest"] = max(counts["longest"], int(lengths.max()))
            counts["empty"] += int((lengths == 0).sum())
            counts["held_out"] += int(chosen.sum())
            bar.update(len(lengths))
    if has_test:
        for batch in task.source.read_batches("test", DOCUMENTS_PER_READ):
            for language, text in zip(batch["language"], _joined(batch), strict=True):
                held_out.add(task.name, language.decode(), text)
                counts["held_out"] += 1
    return counts | {"languages": len(groups)}


class _HeldOut:
    """Texts per language, written to folder/<language>.jsonl.gz at the end, or not at all."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._texts: dict[str, dict[str, list[str]]] = {}

    def __enter__(self) -> "_HeldOut":
        return self

    def add(self, source: str, language: str, text: str | bytes) -> None:
        check_name(language, f"the language of a held-out document of {source}")
        own = self._texts.setdefault(language, {}).setdefault(source, [])
        own.append(clean_text(text))

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None or self._folder.is_dir():  # another vocabulary's store has written it
            return
        with new_folder(self._folder, last=FILE_NAME) as partial:
            for language, sources in self._texts.items():
                path = partial / f"{language}.jsonl.gz"
                with gzip.GzipFile(path, "wb", mtime=0) as file:
                    for source, found in sources.items():
                        step = max(len(found) / MOST_HELD_OUT, 1.0)
                        for i in range(min(len(found), MOST_HELD_OUT)):
                            entry = {"source": source, "text": found[int(i * step)]}
                            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            write_checksums(partial)


def format_statistics(tasks: Mapping[str, dict]) -> str:
    """A table with one line per task."""
    lines = [
        f"{'documents of':<18}{'train':>9}{'held out':>10}{'lang.':>7}{'tokens':>14}{'mean':>8}"
        f"{'longest':>9}"
    ]
    for task, entry in tasks.items():
        mean = entry["tokens"] / max(entry["documents"], 1)
        lines.append(
            f"{task:<18}{entry['documents']:>9,}{entry['held_out']:>10,}{entry['languages']:>7}"
            f"{entry['tokens']:>14,}{mean:>8.0f}{entry['longest']:>9,}"
        )
        if entry["empty"]:
            lines.append(f"left out: {entry['empty']} documents of {task} without a token")
    return "\n".join(lines)


def import_tasks() -> ModuleType:
    """`data.tasks`, which imports TensorFlow: seconds that a cached call should not cost.

    TensorFlow's libraries write notes about missing GPUs to file descriptor 2 as they are loaded,
    whatever the log level; an import error is a Python exception and unaffected.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        return importlib.import_module("moe_embed_jax.preparation.tasks")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
