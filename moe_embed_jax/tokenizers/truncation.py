"""What was cut off: how many texts are longer than a model reads, and how many of their tokens."""

import dataclasses
import sys
from collections.abc import Sequence

import jax
import numpy as np

from moe_embed_jax.errors import UserError
from moe_embed_jax.processes import summed_over, tokenized_together
from moe_embed_jax.tokenizers.tokenizer import Tokenizer

CHOICES = ("warn", "error", "ignore")  # `on_truncation` of `Embedder.encode`


@dataclasses.dataclass
class Counts:
    """Of the texts of one side. Tokens include the special ones."""

    max_length: int
    texts: int = 0
    tokens: int = 0  # of the whole texts
    cut_texts: int = 0
    cut_tokens: int = 0

    def add(self, texts: int, tokens: int, cut_texts: int, cut_tokens: int) -> None:
        self.texts += texts
        self.tokens += tokens
        self.cut_texts += cut_texts
        self.cut_tokens += cut_tokens

    def __str__(self) -> str:
        if not self.cut_texts:
            return f"none of {self.texts:,} texts is longer than {self.max_length} tokens"
        return (
            f"{self.cut_texts:,} of {self.texts:,} texts are longer than {self.max_length} tokens: "
            f"{self.cut_tokens:,} of {self.tokens:,} tokens "
            f"({self.cut_tokens / self.tokens:.1%}) are cut off"
        )


def side_of(prompt: str | None) -> str:
    """Whose length and counts a prompt has: "query" its own, all others those of "document"."""
    return "query" if prompt == "query" else "document"


def count(tokens: int, cut_N: np.ndarray) -> np.ndarray:
    """int64 [4], the arguments of `Counts.add`: of N texts with `tokens` in all, `cut_N` cut."""
    return np.array([len(cut_N), tokens, np.count_nonzero(cut_N), cut_N.sum()], np.int64)


class Truncation:
    """Counts by side ("query", "document"), and whether a reader was told of each.

    Attributes:
      tells: whether `tell` prints; a launcher that prints the counts at its end sets False.
    """

    def __init__(self) -> None:
        self.sides: dict[str, Counts] = {}
        self.tells = True
        self._told: set[str] = set()

    def tokenize(
        self,
        tokenizer: Tokenizer,
        texts: list[str],
        side: str,
        max_length: int,
        mesh: jax.sharding.Mesh,
        on_truncation: str,
    ) -> list[np.ndarray]:
        """`tokenizer.encode_texts(texts, max_length)`; on a mesh of several processes each takes
        its share, see `tokenized_together`.

        Args:
          on_truncation: one of CHOICES, see `Embedder.encode`.

        Raises:
          UserError: another choice; "error" and a text that is too long.
        """
        if on_truncation not in CHOICES:
            raise UserError(f"on_truncation={on_truncation!r}: choose one of {', '.join(CHOICES)}")
        if on_truncation == "ignore":
            return tokenized_together(
                texts, lambda share: tokenizer.encode_texts(share, max_length), mesh
            )
        kept, cut_N = [], np.zeros(0, np.int64)

        def tokenize(share):
            nonlocal kept, cut_N
            kept, cut_N = tokenizer.encode_counted(share, max_length)
            return kept

        sequences = tokenized_together(texts, tokenize, mesh)
        counts = summed_over(mesh, count(sum(map(len, kept)) + cut_N.sum(), cut_N))
        if on_truncation == "error" and counts[2]:
            which = f" (the first is texts[{np.flatnonzero(cut_N)[0]}])" if cut_N.any() else ""
            which *= len(kept) == len(texts)  # a share's numbers would be others
            raise UserError(f"{side}: {Counts(max_length, *counts.tolist())}{which}: shorten them")
        self.add(side, max_length, counts)
        if jax.process_index() == 0:
            self.tell(side)
        return sequences

    def add(self, side: str, max_length: int, counts: Sequence[int]) -> None:
        """`counts`: as the arguments of `Counts.add`."""
        self.sides.setdefault(side, Counts(max_length)).add(*map(int, counts))

    def tell(self, side: str) -> None:
        """Prints one line, once, as soon as a text of `side` was cut."""
        if self.tells and side not in self._told and self.sides[side].cut_texts:
            self._told.add(side)
            print(f"warning: {side}: {self.sides[side]}", file=sys.stderr, flush=True)

    def lines(self) -> list[str]:
        return [f"{side}: {counts}" for side, counts in self.sides.items()]
