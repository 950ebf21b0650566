"""The data of a training run, as configs state them. Imports no jax.

Which files they mean is in data_spec.py. The content of a file or folder that a free field names
is part of the data spec, which a resumed run must match.
"""

import dataclasses

from moe_embed_jax.config import FREE, FREE_IF_DROPLESS, setting
from moe_embed_jax.errors import UserError

MAX_BUCKETS = 4  # row counts, hence compilations, per run


@dataclasses.dataclass(frozen=True)
class VocabularyConfig:
    """`file`: an XLM-R style SentencePiece model or a tokenizer.json at `path`; `train`: a unigram
    model of `size` ids trained on the corpus."""

    kind: str = "file"
    path: str = setting("", FREE)
    size: int = 0

    def __post_init__(self):
        if self.kind not in ("file", "train"):
            raise UserError(f"data.vocabulary.kind={self.kind!r}: choose 'file' or 'train'")

    def preparation(self) -> dict:
        """As arguments of preparation.tokenize."""
        key = {"train": "size", "file": "path"}[self.kind]
        return {"kind": self.kind, key: getattr(self, key)}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    mixture: str = "package_texts"
    # A folder of pairs made by launch/prepare.py, or by filtering and mining: trained on in place
    # of `mixture`; its sources are the tasks.
    pairs: str = setting("", FREE)
    # The work folder (OUTPUT.work) of launch/filter.py or launch/mine.py on these pairs, with the
    # vectors of their teacher, for loss.distillation.
    teacher: str = setting("", FREE)
    negatives: int = 0  # hard negatives of a pair, at most: the first of those it has
    dir: str = setting("runs/data", FREE)  # prepared data, shared by runs
    # Folder on a disk of this machine, to which the token store is copied first. "": it is read
    # where it is, which is slow for a `dir` in a bucket.
    cache_dir: str = setting("", FREE)
    # Folder with the pinned wheels, where there is no network.
    wheels_dir: str = setting("", FREE)
    vocabulary: VocabularyConfig = dataclasses.field(default_factory=VocabularyConfig)
    query_length: int = 32  # tokens, specials and prefix included
    document_length: int = 256
    # Of the mixture's tasks; tasks that are not named are left out. None: proportional to rows.
    rates: dict[str, float] | None = None
    language_exponent: float = 1.0  # languages of a task are drawn ~ rows**exponent
    row_length: int = 256  # token slots per packed row, at least the longest text
    texts_per_row: int = 32  # most texts that share a row
    # Rows that a device encodes at a time (GradCache): memory for activations of one chunk only, at
    # the price of a second forward pass; the numbers are the same. 0: all rows at once.
    chunk_rows: int = setting(0, FREE_IF_DROPLESS)
    # Row counts that batches may have, at most MAX_BUCKETS: each is a compilation, and few waste
    # slots. 0: MAX_BUCKETS, but 1 in a run of fewer than 1,000 steps on a TPU or GPU.
    row_buckets: int = setting(0, FREE_IF_DROPLESS)

    def __post_init__(self):
        if not 0 <= self.row_buckets <= MAX_BUCKETS:
            raise UserError(
                f"data.row_buckets={self.row_buckets} must be 0 (automatic) to {MAX_BUCKETS}"
            )

    def preparation(self) -> dict:
        """What decides the content of the token store (arguments of preparation.tokenize)."""
        return {
            **({"pairs": self.pairs} if self.pairs else {"mixture": self.mixture}),
            "vocabulary": self.vocabulary.preparation(),
            "query_length": self.query_length,
            "document_length": self.document_length,
            "rates": None,  # every task is tokenised; a run's own rates need no new store
        }

    def order(self) -> dict:
        """What decides the batches beside the content of the token store."""
        negatives = {"negatives": self.negatives} if self.negatives else {}
        return {"language_exponent": self.language_exponent, "rates": self.rates, **negatives}


@dataclasses.dataclass(frozen=True)
class MaskedDataConfig:
    """Documents, in rows of one language each."""

    documents: str = "package_documents"  # of the default wheels
    # A folder made by launch/prepare.py (format "texts", or pairs: a query and its document are one
    # text): trained on in place of `documents`.
    texts: str = setting("", FREE)
    dir: str = setting("runs/data", FREE)  # prepared data, shared by runs
    # Folder on a disk of this machine, to which the token store is copied first. "": it is read
    # where it is, which is slow for a `dir` in a bucket.
    cache_dir: str = setting("", FREE)
    # Folder with the pinned wheels, where there is no network.
    wheels_dir: str = setting("", FREE)
    vocabulary: VocabularyConfig = dataclasses.field(default_factory=VocabularyConfig)
    language_exponent: float = 0.3  # languages are drawn ~ rows**exponent
    one_language: bool = True  # every batch is of one language; False: each holds all of them
    row_length: int = 2048  # token slots per row; longer documents continue in another row
    # True, as the reference: documents with <s> and </s> one after the other, cut into full rows;
    # attention crosses them. False: each document has its own attention and positions.
    across_documents: bool = False
    # Rows that a device encodes at a time: memory for activations of one chunk only, at the price
    # of a second forward pass; the numbers are the same. 0: all rows at once.
    chunk_rows: int = setting(0, FREE_IF_DROPLESS)

    def __post_init__(self):
        if self.row_length < 3:
            raise UserError(f"data.row_length={self.row_length} has no room for <s>, a token, </s>")

    def preparation(self) -> dict:
        """What decides the content of the token store (arguments of preparation.tokenize)."""
        return {
            "documents": self.documents,
            "texts": self.texts,
            "vocabulary": self.vocabulary.preparation(),
        }

    def order(self) -> dict:
        """What decides the batches beside the content of the token store."""
        keys = ("language_exponent", "one_language", "row_length", "across_documents")
        return {key: getattr(self, key) for key in keys}
