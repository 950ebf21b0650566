"""The page of a training run: every config file in configs/ builds one of these."""

import dataclasses

from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.upcycle import RULES as UPCYCLE_RULES
from moe_embed_jax.mesh import MeshConfig
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.training.health import HealthConfig
from moe_embed_jax.training.optimizer import OptimizerConfig
from moe_embed_jax.training.step import LossConfig


@dataclasses.dataclass(frozen=True)
class VocabularyConfig:
    """`file`: an XLM-R style SentencePiece model or a tokenizer.json at `path`; `train`: a unigram
    model of `size` ids trained on the corpus."""

    kind: str = "file"
    path: str = ""
    size: int = 0

    def __post_init__(self):
        if self.kind not in ("file", "train"):
            raise UserError(f"data.vocabulary.kind={self.kind!r}: choose 'file' or 'train'")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    mixture: str = "package_texts"
    # A folder of pairs made by launch/prepare.py, or by filtering and mining: trained on in place
    # of `mixture`; its sources are the tasks.
    pairs: str = ""
    negatives: int = 0  # hard negatives of a pair, at most: the first of those it has
    dir: str = "runs/data"  # prepared data, shared by runs
    wheels_dir: str = ""  # folder with the pinned wheels, where there is no network
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
    chunk_rows: int = 0

    def preparation(self) -> dict:
        """What decides the content of the token store (arguments of data.prepare)."""
        key = {"train": "size", "file": "path"}[self.vocabulary.kind]
        return {
            **({"pairs": self.pairs} if self.pairs else {"mixture": self.mixture}),
            "vocabulary": {"kind": self.vocabulary.kind, key: getattr(self.vocabulary, key)},
            "query_length": self.query_length,
            "document_length": self.document_length,
            "rates": None,  # every task is tokenised; a run's own rates need no new store
        }


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Start from a model folder instead of random numbers; it decides `model` and the vocabulary
    (see training/init.py)."""

    source: str = ""  # a run's work directory, an imported or published model, hf://OWNER/NAME
    upcycle: str = ""  # "paper" or "preserving": make `model`'s experts of a dense source
    noise: float = 0.0  # added to the experts, relative to their weights
    required: bool = False  # a stage that goes on from another: no run without a source

    def __post_init__(self):
        if self.upcycle not in ("", *UPCYCLE_RULES):
            raise UserError(
                f"init.upcycle={self.upcycle!r}: choose 'paper', 'preserving' or '' (as it is)"
            )
        if self.upcycle and not self.source:
            raise UserError(f"init.upcycle={self.upcycle!r} needs init.source, the dense model")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    seed: int = 0
    batch_size: int = 16_384  # pairs per step over all devices
    steps: int = 1000
    log_every: int = 10
    eval_every: int = 1000  # retrieval on held-out data; 0: only at the end
    eval_languages: int = 8  # of the periodic evaluation (the final one takes all)
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    model: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    health: HealthConfig = dataclasses.field(default_factory=HealthConfig)

    def __post_init__(self):
        if self.data.chunk_rows < 0:
            raise UserError(f"data.chunk_rows={self.data.chunk_rows} must be 0 (off) or more")
        if self.init.required and not self.init.source:
            raise UserError(
                "init.source is empty, and this config trains a model further: give "
                "--config.init.source=MODEL, the work directory of a run (of the stage before), "
                "an imported or published model folder, or hf://OWNER/NAME"
            )
        if self.data.negatives < 0:
            raise UserError(f"data.negatives={self.data.negatives} must be 0 (none) or more")
        if self.data.negatives and not self.data.pairs:
            raise UserError(
                f"data.pairs is empty, and data.negatives={self.data.negatives} needs data.pairs: "
                "give --config.data.pairs=FOLDER, pairs with hard negatives (made by "
                "launch/mine.py, or launch/prepare.py from triplets); --config.data.negatives=0 "
                "uses none"
            )
        vocabulary = self.data.vocabulary
        if vocabulary.kind == "file" and not vocabulary.path and not self.init.source:
            raise UserError(
                "data.vocabulary.path is empty: give the sentencepiece.bpe.model of XLM-RoBERTa "
                "(FacebookAI/xlm-roberta-base on the Hugging Face hub), use kind='train', or start "
                "from a model (init.source), which brings its own"
            )
        for name in ("batch_size", "steps", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
