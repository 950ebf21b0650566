"""Starts launchers as children that share what this process has imported: a start in 0.1 s.

A child is a fork from before JAX has devices, and in all else like a process of its own: session,
signals, standard streams, flags, devices. `cold` starts a real process instead.
"""

import atexit
import contextlib
import os
import pathlib
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings

from campaign.world import ROOT

LIMIT_SECONDS = 1200  # the recipe takes 120 s on an idle machine


def preload() -> None:
    """Imports what launchers import, as far as that sets no devices up."""
    import jax
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    from jax._src import xla_bridge

    import moe_embed_jax.conversion
    import moe_embed_jax.curation.consistency
    import moe_embed_jax.curation.negatives
    import moe_embed_jax.embedder
    import moe_embed_jax.evaluation.results
    import moe_embed_jax.evaluation.suite
    import moe_embed_jax.training.health  # noqa: F401

    if xla_bridge._backends:
        raise RuntimeError(f"an import has set up the devices of jax {jax.__version__}")
    warnings.filterwarnings("ignore", message="os.fork")


class Child:
    """A launcher that runs; `script` is launch/NAME.py, or a module."""

    def __init__(
        self, argv, folder: pathlib.Path, name="out", environment=None, cold=False, files=0
    ):
        """files: most bytes that one file may have (RLIMIT_FSIZE), 0 for no limit."""
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder / f"{name}.stdout", folder / f"{name}.stderr"
        self.environment = environment or {}
        self.status: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self._streams = [self._open(path, files) for path in (self.out, self.err)]
        if cold:
            self._process = subprocess.Popen(
                [sys.executable, *argv],
                cwd=ROOT,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=self._streams[0],
                stderr=self._streams[1],
                start_new_session=True,
                preexec_fn=lambda: self._limits(files),
            )
            self.pid = self._process.pid
        else:
            self.pid = os.fork()
            if self.pid == 0:
                self._run([str(a) for a in argv], files)
        for stream in self._streams:
            os.close(stream)

    @staticmethod
    def _open(path: pathlib.Path, files: int) -> int:
        """A log; behind a pipe where the size of files is limited, for it has no part in that."""
        if not files:
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=path.open("ab"))
        stream = os.dup(process.stdin.fileno())
        process.stdin.close()
        return stream

    @staticmethod
    def _limits(files: int) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if files:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (files, resource.RLIM_INFINITY))

    def _run(self, argv: list[str], files: int) -> None:
        status = 1
        try:
            os.setsid()
            for number, stream in enumerate(self._streams, start=1):
                os.dup2(stream, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = (
                os.fdopen(1, "w", closefd=False),
                os.fdopen(2, "w", closefd=False),
            )
            os.chdir(ROOT)
            os.environ.update(self.environment)
            for number in (signal.SIGTERM, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            self._limits(files)
            sys.argv = argv
            try:
                if argv[0] == "-m":
                    sys.argv = argv[1:]
                    runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(argv[0], run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except KeyboardInterrupt:
                traceback.print_exc()
                status = 130
            except BaseException:
                traceback.print_exc()
            # What the end of an interpreter does.
            threading._shutdown()
            atexit._run_exitfuncs()
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(BaseException):
                    stream.flush()
            os._exit(status)  # whatever happens: the code of the campaign must not run on in here

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, seconds: float = LIMIT_SECONDS) -> int | None:
        """The same, when it has ended; None if it did not within `seconds` (it is killed then)."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.end()
                return None
            time.sleep(0.005)
        self.end()  # what it started and left
        return self.status

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """Kills its session: itself if it runs, and every process that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.status is None:
            os.waitpid(self.pid, 0)
            self.status = -signal.SIGKILL

    @property
    def errors(self) -> str:
        return self.err.read_text(errors="replace")
