"""The training run, read from top to bottom."""

import contextlib
import os
import pathlib
import signal

import jax

from moe_embed_jax.checkpoint import Checkpoints
from moe_embed_jax.mesh import make_mesh
from moe_embed_jax.model_folder import CHECKPOINTS
from moe_embed_jax.processes import process_0_first, true_anywhere
from moe_embed_jax.training import init
from moe_embed_jax.training import workdir as workdir_module
from moe_embed_jax.training.contrastive import Contrastive
from moe_embed_jax.training.health import Health
from moe_embed_jax.training.journal import METRICS_FILE, Journal, read_records
from moe_embed_jax.training.masked_lm import MaskedLM
from moe_embed_jax.training.optimizer import learning_rates, make_optimizer
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
    """
    with contextlib.ExitStack() as on_exit:  # whatever happens, finish saving and the journal
        return _train(config, pathlib.Path(workdir), on_exit)


def _train(config, workdir: pathlib.Path, on_exit: contextlib.ExitStack) -> bool:
    is_writer = jax.process_index() == 0
    preemption = _Preemption()

    ### Mesh, optimiser, work directory, data, step
    mesh = make_mesh(config.mesh)
    config, changed = init.resolve(config, workdir)
    optimizer = make_optimizer(config.optimizer, config.steps)  # may refuse: before data are made
    process_0_first("claim", lambda: workdir_module.claim(workdir, config, write=is_writer))
    objective = OBJECTIVES[config.objective](config, workdir, mesh, is_writer)
    batches, data_spec, step_config = objective.batches, objective.data_spec, objective.step_config
    train_step = objective.jit_train_step(optimizer)

    ### State: the newest checkpoint of this work directory, else fresh
    checkpoints = Checkpoints(workdir / CHECKPOINTS, config.keep_checkpoints)
    on_exit.callback(checkpoints.close)
    abstract = to_items(abstract_state(step_config, optimizer, mesh))
    restored = checkpoints.restore_newest(
        lambda saved: workdir_module.check_data_spec(saved, data_spec), **abstract
    )
    if restored is None:
        start = 0
        params = init.initial_params(config, mesh)
        if params is None:
            state = create_state(step_config, optimizer, mesh, config.seed)
        else:
            state = state_from_params(step_config, optimizer, mesh, params, config.seed)
    else:
        start, items = restored
        state = from_items(items)

    def save(step: int) -> None:
        health.check_state(step, state)
        checkpoints.save(step, data_spec, **to_items(state))

    ### Say what will happen
    if is_writer:
        print(objective.describe(), flush=True)
        if config.init.source:
            upcycled = f", upcycled ({config.init.upcycle})" if config.init.upcycle else ""
            print(f"init        {config.init.source}{upcycled}; it decides {', '.join(changed)}")
        if start:
            print(f"resuming    {workdir} after step {start}", flush=True)
    judge = objective.judge(start)
    on_exit.callback(judge.draw)  # also of a run that is stopped: what there is
    rates = learning_rates(config.optimizer, config.steps)
    journal = Journal(workdir, start, rates, is_writer)
    on_exit.callback(journal.close)
    recent = read_records(workdir / METRICS_FILE) if is_writer else []
    health = Health(config.health, config.model, config.optimizer.warmup_steps, checkpoints, recent)

    def evaluate(step: int, every_language: bool) -> None:
        scores = judge.evaluate(objective.trained_model(state), step, every_language)
        if not scores:
            return
        journal.scalars(step, scores)
        journal.say(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        journal.pause()

    if start == 0:
        evaluate(0, every_language=True)

    ### Train
    step = start
    for batch in batches.iterate(start, config.steps):
        state, metrics = train_step(state, batch.arrays)
        step = batch.step + 1
        journal.add(step, batch.group.name, batch.tokens, metrics)
        is_last = step == config.steps
        stop = preemption.requested(step, config.log_every)
        evaluates = bool(config.eval_every) and step % config.eval_every == 0 and not is_last
        saves = step % config.checkpoint_every == 0 or is_last or stop
        if step % config.log_every == 0 or saves or evaluates:
            health.check(journal.flush())  # before anything is made of a sick state
        if saves:
            save(step)
        if stop:
            break
        if evaluates:
            evaluate(step, every_language=False)
    checkpoints.wait()
    if step < config.steps:
        journal.say(f"stopped by SIGTERM after step {step}: saved; the same command continues here")
        return False

    ### Judge the result
    evaluate(step, every_language=True)
    journal.close()
    judge.report()
    return True


class _Preemption:
    """Remembers SIGTERM, which a preempted VM and `kill` send, until the step is finished."""

    def __init__(self):
        self._flag = False
        signal.signal(signal.SIGTERM, self._set)

    def _set(self, signum, frame) -> None:
        del signum, frame
        self._flag = True
        # Not print: a signal may arrive in the middle of one, which cannot be entered twice.
        os.write(2, b"SIGTERM: saving, then stopping\n")

    def requested(self, step: int, every: int) -> bool:
        """Whether to stop after `step`. Processes agree on it, every `every` steps."""
        if jax.process_count() > 1 and step % every:
            return False
        return true_anywhere(self._flag)
