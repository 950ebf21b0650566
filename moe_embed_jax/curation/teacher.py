"""The encoder that filters pairs and mines negatives: ours, or one of sentence-transformers."""

import functools
import hashlib
import json
import pathlib
from typing import Protocol

import jax
import numpy as np

from moe_embed_jax import storage, triton_first
from moe_embed_jax.embedder import Embedder
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.source import EXTERNAL
from moe_embed_jax.tokenizers.files import XLMR_FILE
from moe_embed_jax.tokenizers.truncation import Truncation, count, side_of
from moe_embed_jax.tokenizers.vocabulary import clean_text


class Teacher(Protocol):
    """What `load_teacher` gives: `Embedder` is one.

    Attributes:
      truncation: how many texts and tokens were cut, of each side.
    """

    truncation: Truncation

    def encode(self, texts: list[str], prompt: str | None) -> np.ndarray:
        """float32 [len(texts), D] of unit norm."""

    def identity(self, prompt: str | None) -> dict:
        """Whatever decides those embeddings."""

    def text_form(self, prompt: str | None) -> dict:
        """{"prefix", "max_length"} of texts with this prompt."""

    @property
    def has_prompts(self) -> bool:
        """Whether the model says what its prompts are."""


def load_teacher(name: str, mesh: jax.sharding.Mesh, weights: str = "float32") -> Teacher:
    """A model by the name that launch/filter.py and launch/mine.py take.

    Args:
      name: anything `Embedder.load` takes (a run, an import, a published checkpoint); or
        "sentence-transformers:" and a folder or a name on its hub, run by PyTorch, for models that
        `Embedder` cannot load.
      mesh: devices of an `Embedder`. weights: as of `Embedder.load`.

    Raises:
      UserError: no such model, or a folder without a tokenizer that sentence-transformers reads;
        sentence-transformers is wanted and not installed, or wanted with other weights.
    """
    if not name.startswith(EXTERNAL):
        return Embedder.load(name, mesh=mesh, weights=weights)
    if weights != "float32":
        raise UserError(f"--weights={weights}: PyTorch runs {name}: leave it out")
    return SentenceTransformerTeacher(name.removeprefix(EXTERNAL))


class SentenceTransformerTeacher:
    """A model that sentence-transformers loads and runs, on whatever device PyTorch finds."""

    def __init__(self, name: str):
        if storage.is_remote(name):
            raise UserError(
                f"{EXTERNAL}{name}: PyTorch reads no bucket: copy the folder to a disk, or name it "
                f"without '{EXTERNAL}'"
            )
        triton_first.before_torch()
        try:
            import torch
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise UserError(
                f"the teacher {EXTERNAL}{name} needs sentence-transformers, which is not "
                f"installed ({error}): pip install -e .[pytorch]"
            ) from None
        refuse_without_tokenizer(storage.path(name))
        try:
            # What a checkpoint lacks (often a pooler that nobody reads) is drawn: always the same,
            # or the model would have another identity each time.
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self._model = SentenceTransformer(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the teacher {EXTERNAL}{name} cannot be loaded: {reason}") from None
        self.truncation = Truncation()

    def encode(self, texts: list[str], prompt: str | None) -> np.ndarray:
        if not texts:
            return self._no_vectors
        texts = [clean_text(text) for text in texts]  # tokenizers take no half of a surrogate pair
        self._count_truncated(texts, prompt)
        return self._model.encode(
            texts,
            prompt=self._prefix(prompt),
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        ).astype(np.float32)

    @functools.cached_property
    def _counting_tokenizer(self):
        """Of the tokenizers library, for whole texts; None: the model has another kind."""
        tokenizer = getattr(self._model.tokenizer, "backend_tokenizer", None)
        if tokenizer is None:
            return None
        tokenizer = type(tokenizer).from_str(tokenizer.to_str())  # the model's own stays as it is
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _count_truncated(self, texts: list[str], prompt: str | None) -> None:
        """Models without a tokenizer of the tokenizers library are not counted."""
        tokenizer, limit = self._counting_tokenizer, self._model.max_seq_length
        if tokenizer is None or limit is None:
            return
        prefix = self._prefix(prompt)
        lengths = [len(e) for e in tokenizer.encode_batch_fast([prefix + text for text in texts])]
        length_N = np.array(lengths, np.int64)
        side = side_of(prompt)
        self.truncation.add(side, limit, count(length_N.sum(), np.maximum(length_N - limit, 0)))
        self.truncation.tell(side)

    def identity(self, prompt: str | None) -> dict:
        return {"hash": self._hash, **self.text_form(prompt)}

    def text_form(self, prompt: str | None) -> dict:
        """As `Embedder.text_form`."""
        return {"prefix": self._prefix(prompt), "max_length": self._model.max_seq_length}

    @property
    def has_prompts(self) -> bool:
        """As `Embedder.has_prompts`."""
        return any(self._model.prompts.values())

    @functools.cached_property
    def _no_vectors(self) -> np.ndarray:
        """[0, D]; by a text, because the method that tells the width changed its name."""
        return self.encode([""], None)[:0]

    @functools.cached_property
    def _hash(self) -> str:
        sha256 = hashlib.sha256(repr(self._model).encode())
        tokenizer = getattr(self._model.tokenizer, "backend_tokenizer", None)
        if tokenizer:
            described = json.loads(tokenizer.to_str())
            # These two are of the last call, not of the tokenizer.
            del described["truncation"], described["padding"]
            sha256.update(json.dumps(described, sort_keys=True).encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha256.update(tensor.detach().cpu().contiguous().flatten().view(_uint8()).numpy())
        return sha256.hexdigest()

    def _prefix(self, prompt: str | None) -> str:
        """As `Embedder.prefix`; "document" is also called "passage" or "corpus" by models."""
        if prompt is None:
            return ""
        names = ["document", "passage", "corpus"] if prompt == "document" else [prompt]
        for name in names:
            if self._model.prompts.get(name):
                return self._model.prompts[name]
        if prompt in ("query", "document"):
            return ""
        if ":" in prompt or " " in prompt:
            return prompt
        raise UserError(
            f"prompt={prompt!r}: choose one of {', '.join(sorted(self._model.prompts))}, none, or "
            "a prefix with a colon or a space"
        )


def _uint8():
    import torch

    return torch.uint8


def refuse_without_tokenizer(folder: pathlib.Path) -> None:
    """Raises `UserError` for a folder with XLM-R's pieces that does not say that they are its
    tokenizer: transformers takes one by the model's type, another one for a BERT, and says
    nothing."""
    known = ("tokenizer.json", "tokenizer_config.json")
    if storage.has_entry(folder / XLMR_FILE) and not any(
        (folder / name).is_file() for name in known
    ):
        raise UserError(
            f"{folder} has {XLMR_FILE}, but neither {' nor '.join(known)}: sentence-transformers "
            "would guess a tokenizer. Save one of them there, or name the folder without "
            f"'{EXTERNAL}'"
        )
