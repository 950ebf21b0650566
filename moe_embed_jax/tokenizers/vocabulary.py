"""Text to token ids: a SentencePiece model behind the fairseq id layout of XLM-RoBERTa.

    <s> 0   <pad> 1   </s> 2   <unk> 3   piece = SentencePiece id + 1   <mask> last

Both the published XLM-R model (250,002 ids) and the small vocabularies trained here use this one
layout, so nothing behind this module has to know which of the two it was given. The ids of XLM-R
equal fairseq's: a literal "<unk>" or "</s>" in a text is text, never markup.

What happens to unusual input, everywhere in the project:

* empty text, white space only, or only control characters that the model deletes: no ids
  (`encode_text` still returns <s> and </s>);
* a lone surrogate in a `str`: U+FFFD; a split surrogate pair: the character it stands for;
* `bytes`: decoded as UTF-8, every invalid sequence becoming U+FFFD;
* a very long text with `max_length`: only a head of it is tokenised, with the same ids.

This module never imports TensorFlow.
"""

import hashlib
import io
import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import sentencepiece

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.tokenizers.tokenizer import Tokenizer

QUERY_PREFIX = "search_query: "
DOCUMENT_PREFIX = "search_document: "

# SentencePiece marks a space, and so the start of a word, with U+2581.
WORD_START = "\u2581"
# Texts below this many characters are tokenised whole: cutting them would save nothing.
CUT_ABOVE_CHARACTERS = 4096


def clean_text(text: str | bytes) -> str:
    """`text` as a string that can be written as UTF-8.

    Bytes are decoded with replacement; surrogate pairs are joined; lone surrogates become U+FFFD.

    Raises:
      UserError: `text` is neither `str` nor `bytes`.
    """
    if isinstance(text, bytes):
        return text.decode("utf-8", errors="replace")
    if not isinstance(text, str):
        raise UserError(f"a text must be a string, got {type(text).__name__}: {text!r:.60}")
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
    return text


def content_ids(texts: Sequence[str | bytes]) -> np.ndarray:
    """64-bit content hashes, int32 [len(texts), 2]: BLAKE2b of the stripped NFC text in UTF-8.

    Equal texts get equal ids in every task, language and role, which is how the loss knows that
    two rows of a batch hold the same text. The ids do not depend on prefixes or the vocabulary.
    """
    digests = bytearray()
    for text in texts:
        normal = unicodedata.normalize("NFC", clean_text(text)).strip()
        digests += hashlib.blake2b(normal.encode("utf-8"), digest_size=8).digest()
    return np.frombuffer(bytes(digests), dtype="<i4").astype(np.int32).reshape(len(texts), 2)


class Vocabulary(Tokenizer):
    """A SentencePiece model with the fairseq id layout.

    Attributes:
      size: number of ids, `<mask>` included (250,002 for XLM-R). The padding of the embedding
        table to a multiple of anything is the model's business.
      mask_id: `size - 1`.
      content_hash: SHA-256 of the model file, hexadecimal.
      model_bytes: the serialised SentencePiece model.
    """

    bos_id = 0
    pad_id = 1
    eos_id = 2
    unk_id = 3

    def __init__(self, model_bytes: bytes, name: str = "vocabulary"):
        """`name` is what errors call the model, e.g. its path. See also `load`."""
        self._processor = _load_processor(model_bytes, name)
        self.model_bytes = model_bytes
        self.content_hash = hashlib.sha256(model_bytes).hexdigest()
        try:
            pieces = self._processor.id_to_piece(list(range(self._processor.get_piece_size())))
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is damaged: a piece of it is no text ({error})") from None
        self._space_is_boundary = not any(WORD_START in piece[1:] for piece in pieces)
        self.size = len(pieces) + 2
        self.mask_id = self.size - 1

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Vocabulary":
        """Reads a SentencePiece model file.

        Raises:
          UserError: no such file, not a SentencePiece model, or not the XLM-R layout.
        """
        path = storage.path(path)
        if not path.is_file():
            raise UserError(
                f"vocabulary file {path} does not exist; give the path of a SentencePiece model "
                "such as XLM-RoBERTa's sentencepiece.bpe.model"
            )
        return cls(path.read_bytes(), name=str(path))

    def encode_batch(
        self, texts: Sequence[str | bytes], max_ids: int | None = None
    ) -> list[list[int]]:
        ids, lengths = self.encode_flat(texts, max_ids)
        ids = ids.tolist()
        ends = np.cumsum(lengths).tolist()
        return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def encode_flat(
        self, texts: Sequence[str | bytes], max_ids: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        texts = [clean_text(text) for text in texts]
        if max_ids is not None:
            texts = [self.head(text, max_ids) for text in texts]
        pieces = [pieces[:max_ids] for pieces in self._processor.encode(texts)]
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        flat = np.fromiter(itertools.chain.from_iterable(pieces), np.int32, lengths.sum())
        return np.where(flat == 0, np.int32(self.unk_id), flat + 1), lengths

    def head(self, text: str, max_ids: int) -> str:
        """A beginning of `text` with the same first `max_ids` ids, short where that is possible.

        The best segmentation up to a forced piece boundary does not depend on what follows, and a
        space is such a boundary, because no piece has one after its first character. So a cut
        before a space is exact once the head has `max_ids` ids. A text without spaces stays whole;
        one megabyte takes about a tenth of a second.
        """
        if not self._space_is_boundary:
            return text
        return cut_before_space(text, max_ids, self._processor.encode)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; <s>, <pad>, </s> and <mask> are left out, <unk> reads " ⁇ ".

        Raises:
          UserError: an id outside [0, size).
        """
        silent = (self.bos_id, self.pad_id, self.eos_id, self.mask_id)
        pieces = [0 if i == self.unk_id else i - 1 for i in self.check_ids(ids) if i not in silent]
        return self._processor.decode(pieces)


def cut_before_space(text: str, max_ids: int, encode: Callable[[str], Sequence]) -> str:
    """The shortest beginning of `text` that was tried, ends before a space and has `max_ids` ids.

    The whole text if there is none. Exact where a space ends what `encode` looks at.
    """
    cut = max(CUT_ABOVE_CHARACTERS, 16 * max_ids)
    while cut < len(text):
        end = text.find(" ", cut)
        if end < 0:
            break
        if len(encode(text[:end])) >= max_ids:
            return text[:end]
        # Long runs of spaces or of unknown characters make few ids.
        cut = 2 * end
    return text


def _load_processor(model_bytes: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        if not model_bytes or not processor.LoadFromSerializedProto(model_bytes):
            raise ValueError("empty or unreadable")
    except Exception as error:
        size = f"{len(model_bytes)} bytes"
        raise UserError(
            f"{name} is not a SentencePiece model ({size}); give the path of a .model file"
        ) from error
    found = (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id())
    if found != (0, 1, 2, -1):
        raise UserError(
            f"{name} has unk, bos, eos, pad at {found}; the XLM-R layout needs (0, 1, 2, -1): "
            "train it with unk_id=0 bos_id=1 eos_id=2 pad_id=-1"
        )
    return processor


def train_vocabulary(
    texts: Iterable[str],
    path: str | os.PathLike,
    size: int = 16384,
    max_lines: int = 80_000,
    max_line_characters: int = 150,
) -> Vocabulary:
    """Trains a SentencePiece unigram model with the id layout of `Vocabulary` and stores it.

    The same texts in any order give the same file: lines are chosen by their hash. The default
    takes about 20 s on two cores; on the pip data twice as many, longer lines save 1 % of the
    tokens and cost three times as much. A prompt prefix is one token.

    Args:
      texts: any number of texts; distinct lines of them are sampled.
      path: the model file to write (atomically); its directory is created.
      size: number of ids, <mask> included, so `Vocabulary.load(path).size == size`.
      max_lines: at most this many lines are used.
      max_line_characters: longer lines are cut at the last space before this.

    Raises:
      UserError: too little text for the size, or a size too small for the characters in it.
    """
    path = storage.path(path)
    lines = _training_lines(texts, max_lines, max_line_characters)
    if not lines:
        raise UserError(f"no text to train the vocabulary {path} on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=size - 2,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            # Tens of scripts, some in a per mille of the lines: 0.9995 would double the unknowns.
            character_coverage=0.9998,
            byte_fallback=False,
            # With the mark of a word's start inside the symbol a prefix is one token, not two.
            user_defined_symbols=[
                WORD_START + prefix.strip() for prefix in (QUERY_PREFIX, DOCUMENT_PREFIX)
            ],
            # Fewer seeds and fewer, larger pruning steps than the library's defaults.
            seed_sentencepiece_size=6 * size,
            shrinking_factor=0.5,
            num_threads=2,  # another number may give a slightly different model
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"cannot train a vocabulary of {size} ids on {len(lines)} lines: "
            f"{_size_problem(str(error))}"
        ) from error
    vocabulary = Vocabulary(model.getvalue(), name=str(path))
    storage.write(path, vocabulary.model_bytes)
    return vocabulary


def _size_problem(message: str) -> str:
    """SentencePiece's complaint about the size, in our sizes (two more ids than pieces)."""
    if match := re.search(r"Vocabulary size too high .* <= (\d+)", message):
        return f"this text allows at most {int(match[1]) + 2}; choose that or give more text"
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"its characters alone need {int(match[1]) + 2}; choose a larger size"
    return message.strip().replace("\n", " ")


def _training_lines(texts: Iterable[str], max_lines: int, max_characters: int) -> list[str]:
    """Distinct stripped lines, the `max_lines` of lowest hash, in the order of the hash."""
    lines = {line.strip() for text in texts for line in clean_text(text).splitlines()}
    lines.discard("")
    # SentencePiece refuses NUL.
    lines = {line for line in lines if "\0" not in line}
    hashed = sorted(
        (hashlib.blake2b(line.encode("utf-8"), digest_size=8).digest(), line) for line in lines
    )
    return [_cut_at_space(line, max_characters) for _, line in hashed[:max_lines]]


def _cut_at_space(line: str, max_characters: int) -> str:
    if len(line) <= max_characters:
        return line
    end = line.rfind(" ", 0, max_characters)
    return line[: end if end > 0 else max_characters]
