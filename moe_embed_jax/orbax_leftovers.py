"""Hides the stack traces of what Orbax leaves alone when one of many reads or writes fails.

The error itself is raised, and handled. The other reads and writes of the same tree are ended
later, by TensorStore or by the garbage collector, and Python prints a stack trace for each.
"""

import functools
import pathlib
import sys


@functools.cache
def hide() -> None:
    """From now on, in this process. All that is not Orbax's is shown as before."""
    show, show_dropped = sys.excepthook, sys.unraisablehook

    def show_others(kind, error, trace):
        if not _is_late_answer(kind, error):
            show(kind, error, trace)

    def show_others_dropped(unraisable):
        is_leftover = _is_late_answer(unraisable.exc_type, unraisable.exc_value)
        if not is_leftover and not _is_unfinished_read(unraisable.object):
            show_dropped(unraisable)

    sys.excepthook, sys.unraisablehook = show_others, show_others_dropped


def _is_late_answer(kind: type, error: BaseException) -> bool:
    """TensorStore tells an event loop that is gone of an array."""
    return kind is RuntimeError and str(error) == "Event loop is closed"


def _is_unfinished_read(dropped: object) -> bool:
    """An unfinished read, which calls its own end an error of the array."""
    code = getattr(dropped, "cr_code", None)
    return code is not None and "orbax" in pathlib.PurePath(code.co_filename).parts
