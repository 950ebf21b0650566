"""One text pair as a record: a `tf.train.Example`, so that TFDS and Grain read it, too.

A record is the same bytes for the same row. Neither TensorFlow nor TFDS is imported: the four
messages of the format stand here.
"""

from collections.abc import Sequence
from typing import NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

TEXTS = ("query", "document", "source", "language")


def _example_class():
    """`tf.train.Example` with features of bytes and floats (tensorflow's feature.proto)."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="pairs.proto", package="pairs", syntax="proto3")

    def message(parent, name: str, *fields):
        made = parent.add(name=name)
        for number, label, kind, field_name, type_name in fields:
            made.field.add(
                name=field_name, number=number, label=label, type=kind, type_name=type_name
            )
        return made

    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    text, data, nested = field.TYPE_STRING, field.TYPE_BYTES, field.TYPE_MESSAGE
    message(file.message_type, "BytesList", (1, many, data, "value", None))
    message(file.message_type, "FloatList", (1, many, field.TYPE_FLOAT, "value", None))
    message(
        file.message_type,
        "Feature",
        (1, one, nested, "bytes_list", ".pairs.BytesList"),
        (2, one, nested, "float_list", ".pairs.FloatList"),
    )
    features = message(
        file.message_type, "Features", (1, many, nested, "feature", ".pairs.Features.FeatureEntry")
    )
    entry = message(
        features.nested_type,
        "FeatureEntry",
        (1, one, text, "key", None),
        (2, one, nested, "value", ".pairs.Feature"),
    )
    entry.options.map_entry = True
    message(file.message_type, "Example", (1, one, nested, "features", ".pairs.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("pairs.Example"))


_Example = _example_class()


class PairRow(NamedTuple):
    """One pair with its hard negatives; `language` is that of the document.

    scores: a teacher's scores (float32) of the document and of each negative, NaN where one is not
      known; () where none is.
    """

    query: str
    document: str
    negatives: tuple[str, ...]
    source: str
    language: str
    scores: tuple[float, ...] = ()


def encode_pair(row: PairRow) -> bytes:
    """`row` as a record.

    Raises `UnicodeEncodeError` for a text that UTF-8 cannot hold (half of a surrogate pair).
    """
    values: dict[str, Sequence[str]] = {name: [getattr(row, name)] for name in TEXTS}
    values["negatives"] = row.negatives
    example = _Example()
    for name, texts in values.items():
        feature = example.features.feature[name]
        feature.bytes_list.value.extend(text.encode("utf-8") for text in texts)
        feature.bytes_list.SetInParent()  # an empty list is there, too
    if row.scores:
        example.features.feature["scores"].float_list.value.extend(row.scores)
    return example.SerializeToString(deterministic=True)


def decode_pair(record: bytes) -> PairRow:
    """The inverse of `encode_pair`. Raises `ValueError` for damaged bytes."""
    try:
        feature = _Example.FromString(record).features.feature
        negatives = feature["negatives"].bytes_list.value
        scores = tuple(feature["scores"].float_list.value)
        if scores and len(scores) != 1 + len(negatives):
            raise ValueError(f"{len(scores)} scores of {1 + len(negatives)} documents")
        return PairRow(
            **{name: feature[name].bytes_list.value[0].decode("utf-8") for name in TEXTS},
            negatives=tuple(value.decode("utf-8") for value in negatives),
            scores=scores,
        )
    except (DecodeError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error
