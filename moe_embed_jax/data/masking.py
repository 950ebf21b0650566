"""What is hidden from the encoder: a pure function of (seed, step, row), whoever reads the row.

As BERT (arXiv 1810.04805): of the chosen tokens 80 % become <mask>, 10 % a random token, 10 % stay.
Specials and <unk> are never chosen, random tokens are never specials. A row hides its share of
tokens rounded up or down at random, so that a token is hidden with exactly the rate, and a row
never has more than `most_hidden`: arrays have one shape and there is no surplus to drop. (The
reference flips a coin per token: the same rate, but any number of them.)
"""

import dataclasses
import functools
import math

import numpy as np

from moe_embed_jax.errors import UserError
from moe_embed_jax.shapes import PADDING


def most_hidden(row_length: int, rate: float) -> int:
    """P: the most tokens that a row can hide."""
    return math.ceil(round(rate * row_length, 6))


@dataclasses.dataclass(frozen=True)
class Masking:
    """rate: share of the ordinary tokens that are chosen; mask_share, random_share: of those.

    ordinary: ids that may be chosen and that random tokens are drawn from. mask_id: <mask>.
    """

    rate: float
    mask_share: float
    random_share: float
    ordinary: np.ndarray
    mask_id: int

    @functools.cached_property
    def is_ordinary(self) -> np.ndarray:
        """bool by id, as far as there are ids."""
        size = max(int(self.ordinary.max()), self.mask_id) + 1
        return np.isin(np.arange(size), self.ordinary)

    def hide(self, token_L: np.ndarray, seed: int, step: int, row: int):
        """(token_L with tokens hidden, column_P, target_P) of row `row` of the batch of `step`.

        Columns ascend; where there are fewer than P, column is 0 and target -1. `token_L` is padded
        with a token that is not ordinary, and left as it is.
        """
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, step, row))))
        candidates = np.flatnonzero(self.is_ordinary[token_L])
        count = int(self.rate * len(candidates) + rng.random())
        count = min(count, most_hidden(len(token_L), self.rate))
        chosen = np.sort(rng.permutation(candidates)[:count])
        hidden_L = token_L.copy()
        kind = rng.random(count)
        hidden_L[chosen[kind < self.mask_share]] = self.mask_id
        is_random = (kind >= self.mask_share) & (kind < self.mask_share + self.random_share)
        hidden_L[chosen[is_random]] = rng.choice(self.ordinary, is_random.sum())
        column_P = np.zeros(most_hidden(len(token_L), self.rate), np.int32)
        target_P = np.full(column_P.shape, PADDING, np.int32)
        column_P[:count], target_P[:count] = chosen, token_L[chosen]
        return hidden_L, column_P, target_P


def make_masking(vocabulary, rate: float, mask_share: float, random_share: float) -> Masking:
    """For the ids of `vocabulary`. Raises `UserError` if it has no <mask>."""
    if vocabulary.mask_id is None:
        raise UserError(
            "the tokenizer has no mask token: a masked language model needs one (<mask>, [MASK])"
        )
    return Masking(rate, mask_share, random_share, ordinary_ids(vocabulary), vocabulary.mask_id)


def ordinary_ids(vocabulary) -> np.ndarray:
    """All ids but the specials' and <unk>'s."""
    names = ("bos_id", "eos_id", "pad_id", "unk_id", "mask_id")
    specials = [getattr(vocabulary, name) for name in names]
    return np.setdiff1d(np.arange(vocabulary.size), [i for i in specials if i is not None])
