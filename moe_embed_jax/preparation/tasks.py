"""seqio Tasks and Mixtures: which pairs there are, how they become tokens, how often each is seen.

Preparation only: importing this module imports TensorFlow.

A Task is one source of (query, document) pairs in one or more languages. Its rows are tokenised by
four preprocessors in a row, each of which works on single rows, as seqio's own `get_dataset` runs
them, and on batches of rows as ragged tensors, as `read_tokens` runs them several times faster.
"""

import os
from collections.abc import Iterator, Mapping

from moe_embed_jax import triton_first  # noqa: F401  # isort: skip
import numpy as np
import seqio
import tensorflow as tf

from moe_embed_jax.data.data_spec import check_rates, chosen_tasks
from moe_embed_jax.errors import UserError
from moe_embed_jax.pairs.array_records import Records
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.preparation.builders import package_texts
from moe_embed_jax.preparation.seqio_vocabulary import SeqioVocabulary
from moe_embed_jax.tokenizers.vocabulary import (
    DOCUMENT_PREFIX,
    QUERY_PREFIX,
    Vocabulary,
)

PREFIXES = {"query": QUERY_PREFIX, "document": DOCUMENT_PREFIX, "negatives": DOCUMENT_PREFIX}
ROWS_PER_READ = 1024
_TEXTS = {name: tf.io.FixedLenFeature([], tf.string) for name in ("query", "document", "language")}


class PairSource(seqio.FunctionDataSource):
    """The rows of one task in the ArrayRecord data: query, document, language (strings) and row.

    `row` (int64) is the position in the builder's split, so that a row can be named.

    Attributes:
      groups: split -> language -> (start, stop) in the builder's split.
      failure: the error that ended the last reading, if any.
    """

    _features = _TEXTS

    def __init__(self, data_dir: str | os.PathLike, task: str, config: str):
        sources, groups = {}, {}
        for split in ("train", "test"):
            sources[split], found = package_texts.open_split(data_dir, config, split)
            own = {
                name.split("/", 1)[1]: tuple(bounds)
                for name, bounds in found.items()
                if name.split("/", 1)[0] == task
            }
            groups[split] = dict(sorted(own.items(), key=lambda item: item[1]))
        self._open(sources, groups)

    def _open(
        self, sources: Mapping[str, Records], groups: dict[str, dict[str, tuple[int, int]]]
    ) -> None:
        self.failure: UserError | None = None
        self._sources = sources
        self.groups = groups
        super().__init__(
            dataset_fn=self._dataset,
            splits=tuple(self.groups),
            num_input_examples={
                split: sum(stop - start for start, stop in groups.values())
                for split, groups in self.groups.items()
            },
        )

    def _dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # The order is the batch schedule's business.
        return self.dataset_of_batches(split, ROWS_PER_READ).unbatch()

    def dataset_of_batches(self, split: str, batch_size: int) -> tf.data.Dataset:
        """The rows in batches of at most `batch_size`, several times faster than one by one."""
        # One Python call per batch of rows: per row it would cost more than the tokenising.
        return tf.data.Dataset.from_generator(
            lambda: self.read_batches(split, batch_size), output_signature=self._signature()
        )

    def _signature(self) -> dict[str, tf.TypeSpec]:
        text = tf.TensorSpec([None], tf.string)
        return {
            **dict.fromkeys(_TEXTS, text),
            "row": tf.TensorSpec([None], tf.int64),
        }

    def read_batches(
        self, split: str, batch_size: int = ROWS_PER_READ
    ) -> Iterator[dict[str, np.ndarray]]:
        """The rows in order, in batches that never mix languages: arrays of bytes and of int64."""
        for start, stop in self.groups[split].values():
            for first in range(start, stop, batch_size):
                rows = np.arange(first, min(first + batch_size, stop))
                try:
                    texts = self._read(self._sources[split], rows)
                except UserError as error:
                    self.failure = error
                    raise
                yield {**texts, "row": rows}

    def _read(self, records: Records, rows: np.ndarray) -> dict:
        """The features of `rows`: texts as object arrays of UTF-8 bytes."""
        # Records are tf.train.Examples; one by one in Python they take ten times as long.
        try:
            parsed = tf.io.parse_example(records.__getitems__(rows), self._features)
        except tf.errors.InvalidArgumentError:
            records.read(rows)  # names the damaged record
            raise
        return {
            name: value if isinstance(value, tf.RaggedTensor) else value.numpy()
            for name, value in parsed.items()
        }


class FolderSource(PairSource):
    """The rows of one source of a prepared folder: as `PairSource`, and `negatives` and `scores`,
    ragged.

    Its only split is "train".
    """

    _features = _TEXTS | {
        "negatives": tf.io.RaggedFeature(tf.string, row_splits_dtype=tf.int64),
        "scores": tf.io.RaggedFeature(tf.float32, row_splits_dtype=tf.int64),
    }

    def __init__(self, folder: PairFolder, source: str):
        groups = {
            language: rows for (name, language), rows in folder.groups.items() if name == source
        }
        self._open({"train": folder.data_source}, {"train": groups})

    def _signature(self) -> dict[str, tf.TypeSpec]:
        more = {
            name: tf.RaggedTensorSpec([None, None], dtype, ragged_rank=1)
            for name, dtype in (("negatives", tf.string), ("scores", tf.float32))
        }
        return {**super()._signature(), **more}


# ---- Preprocessors: datasets of rows or of batches of rows in, the same out ----------------------


def keep_texts(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Valid UTF-8 in `query` and `document`, kept as `query_text` and `document_text`.

    Here and below the same for `negatives`, where a source has them.
    """

    def valid(text):
        return tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")

    def keep(row: dict) -> dict:
        texts = {
            name: tf.ragged.map_flat_values(valid, row[name]) for name in PREFIXES if name in row
        }
        return {**row, **texts, **{f"{name}_text": text for name, text in texts.items()}}

    return _map(dataset, keep)


def join_texts(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """`document`: the query, where there is one, a line break, and the document."""

    def join(row: dict) -> dict:
        between = tf.where(tf.strings.length(row["query"]) > 0, "\n", "")
        return {**row, "document": row["query"] + between + row["document"]}

    return _map(dataset, join)


def add_prefixes(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Puts "search_query: " before the query and "search_document: " before the document."""

    def add(row: dict) -> dict:
        prefixed = {
            name: tf.ragged.map_flat_values(lambda text, prefix=prefix: prefix + text, row[name])
            for name, prefix in PREFIXES.items()
            if name in row
        }
        return {**row, **prefixed}

    return _map(dataset, add)


def tokenize(
    dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]
) -> tf.data.Dataset:
    """Strings to token ids, without <s> and </s>."""

    def encode(vocabulary, text):
        if isinstance(text, tf.RaggedTensor):
            return text.with_values(vocabulary.encode_tf(text.values))
        return vocabulary.encode_tf(text)

    return _map(
        dataset,
        lambda row: {
            **row,
            **{
                name: encode(feature.vocabulary, row[name])
                for name, feature in output_features.items()
            },
        },
    )


class TruncateAndAddSpecials:
    """<s>, the first `max_lengths[name] - 2` ids, </s>: a truncated text keeps its </s>.

    `NAME_cut` is how many tokens each text has lost.
    """

    def __init__(self, max_lengths: Mapping[str, int]):
        self._max_lengths = dict(max_lengths)

    def __call__(
        self, dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]
    ) -> tf.data.Dataset:
        def finish(ids, name: str):
            if isinstance(ids, tf.RaggedTensor) and ids.ragged_rank > 1:
                return ids.with_values(finish(ids.values, name))
            vocabulary = output_features[name].vocabulary
            ids = ids[..., : self._max_lengths[name] - 2]
            specials = (vocabulary.bos_id, vocabulary.eos_id)
            if isinstance(ids, tf.RaggedTensor):
                bos, eos = (tf.fill([ids.nrows(), 1], i) for i in specials)
            else:
                bos, eos = (tf.constant([i], dtype=ids.dtype) for i in specials)
            return tf.concat([bos, ids, eos], axis=-1)

        def lost(ids, name: str):
            if isinstance(ids, tf.RaggedTensor):
                if ids.ragged_rank > 1:
                    return ids.with_values(lost(ids.values, name))
                length = ids.row_lengths()
            else:
                length = tf.size(ids, tf.int64)
            return tf.maximum(length - (self._max_lengths[name] - 2), 0)

        def finish_row(row: dict) -> dict:
            finished = {name: finish(row[name], name) for name in output_features}
            cut = {f"{name}_cut": lost(row[name], name) for name in output_features}
            return {**row, **finished, **cut}

        return _map(dataset, finish_row)


def _map(dataset: tf.data.Dataset, function) -> tf.data.Dataset:
    return dataset.map(function, num_parallel_calls=tf.data.AUTOTUNE)


# ---- Registration --------------------------------------------------------------------------------


def register(
    data_dir: str | os.PathLike,
    vocabulary: Vocabulary,
    query_length: int,
    document_length: int,
    rates: Mapping[str, float] | None = None,
    mixture: str = "package_texts",
) -> seqio.Mixture:
    """Registers the tasks of `mixture` and the mixture itself; replaces earlier registrations.

    Args:
      data_dir: directory of prepared data; the builder configs must have been prepared.
      vocabulary: makes the ids.
      query_length: maximum tokens of a query, prefix, <s> and </s> included.
      document_length: the same for documents.
      rates: task -> positive weight; tasks that are not named are left out. None: all tasks,
        weighted by their number of training rows, so that all are passed through equally often.
      mixture: a key of `data_spec.MIXTURES`.

    Returns:
      The seqio Mixture; each task's `source` is a `PairSource`.
    """
    configs = chosen_tasks(mixture, rates)
    sources = {task: PairSource(data_dir, task, config) for task, config in configs.items()}
    return _register(mixture, sources, vocabulary, query_length, document_length, rates)


def register_pairs(
    folder: PairFolder,
    vocabulary: Vocabulary,
    query_length: int,
    document_length: int,
    rates: Mapping[str, float] | None = None,
) -> seqio.Mixture:
    """`register` for a prepared folder: every source of it is a task, of the mixture "pairs".

    Negatives are tokenised as documents are.
    """
    names = list(dict.fromkeys(name for name, _ in folder.groups))
    check_rates(rates, names, str(folder.folder))
    chosen = [name for name in names if rates is None or name in rates]
    sources = {name: FolderSource(folder, name) for name in chosen}
    return _register("pairs", sources, vocabulary, query_length, document_length, rates)


def register_documents(
    name: str, sources: Mapping[str, PairSource], vocabulary: Vocabulary
) -> seqio.Mixture:
    """Registers one task per source of whole documents, and their mixture: feature `document` has
    the ids of query and document, one text, without prefixes and specials."""
    feature = seqio.Feature(SeqioVocabulary(vocabulary), add_eos=False, dtype=tf.int32)
    for task, source in sources.items():
        seqio.TaskRegistry.remove(task)
        seqio.TaskRegistry.add(
            task,
            source=source,
            output_features={"document": feature},
            preprocessors=[join_texts, keep_texts, tokenize],
        )
    seqio.MixtureRegistry.remove(name)
    return seqio.MixtureRegistry.add(name, [(task, 1.0) for task in sources])


def _register(
    mixture: str,
    sources: Mapping[str, PairSource],
    vocabulary: Vocabulary,
    query_length: int,
    document_length: int,
    rates: Mapping[str, float] | None,
) -> seqio.Mixture:
    max_lengths = {
        "query": query_length,
        "document": document_length,
        "negatives": document_length,
    }
    weights = {}
    for task, source in sources.items():
        names = ("query", "document")
        features = {
            name: seqio.Feature(SeqioVocabulary(vocabulary), add_eos=True, dtype=tf.int32)
            for name in names
        }
        if isinstance(source, FolderSource):
            features["negatives"] = seqio.Feature(
                SeqioVocabulary(vocabulary), add_eos=True, dtype=tf.int32, rank=2
            )
        seqio.TaskRegistry.remove(task)
        seqio.TaskRegistry.add(
            task,
            source=source,
            output_features=features,
            preprocessors=[keep_texts, add_prefixes, tokenize, TruncateAndAddSpecials(max_lengths)],
        )
        rows = source.num_input_examples("train")
        if not rows:
            raise UserError(f"task {task} has no training rows: prepare its data again")
        weights[task] = float(rows if rates is None else rates[task])
    seqio.MixtureRegistry.remove(mixture)
    return seqio.MixtureRegistry.add(mixture, list(weights.items()))


def read_tokens(
    task: seqio.Task, split: str, batch_size: int = ROWS_PER_READ
) -> Iterator[dict[str, tf.Tensor | tf.RaggedTensor]]:
    """The rows of `task.get_dataset(split=split, shuffle=False)`, in order, as ragged batches.

    The preprocessors are the task's own, run on batches of strings instead of single ones.

    Raises:
      UserError: a record is damaged.
    """
    batches = task.source.dataset_of_batches(split, batch_size)
    try:
        yield from task.preprocess_postcache(batches, sequence_length=None).prefetch(2)
    except tf.errors.OpError as error:
        # tf.data turns what a generator raises into an error of several pages.
        if task.source.failure is not None:
            raise task.source.failure from error
        raise
