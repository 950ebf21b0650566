"""Runs what is left of a recipe, one step after the other, each in its own process."""

import contextlib
import os
import pathlib
import re
import shlex
import signal
import subprocess
import time

from moe_embed_jax import storage
from moe_embed_jax.children import ends_with_parent
from moe_embed_jax.errors import Interrupted, UserError, end_at_once
from moe_embed_jax.recipe.records import Records, lock
from moe_embed_jax.recipe.steps import Command, Step
from moe_embed_jax.recipe.view import View

LOGS = "logs"
LAST_LINES = 8  # of the log of a step that failed
TICK = 0.2  # seconds
SAVE_EVERY = 10.0  # seconds, of the time that a step has taken


class Stopped(Exception):
    """SIGTERM ended the recipe in the step that is named."""


def run_steps(steps: list[Step], workdir: pathlib.Path, view: View | None = None) -> None:
    """Runs the steps that are not done; returns when all are.

    Raises:
      UserError: a step was made with other settings, lacks an input, or failed.
      Stopped: after SIGTERM, which the running step was given, too.
      Interrupted: after Ctrl-C, which the running step got as SIGTERM.
    """
    with lock(workdir) as descriptor, _Signals() as signals:
        records = Records(workdir)
        records.check(steps)
        for given in (given for step in steps if not step.is_done for given in step.inputs):
            given.check()
        with view or View([step.name for step in steps]) as shown:
            for step in steps:
                if step.is_done:
                    record = records.read(step.name)
                    shown.update(step.name, "done before", record["seconds"])
                else:
                    _run_step(step, workdir, records, shown, signals, descriptor)


def _run_step(step: Step, workdir, records: Records, shown: View, signals, descriptor) -> None:
    record = records.begin(step)
    kept_log = workdir / LOGS / f"{step.name}.log"
    log = _local_log(kept_log)
    before, start = record["seconds"], time.monotonic()

    def tick(state: str = "running") -> None:
        seconds = before + time.monotonic() - start
        # Seldom, and at the end: what a kill loses of it is little.
        if state != "running" or seconds > record["seconds"] + SAVE_EVERY:
            record["seconds"] = round(seconds, 1)
            record["finished"] = state == "done"
            records.write(step.name, record)
            if log != kept_log and log.exists():
                storage.copy(log, kept_log)
        shown.update(step.name, state, seconds, (last_lines(log, 1) or [""])[0])

    try:
        for command in step.commands:
            if not command.output.is_file():
                _run_command(step, command, log, tick, signals, descriptor)
    except BaseException:
        tick("failed")
        raise
    tick("done")


def _local_log(log: pathlib.Path) -> pathlib.Path:
    """The file that processes write a log to: `log` itself; for one in a bucket, where nobody can
    append, its copy on this machine."""
    local = storage.local_place(log)
    local.parent.mkdir(parents=True, exist_ok=True)
    uploaded = log.stat().st_size if local != log and log.exists() else 0
    # After a kill the copy may have more than was uploaded; on another machine it has less.
    if uploaded > (local.stat().st_size if local.exists() else 0):
        storage.copy(log, local)
    return local


def _run_command(step: Step, command: Command, log, tick, signals, descriptor) -> None:
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(command.argv)}\n".encode())
        file.flush()
        start = file.tell()
        signals.raise_if_stopped(step.name)
        process = subprocess.Popen(
            ends_with_parent(command.argv),  # a step that a killed recipe leaves saves, and ends
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it as SIGTERM, from here
            pass_fds=[descriptor],
        )
    with signals.of(process):
        while process.poll() is None:
            tick()
            time.sleep(TICK)
    signals.raise_if_stopped(step.name)
    if process.returncode:
        ended = f"exit status {process.returncode}"
        if process.returncode < 0:
            ended = f"ended by {signal.Signals(-process.returncode).name}"
        message = f"step {step.name} failed ({ended}); its log is {log}:"
        raise UserError(message, log=last_lines(log, LAST_LINES, start))
    if not command.output.is_file():
        raise UserError(
            f"step {step.name} ended before it was finished ({command.output} is missing; its log "
            f"is {log}): the same command continues"
        )


class _Signals:
    """Passes SIGTERM and Ctrl-C on to the running process, and remembers them. A second Ctrl-C ends
    that process, and this one, at once."""

    def __init__(self):
        self._stopped = False
        self._interrupted = False
        self._process: subprocess.Popen | None = None
        self._old: dict = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def of(self, process: subprocess.Popen):
        self._process = process
        self._pass_on()  # one that came between the start and now
        try:
            yield
        finally:
            self._process = None

    def raise_if_stopped(self, name: str) -> None:
        if self._interrupted:
            raise Interrupted(f"in step {name}: the same command continues there")
        if self._stopped:
            raise Stopped(name)

    def _stop(self, signum, frame) -> None:
        del frame
        if signum == signal.SIGINT and self._interrupted:
            if self._process is not None and self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            end_at_once()
        self._stopped = True
        self._interrupted |= signum == signal.SIGINT
        self._pass_on()

    def _pass_on(self) -> None:
        if self._stopped and self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)


def last_lines(log: pathlib.Path, count: int, start: int = 0) -> list[str]:
    """The last lines of a log after byte `start` that say something: no commands, no borders of
    tables; the states of a progress bar are lines."""
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - 1000 * count))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    return [line for line in lines if any(map(str.isalnum, line)) and not line.startswith("$ ")][
        -count:
    ]
