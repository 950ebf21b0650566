"""Errors that a user can act on.

Launchers print a `UserError` as one line and exit with status 2. They do the same with what the
operating system refuses (a full disk, no permission). Everything else is a defect of ours and keeps
its stack trace.
"""

import os
import signal
from collections.abc import Iterable

_CONTROL = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)  # the last two separate lines
_ESCAPES = {code: repr(chr(code))[1:-1] for code in _CONTROL if chr(code) != "\t"}
INTERRUPTED = 128 + signal.SIGINT  # exit status after Ctrl-C, as shells have it


class UserError(Exception):
    """Wrong input, configuration or environment; the message names the thing and the remedy.

    Messages quote data, so control characters and line breaks in them are escaped: an error is one
    line. `log`: lines of another program that stand below it.
    """

    def __init__(self, message: str = "", log: Iterable[str] = ()):
        super().__init__(message)
        self.log = tuple(log)

    def __str__(self) -> str:
        return "\n  ".join(str(line).translate(_ESCAPES) for line in (*self.args[:1], *self.log))


class LostConnection(OSError):
    """Cloud Storage cannot be reached, after a minute of tries. A program that meets it ends at
    once: libraries would try for a quarter of an hour to write what they still hold."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the program did what it does then; the message says what is kept."""


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; the name of its class, if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def end_at_once() -> None:
    """What a second Ctrl-C does."""
    # Not print: a signal may arrive in the middle of one, which cannot be entered twice.
    os.write(2, b"interrupted again: ended at once\n")
    os._exit(INTERRUPTED)
