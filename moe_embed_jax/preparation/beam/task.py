"""Raw sources as seqio Tasks: one Task per source, one shard of it per input file.

Imports TensorFlow: for Beam's workers only.

A row of a Task is a pair (query, document, negatives, dropped, language, line) or, where `problem`
is not empty, a bad row (file, line, field, problem, row). With a vocabulary the Task also counts
tokens.
"""

import itertools
from collections.abc import Iterator, Sequence

from moe_embed_jax import triton_first  # noqa: F401  # isort: skip
import numpy as np
import seqio
import tensorflow as tf

from moe_embed_jax.preparation.beam.formats import Texts
from moe_embed_jax.preparation.beam.input_files import read_part
from moe_embed_jax.preparation.beam.read import ROWS_PER_BATCH, Bad, Good
from moe_embed_jax.preparation.beam.sources import Part, Source
from moe_embed_jax.preparation.seqio_vocabulary import SeqioVocabulary

STRINGS = ("query", "document", "language", "file", "field", "problem", "row")
COUNTED = ("query", "document")


class RawSource(seqio.DataSource):
    """The rows of a source in the order of its files; its only split is "train".

    Attributes:
      failure: the error that ended the last reading, if any: tf.data would bury it in its own.
    """

    def __init__(self, source: Source, parts: Sequence[Part]):
        super().__init__(splits=("train",))
        self._source = source
        self._parts = list(parts)
        self.failure: Exception | None = None

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        return [part.path for part in self._parts]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused,
    ) -> tf.data.Dataset:
        del split, shuffle, seed, unused  # the pipeline orders the rows
        parts = self._parts
        if shard_info is not None:
            if shard_info.num_shards != len(parts):
                raise ValueError(f"the source has {len(parts)} shards, not {shard_info.num_shards}")
            parts = [parts[shard_info.index]]
        return self._dataset(parts).unbatch()

    def read_batches(self, shard: int) -> tf.data.Dataset:
        """The rows of a shard in batches, several times faster than one by one."""
        return self._dataset([self._parts[shard]])

    def _dataset(self, parts: Sequence[Part]) -> tf.data.Dataset:
        signature = {name: tf.TensorSpec([None], tf.string) for name in STRINGS}
        signature |= {name: tf.TensorSpec([None], tf.int64) for name in ("line", "dropped")}
        signature["negatives"] = tf.RaggedTensorSpec([None, None], tf.string, ragged_rank=1)
        signature["scores"] = tf.RaggedTensorSpec([None, None], tf.float32, ragged_rank=1)
        return tf.data.Dataset.from_generator(
            lambda: self._batches(parts), output_signature=signature
        )

    def _batches(self, parts: Sequence[Part]) -> Iterator[dict]:
        rows = itertools.chain.from_iterable(read_part(self._source, part) for part in parts)
        try:
            while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
                yield _columns(batch)
        except Exception as error:
            self.failure = error
            raise


def _columns(rows: list[Good | Bad]) -> dict:
    columns: dict[str, list] = {name: [] for name in STRINGS}
    negatives: list[bytes] = []
    scores: list[float] = []
    counts, score_counts = [], []
    for row in rows:
        texts = Texts("", "", ()) if isinstance(row, Bad) else row.texts
        values = row._asdict() if isinstance(row, Bad) else {"language": row.language}
        if not isinstance(row, Bad):
            values |= {"query": texts.query, "document": texts.document}
        negatives += [text.encode("utf-8") for text in texts.negatives]
        scores += texts.scores
        counts.append(len(texts.negatives))
        score_counts.append(len(texts.scores))
        for name in STRINGS:
            columns[name].append(values.get(name, "").encode("utf-8", errors="replace"))
    ragged = {
        name: tf.RaggedTensor.from_row_lengths(
            tf.constant(values, dtype), tf.constant(lengths, tf.int64)
        )
        for name, values, dtype, lengths in (
            ("negatives", negatives, tf.string, counts),
            ("scores", scores, tf.float32, score_counts),
        )
    }
    arrays = {name: np.array(values, dtype=object) for name, values in columns.items()}
    numbers = {
        "line": np.array([row.line for row in rows], np.int64),
        "dropped": np.array([getattr(row, "dropped", 0) for row in rows], np.int64),
    }
    return {**arrays, **numbers, **ragged}


def count_tokens(dataset: tf.data.Dataset, output_features) -> tf.data.Dataset:
    """Adds `query_tokens` and `document_tokens`: of the bare text, without prefix and specials."""

    def count(row: dict) -> dict:
        counts = {}
        for name in COUNTED:
            ids = output_features[name].vocabulary.encode_tf(row[name])
            if isinstance(ids, tf.RaggedTensor):
                counts[f"{name}_tokens"] = ids.row_lengths()
            else:
                counts[f"{name}_tokens"] = tf.size(ids, out_type=tf.int64)
        return {**row, **counts}

    return dataset.map(count, num_parallel_calls=tf.data.AUTOTUNE)


def make_task(source: Source, parts: Sequence[Part], vocabulary=None) -> seqio.Task:
    """The Task of a source, named after it; `vocabulary` makes it count tokens.

    Not registered: two runs in one process may have sources of one name.
    """
    features = {}
    if vocabulary is not None:
        feature = seqio.Feature(SeqioVocabulary(vocabulary), add_eos=False, dtype=tf.int32)
        features = dict.fromkeys(COUNTED, feature)
    return seqio.Task(
        source.name,
        source=RawSource(source, parts),
        output_features=features,
        preprocessors=[count_tokens] if features else [],
    )


def read_shard(task: seqio.Task, shard: int) -> Iterator[dict[str, np.ndarray]]:
    """The rows of one shard of `task.get_dataset`, in order, in batches: bytes and integers.

    The preprocessors are the task's own, run on batches instead of single rows. `negatives` holds
    all rows' one after the other, `negative_counts` how many each row has;
    likewise `scores` and `score_counts`.
    """
    batches = task.source.read_batches(shard)
    batches = task.preprocess_postcache(batches, sequence_length=None).prefetch(2)
    try:
        for batch in batches:
            ragged = {name: batch.pop(name) for name in ("negatives", "scores")}
            yield {
                **{name: tensor.numpy() for name, tensor in batch.items()},
                **{name: tensor.flat_values.numpy() for name, tensor in ragged.items()},
                "negative_counts": ragged["negatives"].row_lengths().numpy(),
                "score_counts": ragged["scores"].row_lengths().numpy(),
            }
    except tf.errors.OpError as error:
        if task.source.failure is not None:
            raise task.source.failure from error
        raise
