"""`Vocabulary` as a seqio vocabulary, in Python and in TensorFlow, with the same ids.

The TensorFlow side calls the Python SentencePiece of `Vocabulary` on whole batches instead of
tensorflow_text's SentencePiece operation. That one breaks ties between equally likely segmentations
differently ("xxxxx" as xx xxx or xxx xx), which changes the ids of one text in some 5,000, so that
a model would be trained on other ids than the embedder gives it later; it is not faster either.

Preparation only: importing this module imports TensorFlow.
"""

from moe_embed_jax import triton_first  # noqa: F401  # isort: skip
import numpy as np
import seqio
import tensorflow as tf

from moe_embed_jax.tokenizers.vocabulary import Vocabulary


class SeqioVocabulary(seqio.Vocabulary):
    """The fairseq id layout (<s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last) for seqio.

    `encode_tf` takes a string scalar, giving int32 [ids], or a batch [N], giving a
    `tf.RaggedTensor` [N, (ids)]; `decode_tf` takes int32 [L], [N, L] or ragged [N, (L)].
    """

    def __init__(self, vocabulary: Vocabulary):
        super().__init__(extra_ids=0)
        self.vocabulary = vocabulary

    @property
    def bos_id(self) -> int:
        return self.vocabulary.bos_id

    @property
    def pad_id(self) -> int:
        return self.vocabulary.pad_id

    @property
    def eos_id(self) -> int:
        return self.vocabulary.eos_id

    @property
    def unk_id(self) -> int:
        return self.vocabulary.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self.vocabulary.size

    def _encode(self, s: str) -> list[int]:
        return self.vocabulary.encode(s)

    def _decode(self, ids: list[int]) -> str:
        return self.vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
        ids, lengths = tf.numpy_function(
            self._encode_strings, [tf.reshape(s, [-1])], [tf.int32, tf.int64], stateful=False
        )
        ids.set_shape([None])
        if s.shape.rank == 0:
            return ids
        lengths.set_shape(s.shape)
        return tf.RaggedTensor.from_row_lengths(ids, lengths, validate=False)

    def _encode_strings(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.vocabulary.encode_flat(texts.tolist())

    def _decode_tf(self, ids: tf.Tensor | tf.RaggedTensor) -> tf.Tensor:
        if ids.shape.rank == 1:
            return self._decode_tf(ids[tf.newaxis])[0]
        if not isinstance(ids, tf.RaggedTensor):
            ids = tf.RaggedTensor.from_tensor(ids)
        texts = tf.numpy_function(
            self._decode_ids, [ids.flat_values, ids.row_splits], tf.string, stateful=False
        )
        texts.set_shape([None])
        return texts

    def _decode_ids(self, ids: np.ndarray, splits: np.ndarray) -> np.ndarray:
        rows = np.split(ids, splits[1:-1])
        return np.array([self.vocabulary.decode(row).encode() for row in rows], dtype=object)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SeqioVocabulary)
            and other.vocabulary.content_hash == self.vocabulary.content_hash
        )

    def __hash__(self) -> int:
        return hash(self.vocabulary.content_hash)

    def __str__(self) -> str:
        return f"SeqioVocabulary({self.vocab_size} ids, {self.vocabulary.content_hash[:12]})"
