"""The config of a training run. Every file in configs/ builds one of these dataclasses.

`RunConfig` is a contrastive run (stages 2 and 3). `MaskedRunConfig` is masked language modelling
(stage 1), which a config file asks for by `objective = "masked_lm"`. Every default stands here, or
in the dataclass of its section, and nowhere else: a config file states what differs.

No module that this one imports imports jax: a mistake in a config is reported at once. `setting`
marks the fields that a resumed run may change. The content of a file or folder that a free field
names is part of the data spec, which a resumed run must match (training/workdir.py).
"""

import dataclasses

from moe_embed_jax.config import FREE, setting
from moe_embed_jax.data.data_config import DataConfig, MaskedDataConfig
from moe_embed_jax.errors import UserError
from moe_embed_jax.losses import MASKED_LM
from moe_embed_jax.losses.contrast_config import ContrastConfig
from moe_embed_jax.losses.distillation_config import DistillationConfig
from moe_embed_jax.mesh_config import MeshConfig
from moe_embed_jax.models.encoder_config import EncoderConfig
from moe_embed_jax.models.upcycle_config import MODES as UPCYCLE_MODES
from moe_embed_jax.models.upcycle_config import UpcycleConfig

SCHEDULES = ("cosine", "linear", "inverse_sqrt", "constant")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Start from a model folder instead of random numbers; it decides `model` and the vocabulary
    (see training/init.py)."""

    source: str = ""  # a run's work directory, an imported or published model, hf://OWNER/NAME
    # Of a published BERT or XLM-RoBERTa: "learned" keeps its position table; "rotary" drops it,
    # which needs training to be good for anything (paper 4.1).
    positions: str = "learned"
    upcycle: str = ""  # "paper" or "preserving": make `model`'s experts of a dense source
    noise: float = UpcycleConfig.noise  # added to the experts, relative to their weights
    required: bool = False  # no run without a source: this stage continues another

    def __post_init__(self):
        if self.positions not in ("learned", "rotary"):
            raise UserError(f"init.positions={self.positions!r}: choose 'learned' or 'rotary'")
        if self.upcycle not in ("", *UPCYCLE_MODES):
            raise UserError(
                f"init.upcycle={self.upcycle!r}: choose 'paper', 'preserving' or '' (as it is)"
            )
        if self.upcycle and not self.source:
            raise UserError(f"init.upcycle={self.upcycle!r} needs init.source, the dense model")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    peak_learning_rate: float = 8e-5
    schedule: str = "cosine"  # after the warm-up; cosine and linear end at 0 at the last step
    warmup_steps: int = 1000  # linear from 0
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01  # matrices only, see `decay_mask`
    clip_norm: float = 1.0  # of the global gradient
    # Routers keep their start. Models that are trained from one start with it can be merged: their
    # experts stay the same tokens' (`launch/convert.py merge`).
    freeze_router: bool = False

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(f"optimizer.schedule={self.schedule!r}: choose from {SCHEDULES}")


@dataclasses.dataclass(frozen=True)
class LossConfig(ContrastConfig):
    """The contrastive loss, and that of the routers.

    balance: coefficient of the load-balancing loss (perfect balance = 1).
    balance_over: what is to be balanced: the whole "batch", or the part of each "device", whose
      losses are averaged (the reference code; it forces every expert on every device, and depends
      on how many there are).
    distillation: what is learned from a teacher, see `DistillationConfig`.
    """

    balance: float = 1.0
    balance_over: str = "batch"
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.balance_over not in ("batch", "device"):
            raise UserError(f"loss.balance_over={self.balance_over!r}: choose 'batch' or 'device'")
        if self.quantisation and not self.distillation.contrast:
            raise UserError(
                "loss.quantisation is of the contrastive loss, and loss.distillation.contrast=0 "
                "leaves that out: give contrast a weight, or no quantisation"
            )

    @property
    def is_full(self) -> bool:
        """Whether the loss reads what a `FullPairBatch` has more than a `PairBatch`."""
        return self.distillation.is_on or bool(self.hard_negatives_only)


@dataclasses.dataclass(frozen=True)
class MaskedLossConfig:
    """Which tokens are masked, and how the loss is computed."""

    mask_rate: float = 0.3  # share of the tokens of a row that are predicted
    mask_share: float = 0.8  # of those: replaced by <mask>
    random_share: float = 0.1  # of those: replaced by a random token; the rest stays as it is
    # Predictions of a device that have logits at a time: memory is this times the vocabulary. No
    # effect on TPUs, whose kernel writes no logits.
    predictions_at_once: int = setting(1024, FREE)
    balance: float = 1.0  # coefficient of the load-balancing loss, where the model has experts

    def __post_init__(self):
        if not 0 < self.mask_rate < 1:
            raise UserError(f"loss.mask_rate={self.mask_rate} must be between 0 and 1")
        shares = (self.mask_share, self.random_share, 1 - self.mask_share - self.random_share)
        if min(shares) < -1e-9:
            raise UserError(
                f"loss.mask_share={self.mask_share} and loss.random_share={self.random_share} must "
                "be at least 0 and add up to at most 1"
            )
        if self.predictions_at_once < 1:
            raise UserError(
                f"loss.predictions_at_once={self.predictions_at_once} must be 1 or more"
            )


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """When a collapsed router stops the run. Numbers that are not finite always do."""

    stop_on_collapse: bool = setting(True, FREE)
    # Below this spread (0: all tokens to the same experts, 1: all experts equally) a router has
    # collapsed. configs/quickstart.py never has less than 0.99; its first batch alone has 0.41.
    least_spread: float = setting(0.1, FREE)
    # Steps after the warm-up over which loads are averaged. No router is judged before that many
    # steps. Random routers may start narrow (0.27 was seen in an upcycled model).
    window: int = setting(50, FREE)

    def __post_init__(self):
        if not 0 <= self.least_spread < 1:
            raise UserError(
                f"health.least_spread={self.least_spread} must be at least 0 and below 1; "
                "health.stop_on_collapse=False turns it off"
            )
        if self.window < 1:
            raise UserError(f"health.window={self.window} must be at least 1 step")


@dataclasses.dataclass(frozen=True)
class Run:
    """What all runs have. `objective` says which of the classes it is; other keys depend on it."""

    objective: str = ""
    seed: int = 0
    batch_size: int = 16_384  # pairs (masked language modelling: rows) per step over all devices
    steps: int = 1000
    log_every: int = setting(10, FREE)
    eval_every: int = setting(1000, FREE)  # on held-out data; 0: only at the start and the end
    eval_languages: int = setting(8, FREE)  # of the periodic evaluation (the final one takes all)
    checkpoint_every: int = setting(1000, FREE)
    keep_checkpoints: int = setting(2, FREE)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    model: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    health: HealthConfig = dataclasses.field(default_factory=HealthConfig)

    def __post_init__(self):
        own = type(self).objective
        if self.objective != own:
            raise UserError(
                f"objective={self.objective!r}: this config is {own!r}; take a config file of the "
                "other objective"
            )
        if self.data.chunk_rows < 0:
            raise UserError(f"data.chunk_rows={self.data.chunk_rows} must be 0 (off) or more")
        if self.init.required and not self.init.source:
            raise UserError(
                "init.source is empty, and this config trains a model further: give "
                "--config.init.source=MODEL, the work directory of a run (of the stage before), "
                "an imported or published model folder, or hf://OWNER/NAME"
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


@dataclasses.dataclass(frozen=True)
class RunConfig(Run):
    """A contrastive run."""

    objective: str = "contrastive"
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.data.negatives < 0:
            raise UserError(f"data.negatives={self.data.negatives} must be 0 (none) or more")
        if self.data.negatives and not self.data.pairs:
            raise UserError(
                f"data.pairs is empty, and data.negatives={self.data.negatives} needs data.pairs: "
                "give --config.data.pairs=FOLDER, pairs with hard negatives (made by "
                "launch/mine.py, or launch/prepare.py from triplets); --config.data.negatives=0 "
                "uses none"
            )
        distillation, data = self.loss.distillation, self.data
        if distillation.reads_vectors and not data.teacher:
            raise UserError(
                "data.teacher is empty, and loss.distillation learns from vectors: give "
                "--config.data.teacher=OUTPUT.work, the work folder of launch/filter.py or "
                "launch/mine.py"
            )
        if data.teacher and not distillation.reads_vectors:
            raise UserError(
                f"data.teacher={data.teacher}, and loss.distillation reads no vectors: give "
                "--config.loss.distillation.vectors=1 or batch_scores=1, or leave data.teacher out"
            )
        if self.loss.hard_negatives_only and not data.negatives:
            raise UserError(
                f"loss.hard_negatives_only={self.loss.hard_negatives_only!r} and data.negatives=0: "
                "these sources would have nothing to be told apart from; give data.negatives"
            )
        if distillation.scores and not data.negatives:
            raise UserError(
                f"loss.distillation.scores={distillation.scores:g} and data.negatives=0: a "
                "teacher's scores are of a query's own document and its hard negatives; give "
                "data.pairs with hard negatives, and data.negatives"
            )
        if self.batch_size == 1 and not self.data.negatives:
            raise UserError(
                "batch_size=1 and data.negatives=0: a query has nothing to be told apart from, so "
                "the loss is always 0; give --config.batch_size=2 or more, or hard negatives"
            )


@dataclasses.dataclass(frozen=True)
class MaskedInitConfig(InitConfig):
    """`InitConfig` with the paper's start: XLM-RoBERTa without its position table."""

    positions: str = "rotary"


@dataclasses.dataclass(frozen=True)
class MaskedRunConfig(Run):
    """A run of masked language modelling; `batch_size` counts rows."""

    objective: str = MASKED_LM
    init: MaskedInitConfig = dataclasses.field(default_factory=MaskedInitConfig)
    data: MaskedDataConfig = dataclasses.field(default_factory=MaskedDataConfig)
    loss: MaskedLossConfig = dataclasses.field(default_factory=MaskedLossConfig)

    def __post_init__(self):
        super().__post_init__()
        limit = self.model.max_positions
        if limit and limit < self.data.row_length:
            raise UserError(
                f"data.row_length={self.data.row_length} is more than the {limit} positions of the "
                "model: use shorter rows, or init.positions='rotary'"
            )


RUN_CONFIGS = {cls.objective: cls for cls in (RunConfig, MaskedRunConfig)}
