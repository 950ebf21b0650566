"""The program behind forked.py: imports what launchers import, then becomes Python programs.

A program that is forked from here starts without the seconds that these imports take. The imports
start no thread and no JAX backend (`main` refuses to go on else): then a fork copies all that there
is. Arguments: the number of the socket on which requests come.
"""

import gc
import json
import os
import pathlib
import signal
import socket
import sys
import types

MOST_BYTES = 200_000  # of a request
# JAX reads these from the environment when it needs them, other variables at its import. Of those
# it can be told of some later.
READ_LATE = {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
TOLD_LATER = {
    "JAX_COMPILATION_CACHE_DIR": str,
    "JAX_ENABLE_COMPILATION_CACHE": lambda value: value == "true",
}


def import_libraries() -> None:

    import moe_embed_jax.embedder
    import moe_embed_jax.training.loop
    import moe_embed_jax.training.pictures  # noqa: F401

    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)  # as in conftest.py


def main(number: int) -> dict:
    """Serves requests; returns one of them, in the process that is to do it."""
    requests = socket.socket(fileno=number)
    import_libraries()
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        sys.exit(f"the imports have started threads: {threads}")
    from jax._src import xla_bridge

    if xla_bridge.backends_are_initialized():
        sys.exit("the imports have started a JAX backend")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes of `_watch`
    while True:
        try:
            message, files, _, _ = socket.recv_fds(requests, MOST_BYTES, 4)
        except KeyboardInterrupt:  # the tests end
            os._exit(1)
        if not message:
            os._exit(0)
        if os.fork():
            for file in files:
                os.close(file)
            continue
        requests.close()
        if _watch(files):
            return json.loads(message)


def _watch(files: list[int]) -> bool:
    """True in a new process, whose standard files are the first three of `files`.

    This one writes the pid, then the status of that process to the last one, and ends.
    """
    *standard, report = files
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        for target, file in enumerate(standard):
            os.dup2(file, target)
        for file in files:
            os.close(file)
        return True
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for file in standard:
        os.close(file)
    os.write(report, f"{pid}\n".encode())
    os.write(report, f"{os.waitpid(pid, 0)[1]}\n".encode())
    os._exit(0)


def become(arguments: list[str], environment: dict[str, str], folder: str):
    """`python ARGUMENTS`: the code of a file, or of `-c`, and the module in which it runs."""
    import jax

    for name in {*environment, *os.environ}:
        if name.startswith("JAX_") and name not in READ_LATE:
            value = environment.get(name)
            if value == os.environ.get(name):
                continue
            if name not in TOLD_LATER or value is None:
                sys.exit(f"{name} is read when jax is imported: start a process")
            jax.config.update(name.lower(), TOLD_LATER[name](value))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    if arguments[0] == "-c":
        _, text, *rest = arguments
        sys.argv, sys.path[0], name = ["-c", *rest], "", "<string>"
    else:
        path = pathlib.Path(arguments[0])
        sys.argv, sys.path[0], name = arguments, str(path.absolute().parent), str(path)
        text, module.__file__ = path.read_text(), name
    return compile(text, name, "exec"), module.__dict__


if __name__ == "__main__":
    exec(*become(**main(int(sys.argv[1]))))
