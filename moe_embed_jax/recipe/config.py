"""The config of a recipe; configs/recipe.py builds one."""

import ast
import dataclasses
import pathlib

from moe_embed_jax import config as config_files
from moe_embed_jax import storage
from moe_embed_jax.curation.consistency_rule import ConsistencyRule
from moe_embed_jax.curation.negatives_rule import NegativesRule
from moe_embed_jax.curation.teacher_config import TeacherConfig
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.merge_config import MergeConfig
from moe_embed_jax.losses.distillation_config import DistillationConfig
from moe_embed_jax.training.run_config import RUN_CONFIGS, Run

WHEEL_TEACHER = "wheel://multilingual-e5-small"
STAGES = ("stage1", "stage2", "stage3", "stage4")
MERGED = "merged"  # the folder of the model that step "merge" makes
# What the recipe itself gives to a stage: where the stage before left its output.
DATA = ("data.dir", "data.wheels_dir")
LATER = (*DATA, "data.pairs", "data.teacher", "init.source")
GIVEN = {"stage1": DATA, "stage2": LATER, "stage3": LATER, "stage4": LATER}
WANTED = {
    "data.texts": "a folder of documents, made by launch/prepare.py (format texts)",
    "init.source": "the model to start from",
}


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Where the pairs come from: `sources` or `mixture`."""

    sources: str = ""  # sources.json of launch/prepare.py, which reads raw files with Beam
    flags: str = ""  # further ones of launch/prepare.py, e.g. of Beam, separated by spaces
    mixture: str = ""  # "package_texts": the default data
    count: int = 0  # of it: pairs to draw; 0: all
    rates: dict[str, float] | None = None  # of its sources in the draw; None: by rows
    seed: int = 0  # of the draw

    def __post_init__(self):
        if bool(self.sources) == bool(self.mixture):
            has = "both are given" if self.sources else "both are empty"
            raise UserError(
                f"prepare.sources and prepare.mixture: {has}; give --config.prepare.sources=FILE, "
                "a sources.json that names your raw pairs (docs/curation.md), or "
                "--config.prepare.mixture=package_texts, the default data (as the variant :small)"
            )
        if self.mixture not in ("", "package_texts"):
            raise UserError(f"prepare.mixture={self.mixture!r}: there is package_texts")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of launch/train.py: its config file (with :variant), and what is changed of it."""

    config: str = ""
    set: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Filter(TeacherConfig, ConsistencyRule):
    """The flags of launch/filter.py."""

    def __post_init__(self):
        TeacherConfig.__post_init__(self)
        ConsistencyRule.__post_init__(self)


@dataclasses.dataclass(frozen=True)
class Mine(TeacherConfig, NegativesRule):
    """The flags of launch/mine.py, and its teacher."""

    pairs: str = ""  # a prepared folder to fine-tune on; "": the filtered pairs of stage 2
    teacher: str = "stage2"

    def __post_init__(self):
        TeacherConfig.__post_init__(self)
        NegativesRule.__post_init__(self)


@dataclasses.dataclass(frozen=True)
class Merge:
    """The last checkpoints of stage 3 become one model (launch/convert.py merge)."""

    checkpoints: int = 0  # how many, 0: none; stage3 must keep them (keep_checkpoints)
    method: str = MergeConfig.method

    def __post_init__(self):
        if self.checkpoints == 1 or self.checkpoints < 0:
            raise UserError(f"merge.checkpoints={self.checkpoints} must be 0 (off), or 2 or more")
        try:
            MergeConfig(self.method).shares(self.checkpoints or 2)
        except UserError as error:
            raise UserError(f"merge.method, merge.checkpoints: {error}") from None


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """beir: folders beside the held-out sets of the data, separated by commas. beside: work
    directory of another finished recipe, whose last model the report sets beside this one's."""

    beir: str = ""
    beside: str = ""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """teacher (also mine.teacher): a model folder, hf://OWNER/NAME, sentence-transformers:NAME,
    wheel://multilingual-e5-small, or a stage that is trained before ("stage1", "stage2"). Stages
    whose loss learns from a teacher's vectors get those of the step that made their pairs. stage4:
    from the merged model, or stage 3, on the pairs of stage 3; without a config there is none."""

    data_dir: str = "runs/data"  # prepared data, shared by runs
    wheels_dir: str = ""  # folder with the pinned wheels, where there is no network
    prepare: Prepare = dataclasses.field(default_factory=Prepare)
    stage1: Stage = dataclasses.field(default_factory=Stage)
    teacher: str = WHEEL_TEACHER
    filter: Filter = dataclasses.field(default_factory=Filter)
    stage2: Stage = dataclasses.field(default_factory=Stage)
    mine: Mine = dataclasses.field(default_factory=Mine)
    stage3: Stage = dataclasses.field(default_factory=Stage)
    merge: Merge = dataclasses.field(default_factory=Merge)
    stage4: Stage = dataclasses.field(default_factory=Stage)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)

    def __post_init__(self):
        for key, name, stages in (
            ("teacher", self.teacher, STAGES[:1]),
            ("mine.teacher", self.mine.teacher, STAGES[:2]),
        ):
            _check_teacher(key, name, stages)
        for name in STAGES:
            stage = getattr(self, name)
            if not stage.config and (name != "stage4" or stage.set):
                raise UserError(f"{name}.config is empty: give a config file of launch/train.py")

    @property
    def needs_wheel(self) -> bool:
        return WHEEL_TEACHER in (self.teacher, self.mine.teacher)


def _check_teacher(key: str, name: str, stages: tuple[str, ...]) -> None:
    if name in (WHEEL_TEACHER, *stages) or name.startswith(("hf://", "sentence-transformers:")):
        return
    if not storage.path(name).is_dir():
        raise UserError(
            f"{key}={name!r} is no model folder; others are hf://OWNER/NAME, "
            f"sentence-transformers:NAME, {WHEEL_TEACHER}, {', '.join(stages)}"
        )


def training_run(name: str, stage: Stage, given: dict, root: pathlib.Path) -> tuple[list[str], Run]:
    """(flags of launch/train.py, the config that they mean) of a stage.

    Args:
      given: what the recipe decides, "data.pairs" -> value; see `GIVEN`. "data.teacher" is left out
        where the stage learns from no vectors.
      root: config files that are not absolute lie below it.

    Raises:
      UserError: a key that the config does not know, that the recipe decides, or that the user
        has to give; names it as --config.STAGE.set.KEY.
    """
    path, colon, variant = stage.config.partition(":")
    file = pathlib.Path(path)
    spec = f"{file if file.is_absolute() else root / file}{colon}{variant}"
    where = f"--config.{name}.set."
    try:
        cls, stated = config_files.read_config_file(RUN_CONFIGS, spec)
        known = config_files.defaults(cls)
        changed = dict(_leaves(stage.set, known))
        for key, value in changed.items():
            if key in GIVEN[name]:
                raise UserError(f"{where}{key}: the recipe decides that; leave it out")
            if value == "":
                what = WANTED.get(key, "a value")
                raise UserError(f"{where}{key}=... is to be given: {what}")
        if not ("data.teacher" in given and _reads_teacher(stated, changed)):
            given = {key: value for key, value in given.items() if key != "data.teacher"}
        overrides = _texts(changed | given)
        config = config_files.load(RUN_CONFIGS, spec, overrides)
    except UserError as error:
        raise UserError(f"{name} ({stage.config}): {error}") from None
    flags = [f"--config.{key}={text}" for key, text in overrides.items()]
    return [f"--config={spec}", *flags], config


def _reads_teacher(stated: dict, changed: dict) -> bool:
    """Whether the loss of a stage learns from a teacher's vectors."""
    prefix = "loss.distillation."
    distillation = dict(dict(stated.get("loss", {})).get("distillation", {}))
    distillation |= {k[len(prefix) :]: v for k, v in changed.items() if k.startswith(prefix)}
    return config_files.build(DistillationConfig, distillation, "loss.distillation").reads_vectors


def _leaves(section, known, prefix: str = ""):
    """("data.row_length", value) of every value; a table such as `loss.dims` is one."""
    for key, value in dict(section).items():
        inner = known.get(key) if isinstance(known, dict) else None
        if hasattr(value, "items") and (isinstance(inner, dict) or key not in known):
            yield from _leaves(value, inner or {}, f"{prefix}{key}.")
        else:
            yield prefix + key, dict(value) if hasattr(value, "items") else value


def _texts(values: dict) -> dict[str, str]:
    """As the command line has them: Python literals, strings bare where they stay strings."""
    return {key: _text(value) for key, value in values.items()}


def _text(value) -> str:
    if not isinstance(value, str):
        return repr(value)
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return repr(value)
