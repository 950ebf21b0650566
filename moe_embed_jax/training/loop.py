"""The training run, read from top to bottom."""

import contextlib
import functools
import os
import pathlib
import signal
import sys

import jax

from moe_embed_jax import storage
from moe_embed_jax.checkpoint import Checkpoints
from moe_embed_jax.config import CHECKPOINTS
from moe_embed_jax.errors import Interrupted, end_at_once
from moe_embed_jax.mesh import check_dtype, make_mesh
from moe_embed_jax.ownership import own
from moe_embed_jax.processes import process_0_first, true_anywhere
from moe_embed_jax.stages.registry import STAGES
from moe_embed_jax.training import init
from moe_embed_jax.training import workdir as workdir_module
from moe_embed_jax.training.evaluation import Evaluator
from moe_embed_jax.training.health import Health
from moe_embed_jax.training.metric_writer import MetricWriter
from moe_embed_jax.training.optimizer import learning_rates, make_optimizer
from moe_embed_jax.training.records import (
    CHECKSUMS,
    EVALUATIONS_FILE,
    METRICS_FILE,
    checksums,
    continue_records,
    read_records,
)
from moe_embed_jax.training.run_config import Run
from moe_embed_jax.training.state import (
    abstract_state,
    create_state,
    restore_state,
    state_from_params,
    to_items,
)
from moe_embed_jax.training.step import jit_train_step


def train(config: Run, workdir) -> bool:
    """Trains what the config says, in `workdir`, resuming if there is a checkpoint.

    Returns True when all steps are done, False when SIGTERM ended the run early (its state is
    saved; the same command continues it).

    Raises:
      Interrupted: Ctrl-C did that.
      UserError: another process trains in `workdir`, among others.
    """
    with contextlib.ExitStack() as on_exit:  # whatever happens, finish saving and writing
        return _train(config, storage.path(workdir), on_exit)


def _train(config, workdir: pathlib.Path, on_exit: contextlib.ExitStack) -> bool:
    is_writer = jax.process_index() == 0
    preemption = _Preemption()
    on_exit.callback(preemption.leave)

    ### Mesh, optimiser, work directory, data, step
    mesh = make_mesh(config.mesh)
    workdir_module.read_run_config(workdir)  # a damaged one is named
    config, changed = init.apply_source(config, workdir)
    check_dtype(config.model.dtype, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)  # may refuse: before data are made
    owner = process_0_first(
        "owner", lambda: on_exit.enter_context(own(workdir, inside=True)) if is_writer else None
    )
    process_0_first(
        "work directory", lambda: workdir_module.check_or_create(workdir, config, write=is_writer)
    )
    run = STAGES[config.objective].open(config, workdir, mesh, is_writer)
    stage = run.stage
    train_step = jit_train_step(stage, optimizer, mesh)

    ### State: the newest checkpoint of this work directory, else fresh
    checkpoints = Checkpoints(workdir / CHECKPOINTS, config.keep_checkpoints)
    on_exit.push(checkpoints.leave)
    restore = functools.partial(restore_state, checkpoints, abstract_state(stage, optimizer, mesh))
    check_data = functools.partial(workdir_module.check_data_spec, current=run.data_spec)
    restored = checkpoints.restore_newest(check_data, restore)
    if restored is None:
        start, saved = 0, {}
        params = init.initial_params(config, mesh)
        if params is None:
            state = create_state(stage, optimizer, mesh, config.seed)
        else:
            state = state_from_params(stage, optimizer, mesh, params, config.seed)
    else:
        start, saved, state = restored

    ### Say what will happen
    if is_writer:
        print(run.describe(), flush=True)
        if config.init.source:
            upcycled = f", upcycled ({config.init.upcycle})" if config.init.upcycle else ""
            print(f"init        {config.init.source}{upcycled}; it decides {', '.join(changed)}")
        if start:
            print(f"resuming    {workdir} after step {start}", flush=True)

    ### Records: what the process before this one wrote, and who continues it
    lines = process_0_first(
        "records",
        lambda: continue_records(workdir, start, saved.get(CHECKSUMS, {})) if is_writer else [],
    )
    for line in lines:
        print(f"warning: {line}", file=sys.stderr, flush=True)
    recorded = read_records(workdir / EVALUATIONS_FILE) if is_writer else []
    is_evaluated = true_anywhere(any(record["step"] == start for record in recorded))
    evaluator = Evaluator(workdir, config, run.held_out(), stage.loss_name, is_writer)
    on_exit.callback(evaluator.draw)  # also of a run that is stopped: what there is
    rates = learning_rates(config.optimizer, config.steps)
    metric_writer = MetricWriter(workdir, start, rates, stage.loss_name, is_writer)
    on_exit.callback(metric_writer.close)
    recent = read_records(workdir / METRICS_FILE) if is_writer else []
    health = Health(config.health, config.model, config.optimizer.warmup_steps, checkpoints, recent)

    def save(step: int) -> None:
        health.check_state(step, state)
        if is_writer:
            owner.check()
            metric_writer.sync()
        # Process 0 writes what is beside the arrays.
        records = {CHECKSUMS: checksums(workdir) if is_writer else {}}
        checkpoints.save(step, run.data_spec | records, **to_items(state))

    def evaluate(step: int, every_language: bool) -> None:
        model = run.trained_model(state.params)
        if step == start and is_evaluated:
            evaluator.use(model)
            return
        scores = evaluator.evaluate(model, step, every_language)
        if not scores:
            return
        metric_writer.scalars(step, scores)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        metric_writer.say(f"step {step}: {shown}")
        metric_writer.pause()

    def evaluates(step: int) -> bool:
        return bool(config.eval_every) and step % config.eval_every == 0 and step < config.steps

    if start == 0 or evaluates(start):
        evaluate(start, every_language=start == 0)

    ### Train
    step = start
    preemption.defer_interrupts()
    for batch in run.batches.iterate(start, config.steps):
        state, metrics = train_step(state, batch.arrays)
        step = batch.step + 1
        metric_writer.add(step, batch.group.name, batch.tokens, metrics)
        is_last = step == config.steps
        stop = preemption.requested(step, config.log_every)
        saves = step % config.checkpoint_every == 0 or is_last or stop
        if step % config.log_every == 0 or saves or evaluates(step):
            health.check(metric_writer.flush())  # before anything is made of a sick state
            checkpoints.raise_errors()  # of a save that has not ended, on a full disk for example
        if saves:
            save(step)
        if stop:
            break
        if evaluates(step):
            evaluate(step, every_language=False)
    checkpoints.wait()
    preemption.raise_interrupts()
    if step < config.steps:
        if preemption.interrupted:
            raise Interrupted(f"after step {step}: saved; the same command continues there")
        metric_writer.say(
            f"stopped by SIGTERM after step {step}: saved; the same command continues here"
        )
        return False

    ### Report
    evaluate(step, every_language=True)
    metric_writer.close()
    evaluator.report()
    return True


class _Preemption:
    """Remembers SIGTERM, which a preempted VM and `kill` send, until the step is finished; and
    Ctrl-C, while the run takes steps. A second Ctrl-C ends the process at once."""

    def __init__(self):
        self._flag = False
        self.interrupted = False  # by Ctrl-C in this process
        self._raises = signal.getsignal(signal.SIGINT)
        self._ends = signal.signal(signal.SIGTERM, self._set)

    def defer_interrupts(self) -> None:
        """From now on Ctrl-C waits for the end of the step. A process that ignores it still
        does."""
        if self._raises is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._set)

    def raise_interrupts(self) -> None:
        """From now on Ctrl-C raises KeyboardInterrupt again, as there is nothing to save."""
        signal.signal(signal.SIGINT, self._raises)

    def leave(self) -> None:
        """Both signals do what they did before: SIGTERM ends a notebook that has trained."""
        self.raise_interrupts()
        signal.signal(signal.SIGTERM, self._ends)

    def _set(self, signum, frame) -> None:
        del frame
        # Not print: a signal may arrive in the middle of one, which cannot be entered twice.
        if signum == signal.SIGTERM:
            os.write(2, b"SIGTERM: saving, then stopping\n")
        elif self.interrupted:
            end_at_once()
        else:
            self.interrupted = True
            os.write(2, b"Ctrl-C: saving, then stopping; a second one ends the run at once\n")
        self._flag = True

    def requested(self, step: int, every: int) -> bool:
        """Whether to stop after `step`. Processes agree on it, every `every` steps."""
        if jax.process_count() > 1 and step % every:
            return False
        return true_anywhere(self._flag)
