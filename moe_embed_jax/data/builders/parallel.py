"""Runs preparation jobs in parallel processes, with one progress bar per job."""

import concurrent.futures
import multiprocessing
import multiprocessing.synchronize
import os
import queue
import signal
import threading
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from moe_embed_jax.errors import UserError

# Set once in each worker process: where reports go, and whether to give up.
_messages: "multiprocessing.Queue | None" = None
_cancelled: "multiprocessing.synchronize.Event | None" = None


def run_in_processes(function: Callable, jobs: Mapping[str, tuple], progress: bool = True) -> None:
    """Calls `function(report, *arguments)` once per job, as many at a time as there are cores.

    `report(stage, done, total)` moves the bar of the job. Functions and arguments must be
    picklable. The first error, or an interrupt, ends the other jobs at their next report and is
    then raised here.
    """
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )
    with bars:
        tasks = {name: bars.add_task(f"{name}: waiting", total=None) for name in jobs}
        workers = min(len(jobs), os.cpu_count() or 1)
        if workers <= 1:
            for name, arguments in jobs.items():
                function(_reporter(bars, tasks[name], name), *arguments)
        else:
            _run_in_pool(function, jobs, workers, bars, tasks)


def _run_in_pool(
    function: Callable,
    jobs: Mapping[str, tuple],
    workers: int,
    bars: Progress,
    tasks: Mapping[str, TaskID],
) -> None:
    context = multiprocessing.get_context("spawn")  # the caller may have threads: no fork
    messages = context.Queue()
    cancelled = context.Event()
    stopped = threading.Event()
    show = threading.Thread(target=_show, args=(messages, stopped, bars, tasks), daemon=True)
    show.start()
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(messages, cancelled)
    )
    try:
        futures = [pool.submit(_call, function, name, args) for name, args in jobs.items()]
        for future in concurrent.futures.as_completed(futures):
            future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a preparation process was killed (out of memory?); run again to go on where it stopped"
        ) from error
    finally:
        cancelled.set()
        pool.shutdown(wait=True, cancel_futures=True)
        stopped.set()
        show.join()
        messages.close()


def _start_worker(messages, cancelled) -> None:
    global _messages, _cancelled
    _messages, _cancelled = messages, cancelled
    # Ctrl-C reaches the whole process group; the parent then cancels, and a worker unwinds at its
    # next report, so that nothing half-written is left. A killed parent takes its workers along.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(function: Callable, name: str, arguments: tuple) -> None:
    assert _messages is not None and _cancelled is not None, "only in a worker process"
    messages, cancelled = _messages, _cancelled

    def report(stage: str, done: int, total: int) -> None:
        if cancelled.is_set():
            raise KeyboardInterrupt
        messages.put((name, stage, done, total))

    function(report, *arguments)


def _show(messages, stopped: threading.Event, bars: Progress, tasks: Mapping[str, TaskID]) -> None:
    while True:
        try:
            name, *report = messages.get(timeout=0.1)
        except queue.Empty:
            if stopped.is_set():
                return
            continue
        _reporter(bars, tasks[name], name)(*report)


def _reporter(bars: Progress, task: TaskID, name: str) -> Callable[[str, int, int], None]:
    return lambda stage, done, total: bars.update(
        task, description=f"{name}: {stage}", completed=done, total=total
    )
