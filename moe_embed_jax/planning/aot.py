"""Compiles a step for a topology, ahead of time, and says what the compiler thinks of it."""

import dataclasses
import os
import time

import jax

from moe_embed_jax import storage
from moe_embed_jax.mesh import IN_SLICE, describe, make_mesh
from moe_embed_jax.planning import memory, roofline
from moe_embed_jax.planning.cards import Card
from moe_embed_jax.planning.chips import Chip
from moe_embed_jax.planning.cost import Cost, module_cost
from moe_embed_jax.planning.gpu_cost import gpu_module_cost
from moe_embed_jax.planning.gpu_target import compiler_options
from moe_embed_jax.planning.hlo import parse_module
from moe_embed_jax.planning.memory import Memory, OutOfMemory
from moe_embed_jax.planning.request import Assumptions
from moe_embed_jax.planning.roofline import Times
from moe_embed_jax.planning.steps import Step, make_step
from moe_embed_jax.training import init
from moe_embed_jax.training.run_config import Run


@dataclasses.dataclass(frozen=True)
class Plan:
    """The prediction for one step. `memory`, `cost`, `times` are None where `exhausted` is not."""

    config: Run
    topology: str
    chip: Chip | Card
    mesh: str
    mesh_shape: tuple[int, ...]  # data, fsdp, expert, in each slice
    chips: int
    step_name: str
    step: Step
    compile_seconds: float
    memory: Memory | None = None
    cost: Cost | None = None
    times: Times | None = None
    exhausted: OutOfMemory | None = None

    @property
    def is_gpu(self) -> bool:
        return isinstance(self.chip, Card)

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.total <= self.chip.hbm_bytes

    @property
    def hbm_bytes(self) -> int | None:
        """Per chip; for what does not compile, what the compiler says it needs."""
        if self.memory is not None:
            return self.memory.total
        return self.exhausted.needed if self.exhausted.space == "hbm" else None

    @property
    def model_flops(self) -> float:
        """Per chip."""
        return self.step.model_flops / self.chips

    @property
    def mfu(self) -> float | None:
        """Of all token slots; times `step.real_share` for real tokens."""
        if self.times is None:
            return None
        return self.model_flops / self.times.step_seconds / self.chip.peak_flops

    @property
    def advice(self) -> list[str]:
        if self.fits:
            return []
        dominant = None
        if self.memory is not None:
            kinds = self.memory.by_kind()
            dominant = max(kinds, key=kinds.get)
        space = "hbm" if self.exhausted is None else self.exhausted.space
        return memory.advice(self.config, self.step_name, space, dominant)


def compile_plan(
    config: Run,
    topology: str,
    chip: Chip | Card,
    devices: list,
    step_name: str,
    assumed: Assumptions,
) -> Plan:
    """Compiles step `step_name` ("train", "encode", "knn") for the `devices` of `topology`.

    Out of memory is a result: a plan that does not fit.
    """
    # A source of parameters decides the architecture; no work directory has a say here.
    config, _ = init.apply_source(config, storage.path(os.devnull))
    mesh = make_mesh(config.mesh, devices)
    is_gpu = isinstance(chip, Card)
    with jax.set_mesh(mesh):
        step = make_step(step_name, config, mesh, assumed)
        plan = Plan(
            config=config,
            topology=topology,
            chip=chip,
            mesh=describe(mesh),
            mesh_shape=tuple(mesh.shape[name] for name in IN_SLICE),
            chips=mesh.size,
            step_name=step_name,
            step=step,
            compile_seconds=0.0,
        )
        start = time.perf_counter()
        try:
            compiled = step.lower().compile(compiler_options() if is_gpu else None)
        except jax.errors.JaxRuntimeError as error:
            exhausted = memory.parse_exhausted(str(error))
            if exhausted is None:
                raise
            seconds = time.perf_counter() - start
            return dataclasses.replace(plan, compile_seconds=seconds, exhausted=exhausted)
    seconds = time.perf_counter() - start
    read = gpu_module_cost if is_gpu else module_cost
    cost = read(parse_module(compiled.as_text()), mesh, step.unknown_trips)
    return dataclasses.replace(
        plan,
        compile_seconds=seconds,
        memory=memory.memory_of(compiled, step.arguments),
        cost=cost,
        times=roofline.predict(cost, chip),
    )
