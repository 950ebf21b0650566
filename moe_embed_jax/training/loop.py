"""The training run, read from top to bottom."""

import contextlib
import functools
import os
import pathlib
import signal

import jax

from moe_embed_jax.checkpoint import Checkpoints
from moe_embed_jax.errors import Interrupted, end_at_once
from moe_embed_jax.mesh import make_mesh
from moe_embed_jax.model_folder import CHECKPOINTS
from moe_embed_jax.ownership import own
from moe_embed_jax.processes import process_0_first, true_anywhere
from moe_embed_jax.training import init
from moe_embed_jax.training import workdir as workdir_module
from moe_embed_jax.training.contrastive import Contrastive
from moe_embed_jax.training.health import Health
from moe_embed_jax.training.journal import Journal
from moe_embed_jax.training.masked_lm import MaskedLM
from moe_embed_jax.training.optimizer import learning_rates, make_optimizer
from moe_embed_jax.training.records import (
    CHECKSUMS,
    EVALUATIONS_FILE,
    METRICS_FILE,
    checksums,
    continue_records,
    read_records,
)
from moe_embed_jax.training.run_config import MaskedRunConfig, RunConfig
from moe_embed_jax.training.state import (
    abstract_state,
    create_state,
    from_items,
    state_from_params,
    to_items,
)

OBJECTIVES = {RunConfig.objective: Contrastive, MaskedRunConfig.objective: MaskedLM}


def train(config: RunConfig | MaskedRunConfig, workdir) -> bool:
    """Trains what the config says, in `workdir`, resuming if there is a checkpoint.

    Returns True when all steps are done, False when SIGTERM ended the run early (its state is
    saved; the same command continues it).

    Raises:
      Interrupted: Ctrl-C did that.
      UserError: another process trains in `workdir`, among others.
    """
    with contextlib.ExitStack() as on_exit:  # whatever happens, finish saving and the journal
        return _train(config, pathlib.Path(workdir), on_exit)


def _train(config, workdir: pathlib.Path, on_exit: contextlib.ExitStack) -> bool:
    is_writer = jax.process_index() == 0
    preemption = _Preemption()
    on_exit.callback(preemption.raise_interrupts)

    ### Mesh, optimiser, work directory, data, step
    mesh = make_mesh(config.mesh)
    workdir_module.read_card(workdir)  # a damaged one is named
    config, changed = init.resolve(config, workdir)
    optimizer = make_optimizer(config.optimizer, config.steps)  # may refuse: before data are made
    owner = process_0_first(
        "owner", lambda: on_exit.enter_context(own(workdir, inside=True)) if is_writer else None
    )
    process_0_first("claim", lambda: workdir_module.claim(workdir, config, write=is_writer))
    objective = OBJECTIVES[config.objective](config, workdir, mesh, is_writer)
    batches, data_spec, step_config = objective.batches, objective.data_spec, objective.step_config
    train_step = objective.jit_train_step(optimizer)

    ### State: the newest checkpoint of this work directory, else fresh
    checkpoints = Checkpoints(workdir / CHECKPOINTS, config.keep_checkpoints)
    on_exit.callback(checkpoints.close)
    abstract = to_items(abstract_state(step_config, optimizer, mesh))
    check_data = functools.partial(workdir_module.check_data_spec, current=data_spec)
    restored = checkpoints.restore_newest(check_data, **abstract)
    if restored is None:
        start, saved = 0, {}
        params = init.initial_params(config, mesh)
        if params is None:
            state = create_state(step_config, optimizer, mesh, config.seed)
        else:
            state = state_from_params(step_config, optimizer, mesh, params, config.seed)
    else:
        start, saved, items = restored
        state = from_items(items)

    def save(step: int) -> None:
        health.check_state(step, state)
        if is_writer:
            owner.check()
            journal.sync()
        about = data_spec | {CHECKSUMS: checksums(workdir) if is_writer else {}}  # process 0 writes
        checkpoints.save(step, about, **to_items(state))

    ### Say what will happen
    if is_writer:
        print(objective.describe(), flush=True)
        if config.init.source:
            upcycled = f", upcycled ({config.init.upcycle})" if config.init.upcycle else ""
            print(f"init        {config.init.source}{upcycled}; it decides {', '.join(changed)}")
        if start:
            print(f"resuming    {workdir} after step {start}", flush=True)
    said = process_0_first(
        "records",
        lambda: continue_records(workdir, start, saved.get(CHECKSUMS, {})) if is_writer else [],
    )
    print(*said, sep="\n", end="\n" if said else "", flush=True)
    recorded = read_records(workdir / EVALUATIONS_FILE) if is_writer else []
    # By the process before this one.
    is_evaluated = true_anywhere(any(record["step"] == start for record in recorded))
    judge = objective.judge()
    on_exit.callback(judge.draw)  # also of a run that is stopped: what there is
    rates = learning_rates(config.optimizer, config.steps)
    journal = Journal(workdir, start, rates, is_writer)
    on_exit.callback(journal.close)
    recent = read_records(workdir / METRICS_FILE) if is_writer else []
    health = Health(config.health, config.model, config.optimizer.warmup_steps, checkpoints, recent)

    def evaluate(step: int, every_language: bool) -> None:
        model = objective.trained_model(state)
        if step == start and is_evaluated:
            judge.use(model)
            return
        scores = judge.evaluate(model, step, every_language)
        if not scores:
            return
        journal.scalars(step, scores)
        journal.say(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        journal.pause()

    def evaluates(step: int) -> bool:
        return bool(config.eval_every) and step % config.eval_every == 0 and step < config.steps

    if start == 0 or evaluates(start):
        evaluate(start, every_language=start == 0)

    ### Train
    step = start
    preemption.defer_interrupts()
    for batch in batches.iterate(start, config.steps):
        state, metrics = train_step(state, batch.arrays)
        step = batch.step + 1
        journal.add(step, batch.group.name, batch.tokens, metrics)
        is_last = step == config.steps
        stop = preemption.requested(step, config.log_every)
        saves = step % config.checkpoint_every == 0 or is_last or stop
        if step % config.log_every == 0 or saves or evaluates(step):
            health.check(journal.flush())  # before anything is made of a sick state
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
        journal.say(f"stopped by SIGTERM after step {step}: saved; the same command continues here")
        return False

    ### Judge the result
    evaluate(step, every_language=True)
    journal.close()
    judge.report()
    return True


class _Preemption:
    """Remembers SIGTERM, which a preempted VM and `kill` send, until the step is finished; and
    Ctrl-C, while the run takes steps. A second Ctrl-C ends the process at once."""

    def __init__(self):
        self._flag = False
        self.interrupted = False  # by Ctrl-C in this process
        self._raises = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGTERM, self._set)

    def defer_interrupts(self) -> None:
        """From now on Ctrl-C waits for the end of the step. A process that ignores it goes on to do
        so."""
        if self._raises is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._set)

    def raise_interrupts(self) -> None:
        """From now on Ctrl-C raises KeyboardInterrupt again, as there is nothing to save."""
        signal.signal(signal.SIGINT, self._raises)

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
