"""Processes that end with the process that started them."""

import sys

# On Linux a process can ask for a signal when its parent ends, however that happens (1 is
# PR_SET_PDEATHSIG). SIGTERM lets it save. A small program asks for it and becomes the wanted one:
# between fork and exec, the threads of JAX make that unsafe.
_END_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def ends_with_parent(command: list[str]) -> list[str]:
    """The command, such that its process gets SIGTERM when the one that starts it has ended.

    `command[0]` is a path. Elsewhere than on Linux it is the command as it is.
    """
    if sys.platform != "linux":
        return command
    return [sys.executable, "-c", _END_WITH_PARENT, *command]
