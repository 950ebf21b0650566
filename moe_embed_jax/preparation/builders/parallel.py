"""Runs preparation jobs in parallel processes, with one progress bar per job."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_embed_jax.errors import UserError

# Kinds of message from a job's process: a report, its normal end, its exception.
_REPORT, _END, _ERROR = range(3)
_SECONDS_TO_UNWIND = 10


def run_in_processes(function: Callable, jobs: Mapping[str, tuple], progress: bool = True) -> None:
    """Calls `function(report, *arguments)` once per job, as many at a time as there are cores.

    `report(stage, done, total)` moves the bar of the job. Functions and arguments must be
    picklable. The first error of a job, or an interrupt, stops the others and is raised here.

    Raises:
      UserError: a process was killed; or what `function` raised.
    """
    with _bars(progress) as bars:
        reports = {name: _reporter(bars, name) for name in jobs}
        workers = min(len(jobs), os.cpu_count() or 1)
        if workers <= 1:
            for name, arguments in jobs.items():
                function(reports[name], *arguments)
        else:
            _run(function, jobs, workers, reports)


def _run(function: Callable, jobs: Mapping[str, tuple], workers: int, reports: Mapping) -> None:
    context = multiprocessing.get_context("spawn")  # the caller may have threads: no fork
    waiting = list(jobs)
    running: dict[multiprocessing.connection.Connection, tuple[str, multiprocessing.Process]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop(0)
                # A pipe each, and no queue: a killed process cannot leave a shared lock held.
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_work, args=(sender, function, jobs[name]), daemon=True
                )
                process.start()
                sender.close()  # the process has the only one left, so its death closes the pipe
                running[receiver] = (name, process)
            for receiver in multiprocessing.connection.wait(list(running)):
                name, process = running[receiver]
                if _receive(receiver, name, reports[name]):
                    process.join()
                    del running[receiver]
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join(_SECONDS_TO_UNWIND)
            process.kill()


def _receive(receiver, name: str, report: Callable[[str, int, int], None]) -> bool:
    """Handles one message; says whether the job has ended."""
    try:
        kind, *content = receiver.recv()
    except EOFError as error:
        raise UserError(
            f"the process that prepares {name} was killed (out of memory?); run again to go on "
            "where it stopped"
        ) from error
    if kind == _ERROR:
        raise content[0]
    if kind == _REPORT:
        report(*content)
    return kind == _END


def _work(sender, function: Callable, arguments: tuple) -> None:
    # Ctrl-C reaches the whole process group, but the parent decides: it sends SIGTERM, which
    # unwinds like an interrupt, so that nothing half-written is left.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        function(lambda *report: sender.send((_REPORT, *report)), *arguments)
        sender.send((_END,))
    except KeyboardInterrupt:
        sys.exit(1)
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()  # the trace does not survive the pipe
        sender.send((_ERROR, error))


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _bars(progress: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )


def _reporter(bars: Progress, name: str) -> Callable[[str, int, int], None]:
    task = bars.add_task(f"{name}: waiting", total=None, start=False)

    def report(stage: str, done: int, total: int) -> None:
        bars.start_task(task)
        bars.update(task, description=f"{name}: {stage}", completed=done, total=total)

    return report
