"""seqio Tasks and Mixtures: which pairs there are, how they become tokens, how often each is seen.

Preparation only: importing this module imports TensorFlow.

A Task is one source of (query, document) pairs in one or more languages. Its rows are tokenised by
four preprocessors in a row, each of which works on single rows, as seqio's own `get_dataset` runs
them, and on batches of rows as ragged tensors, as `read_tokens` runs them several times faster.
"""

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from moe_embed_jax.data.builders import package_texts
from moe_embed_jax.data.data_spec import chosen_tasks
from moe_embed_jax.data.seqio_vocabulary import SeqioVocabulary
from moe_embed_jax.data.vocabulary import DOCUMENT_PREFIX, QUERY_PREFIX, Vocabulary, clean_text
from moe_embed_jax.errors import UserError

PREFIXES = {"query": QUERY_PREFIX, "document": DOCUMENT_PREFIX}
ROWS_PER_READ = 1024
_TEXT_FEATURES = ("query", "document", "language")


class PairSource(seqio.FunctionDataSource):
    """The rows of one task in the ArrayRecord data: query, document, language (strings) and row.

    `row` (int64) is the position in the builder's split, so that a row can be named.

    Attributes:
      groups: split -> language -> (start, stop) in the builder's split.
      failure: the error that ended the last reading, if any.
    """

    def __init__(self, data_dir: str | os.PathLike, task: str, config: str):
        self.failure: UserError | None = None
        self._sources = {}
        self.groups: dict[str, dict[str, tuple[int, int]]] = {}
        for split in ("train", "test"):
            source, groups = package_texts.open_split(data_dir, config, split)
            self._sources[split] = source
            own = {
                name.split("/", 1)[1]: tuple(bounds)
                for name, bounds in groups.items()
                if name.split("/", 1)[0] == task
            }
            self.groups[split] = dict(sorted(own.items(), key=lambda item: item[1]))
        super().__init__(
            dataset_fn=self._dataset,
            splits=tuple(self.groups),
            num_input_examples={
                split: sum(stop - start for start, stop in groups.values())
                for split, groups in self.groups.items()
            },
        )

    def languages(self, split: str = "train") -> list[str]:
        """The languages of the documents, in the order of the rows."""
        return list(self.groups[split])

    def _dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # The order is the batch schedule's business.
        text = tf.TensorSpec([None], tf.string)
        signature = {name: text for name in _TEXT_FEATURES}
        signature["row"] = tf.TensorSpec([None], tf.int64)
        # One Python call per batch of rows: per row it would cost more than the tokenising.
        batches = tf.data.Dataset.from_generator(
            lambda: self.read_batches(split), output_signature=signature
        )
        return batches.unbatch()

    def read_batches(self, split: str) -> Iterator[dict[str, np.ndarray]]:
        """The rows in order, in batches that never mix languages: arrays of bytes and of int64."""
        for start, stop in self.groups[split].values():
            for first in range(start, stop, ROWS_PER_READ):
                rows = np.arange(first, min(first + ROWS_PER_READ, stop))
                try:
                    texts = _read_texts(self._sources[split], rows)
                except UserError as error:
                    self.failure = error
                    raise
                yield {**texts, "row": rows}


def _read_texts(source: Sequence, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The text features of `rows` as object arrays of UTF-8 bytes."""
    if records := getattr(source, "data_source", None):
        # Records are tf.train.Examples; one by one in Python they take ten times as long.
        features = {name: tf.io.FixedLenFeature([], tf.string) for name in _TEXT_FEATURES}
        try:
            parsed = tf.io.parse_example(records.__getitems__(rows.tolist()), features)
            return {name: tensor.numpy() for name, tensor in parsed.items()}
        except tf.errors.InvalidArgumentError:
            pass  # Damaged: reading it again, row by row, names the record.
    found = [source[row] for row in rows.tolist()]
    return {
        name: np.array([clean_text(row[name]).encode() for row in found], dtype=object)
        for name in _TEXT_FEATURES
    }


# ---- Preprocessors: datasets of rows or of batches of rows in, the same out ----------------------


def keep_texts(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Valid UTF-8 in `query` and `document`, kept as `query_text` and `document_text`."""

    def keep(row: dict) -> dict:
        valid = {
            name: tf.strings.unicode_transcode(row[name], "UTF-8", "UTF-8", errors="replace")
            for name in PREFIXES
        }
        return {**row, **valid, **{f"{name}_text": text for name, text in valid.items()}}

    return _map(dataset, keep)


def add_prefixes(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """`search_query: ` before the query, `search_document: ` before the document."""
    return _map(
        dataset,
        lambda row: {**row, **{name: prefix + row[name] for name, prefix in PREFIXES.items()}},
    )


def tokenize(
    dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]
) -> tf.data.Dataset:
    """Strings to token ids, without <s> and </s>."""
    return _map(
        dataset,
        lambda row: {
            **row,
            **{
                name: feature.vocabulary.encode_tf(row[name])
                for name, feature in output_features.items()
            },
        },
    )


class TruncateAndAddSpecials:
    """<s>, the first `max_lengths[name] - 2` ids, </s>: a truncated text keeps its </s>."""

    def __init__(self, max_lengths: Mapping[str, int]):
        self._max_lengths = dict(max_lengths)

    def __call__(
        self, dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]
    ) -> tf.data.Dataset:
        def finish(row: dict) -> dict:
            finished = {}
            for name, feature in output_features.items():
                ids = row[name][..., : self._max_lengths[name] - 2]
                specials = (feature.vocabulary.bos_id, feature.vocabulary.eos_id)
                if isinstance(ids, tf.RaggedTensor):
                    bos, eos = (tf.fill([ids.nrows(), 1], i) for i in specials)
                else:
                    bos, eos = (tf.constant([i], dtype=ids.dtype) for i in specials)
                finished[name] = tf.concat([bos, ids, eos], axis=-1)
            return {**row, **finished}

        return _map(dataset, finish)


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
    max_lengths = {"query": query_length, "document": document_length}
    features = {
        name: seqio.Feature(SeqioVocabulary(vocabulary), add_eos=True, dtype=tf.int32)
        for name in PREFIXES
    }
    weights = {}
    for task, config in configs.items():
        source = PairSource(data_dir, task, config)
        seqio.TaskRegistry.remove(task)
        seqio.TaskRegistry.add(
            task,
            source=source,
            output_features=features,
            preprocessors=[keep_texts, add_prefixes, tokenize, TruncateAndAddSpecials(max_lengths)],
        )
        rows = source.num_input_examples("train")
        if not rows:
            raise UserError(f"task {task} has no training rows in {data_dir}: prepare it again")
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
    rows = task.source.get_dataset(split=split, shuffle=False).batch(batch_size)
    try:
        yield from task.preprocess_postcache(rows, sequence_length=None).prefetch(2)
    except tf.errors.OpError as error:
        # tf.data turns what a generator raises into pages of its own.
        if task.source.failure is not None:
            raise task.source.failure from error
        raise
