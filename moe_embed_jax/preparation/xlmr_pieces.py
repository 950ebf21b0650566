"""A SentencePiece model of XLM-R's kind from its pieces and its table of single characters.

XLM-R's normaliser is `nmt_nfkc` of an old Unicode version. The library's own of that name is newer:
it knows 172 more characters and keeps the zero width joiner, which Sinhala and Malayalam are
written with. So the library's rules are taken apart, and what they say about single characters is
replaced by the table.
"""

import dataclasses
import io
import pathlib
import tempfile

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
FIRST = 4  # of the pieces, after <s>, <pad>, </s>, <unk>


@dataclasses.dataclass(frozen=True)
class Pieces:
    """In the order of XLM-R's ids: <s> <pad> </s> <unk> PIECES <mask>.

    scores: float32, of the pieces. characters: what the normaliser makes of single characters.
    """

    pieces: list[str]
    scores: np.ndarray
    characters: dict[str, str]


def sentencepiece_model(pieces: Pieces) -> bytes:
    """The serialised model, which `data.vocabulary.Vocabulary` reads with the same ids."""
    rules = normalizer_rules(_model("nmt_nfkc").normalizer_spec.precompiled_charsmap)
    rules = {key: value for key, value in rules.items() if len(key) > 1} | pieces.characters
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rules.tsv"
        lines = (f"{_codes(key)}\t{_codes(value)}\n" for key, value in sorted(rules.items()))
        path.write_text("".join(lines))
        model = _model(normalization_rule_tsv=str(path))
    del model.pieces[3:]  # <unk>, <s>, </s> stay
    for piece, score in zip(pieces.pieces[FIRST:-1], pieces.scores[FIRST:-1], strict=True):
        model.pieces.add(piece=piece, score=float(score), type=_Piece.NORMAL)
    model.trainer_spec.vocab_size = len(model.pieces)
    model.trainer_spec.ClearField("input")
    model.normalizer_spec.ClearField("normalization_rule_tsv")
    return model.SerializeToString()


def normalizer_rules(charsmap: bytes) -> dict[str, str]:
    """{text: replacement} of a `precompiled_charsmap`.

    That is the size of a double-array trie (Darts-clone), the trie over UTF-8, whose values are
    places in the replacements that follow it, each ended by a zero byte.
    """
    size = int.from_bytes(charsmap[:4], "little")
    units, texts = np.frombuffer(charsmap, "<u4", size // 4, 4), charsmap[4 + size :]
    labels = np.arange(1, 256, dtype=np.uint32)
    rules = {}
    waiting = [(0, b"")]
    while waiting:
        node, key = waiting.pop()
        unit = int(units[node])
        base = node ^ ((unit >> 10) << ((unit & 512) >> 6))
        if unit & 256:  # a key ends here
            start = int(units[base]) & 0x7FFFFFFF
            rules[key.decode()] = texts[start : texts.index(b"\0", start)].decode()
        children = base ^ labels
        inside = children < len(units)
        is_child = units[np.where(inside, children, 0)] & 0x800000FF == labels
        waiting += [
            (int(children[i]), key + bytes([labels[i]])) for i in np.flatnonzero(is_child & inside)
        ]
    return rules


def _model(rule: str | None = None, **rules) -> sentencepiece_model_pb2.ModelProto:
    """A tiny model: there is no other way to make the library compile a normaliser."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c", "b a c d"]),
        model_writer=written,
        vocab_size=8,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
        **({"normalization_rule_name": rule} if rule else rules),
    )
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(written.getvalue())
    return model


def _codes(text: str) -> str:
    return " ".join(f"{ord(character):X}" for character in text)
