"""Python programs that start without the seconds for imports, out of a process that has made them.

`run_forked` is for programs that would import jax anyhow. They are processes of their own, with
pid, signals, exit status, environment and output as others. Two things differ. All of them have the
same hash seed: a test that two runs are equal makes one of them by `run_python`. And what an import
costs or orders is not seen: tests about the start of a process use `run_python`, too.
"""

import functools
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import tempfile

from conftest import ROOT, python_environment

SERVER = pathlib.Path(__file__).with_name("fork_server.py")


class Forked:
    """A started program with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, status, output, args):
        self.pid, self.args = pid, args
        self.returncode: int | None = None
        self._status, self._output = status, output

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative of a signal. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            line = self._status.readline()
            assert line, "the process that watches it was killed"
            self._status.close()
            self.returncode = os.waitstatus_to_exitcode(int(line))
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """(standard output, standard error); None for one that has a file of its own."""
        self.wait(timeout)
        texts = []
        for file in self._output:
            if file is not None:
                file.seek(0)
            texts.append(None if file is None else file.read())
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _file():
    return tempfile.TemporaryFile("w+")


@functools.cache
def _server():
    """(a socket to it, its process, its standard error); it ends when the socket is closed."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # OpenBLAS starts its threads at import.
    environment = python_environment(1, OPENBLAS_NUM_THREADS="1")
    log = _file()
    with its:
        process = subprocess.Popen(
            [sys.executable, str(SERVER), str(its.fileno())],
            cwd=ROOT,
            env=environment,
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    return ours, process, log


def start_forked(arguments, devices: int = 1, stdout=None, stderr=None, **environment):
    """Starts `python ARGUMENTS` in the repository on `devices` fake CPU devices.

    stdout, stderr: files (or subprocess.STDOUT for stderr); without, `communicate` returns what
    was written.
    """
    arguments = [str(argument) for argument in arguments]
    request = {
        "arguments": arguments,
        "environment": python_environment(devices, **environment),
        "folder": str(ROOT),
    }
    output = [None if given else _file() for given in (stdout, stderr)]
    files = [given or made for given, made in zip((stdout, stderr), output, strict=True)]
    if stderr == subprocess.STDOUT:
        files[1] = files[0]
    if sys.platform != "linux":  # where a fork is no copy of all that libraries have
        given = [given or subprocess.PIPE for given in (stdout, stderr)]
        command = [sys.executable, *arguments]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=request["environment"],
            stdout=given[0],
            stderr=given[1],
            text=True,
        )
    server, process, log = _server()
    read, write = os.pipe()
    with open(os.devnull) as nothing:
        numbers = [nothing.fileno(), *(file.fileno() for file in files), write]
        socket.send_fds(server, [json.dumps(request).encode()], numbers)
    os.close(write)
    status = os.fdopen(read, "rb", buffering=0)
    if not (pid := status.readline()):
        process.wait()
        log.seek(0)
        raise RuntimeError(f"{SERVER.name}: {log.read()}")
    return Forked(int(pid), status, output, arguments)


def run_forked(arguments, devices: int = 1, timeout: float = 600, **environment):
    """Like `run_python`."""
    process = start_forked(arguments, devices, **environment)
    try:
        out, error = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)
