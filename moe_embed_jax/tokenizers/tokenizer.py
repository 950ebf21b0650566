"""What a tokenizer is to the rest of the package: texts to token ids, and back."""

import abc
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from moe_embed_jax.errors import UserError


class Tokenizer(abc.ABC):
    """Puts one special token before a text and one behind it.

    Attributes:
      size: number of ids (the highest id + 1).
      bos_id, eos_id: before and behind a text.
      pad_id: of the slots without a token.
      unk_id, mask_id: None for a tokenizer without such a token.
      content_hash: SHA-256 of what decides the ids, hexadecimal.
      model_bytes: the content of the file that gives the same tokenizer.
    """

    size: int
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int | None
    mask_id: int | None
    content_hash: str
    model_bytes: bytes

    @abc.abstractmethod
    def encode_batch(
        self, texts: Sequence[str | bytes], max_ids: int | None = None
    ) -> list[list[int]]:
        """The token ids of each text without special tokens, at most the first `max_ids`."""

    @abc.abstractmethod
    def head(self, text: str, max_ids: int) -> str:
        """A beginning of `text` with the same first `max_ids` ids, short where that is sure."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Raises `UserError` for an id outside [0, size)."""

    def encode(self, text: str | bytes, max_ids: int | None = None) -> list[int]:
        """`encode_batch` of one text."""
        return self.encode_batch([text], max_ids)[0]

    def encode_flat(
        self, texts: Sequence[str | bytes], max_ids: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`encode_batch` as arrays: ids of all texts, int32 [sum], and their lengths, int64 [N]."""
        rows = self.encode_batch(texts, max_ids)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter(itertools.chain.from_iterable(rows), np.int32, lengths.sum()), lengths

    def encode_text(self, text: str | bytes, max_length: int) -> np.ndarray:
        """int32 [<= max_length]: `bos_id`, the first `max_length - 2` ids, `eos_id`."""
        return self.encode_texts([text], max_length)[0]

    def encode_texts(self, texts: Sequence[str | bytes], max_length: int) -> list[np.ndarray]:
        """`encode_text` of each text."""
        return self._with_specials(self.encode_batch(texts, self._max_ids(max_length)))

    def encode_counted(
        self, texts: Sequence[str | bytes], max_length: int
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """`encode_texts`, and int64 [N]: how many tokens of each text were cut off.

        Texts that are too long are tokenised to their end for it.
        """
        max_ids = self._max_ids(max_length)
        rows = self.encode_batch(texts, max_ids + 1)
        cut_N = np.zeros(len(rows), np.int64)
        longer = [i for i, row in enumerate(rows) if len(row) > max_ids]
        for i, whole in zip(longer, self.encode_batch([texts[i] for i in longer]), strict=True):
            cut_N[i] = len(whole) - max_ids
        return self._with_specials([row[:max_ids] for row in rows]), cut_N

    def _max_ids(self, max_length: int) -> int:
        if max_length < 2:
            raise UserError(
                f"max_length {max_length} has no room for the two special tokens: give 2 or more"
            )
        return max_length - 2

    def _with_specials(self, rows: list[list[int]]) -> list[np.ndarray]:
        return [np.array([self.bos_id, *ids, self.eos_id], dtype=np.int32) for ids in rows]

    def check_ids(self, ids: Iterable[int]) -> list[int]:
        """`ids` as a list. Raises `UserError` for an id outside [0, size)."""
        ids = [int(i) for i in ids]
        outside = [i for i in ids if not 0 <= i < self.size]
        if outside:
            raise UserError(f"token id {outside[0]} is outside the vocabulary [0, {self.size})")
        return ids
