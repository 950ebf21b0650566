"""How a launcher ends: Ctrl-C, full outputs, what other libraries leave behind."""

import logging
import signal
import subprocess
import sys
import types

import pytest
from conftest import python_environment, run_python

from moe_embed_jax import launching, orbax_leftovers


def test_ctrl_c_is_one_line_and_the_second_ends_at_once(tmp_path):
    code = (
        "import os, signal, sys; from moe_embed_jax import launching\n"
        "def main():\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n"
        "        print('cleaned up', flush=True)\n"
        "        if sys.argv[1] == '2': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(launching.run(main))\n"
    )
    for count, line in (
        ("1", "interrupted: the same command starts again, or continues\n"),
        ("2", "interrupted again: ended at once\n"),
    ):
        result = run_python(["-c", code, count])
        assert (result.returncode, result.stdout, result.stderr) == (130, "cleaned up\n", line)


def test_no_thread_keeps_a_process_after_ctrl_c():
    """One that Ctrl-C left without what it waits for."""
    code = (
        "import os, signal, sys, threading; from moe_embed_jax import launching\n"
        "launching.LONGEST_END = 0.5\n"
        "def main():\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(launching.run(main))\n"
    )
    result = run_python(["-c", code], timeout=60)
    assert (result.returncode, result.stderr) == (
        130,
        "interrupted: the same command starts again, or continues\n",
    )


def test_ctrl_c_is_not_lost_in_a_callback():
    """Python ignores what is raised there."""
    code = (
        "import gc, os, signal, sys, time; from moe_embed_jax import launching\n"
        "def callback(*_):\n"
        "    gc.callbacks.clear()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "def main():\n"
        "    gc.callbacks.append(callback)\n"
        "    gc.collect()\n"
        "    print('goes on', flush=True)\n"
        "    time.sleep(60)\n"
        "sys.exit(launching.run(main))\n"
    )
    result = run_python(["-c", code], timeout=30)  # it does not wait for the end of that sleep
    line = "interrupted: the same command starts again, or continues\n"
    assert (result.returncode, result.stdout, result.stderr) == (130, "goes on\n", line)


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "→ \\ud800"), ("ascii", "\\u2192 \\ud800")]
)
def test_what_the_terminal_cannot_show_is_escaped(encoding, shown):
    code = (
        "import sys; from moe_embed_jax import errors, launching\n"
        "def main(): print('\\u2192 \\ud800'); raise errors.UserError('\\u2192 \\ud800')\n"
        "sys.exit(launching.run(main))"
    )
    result = run_python(["-c", code], PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert (result.returncode, result.stdout) == (2, f"{shown}\n")
    assert result.stderr == f"error: {shown}\n"


def drop_unfinished_read(file: str) -> None:
    """A coroutine of `file` that waits, and says at its end what Orbax's reads of arrays say."""
    code = """
async def read():
    try:
        await forever()
    except BaseException as error:
        raise Exception("an array cannot be read") from error
"""
    forever = types.coroutine(lambda: (yield))
    names = {"forever": forever}
    exec(compile(code, file, "exec"), names)
    names["read"]().send(None)


def test_what_orbax_leaves_behind_is_not_shown(capfd, monkeypatch):
    """Its reads and writes that fail after the first one that did, in four ways."""
    orbax_leftovers.hide.cache_clear()
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    for name in ("absl", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    assert launching.run(lambda: None) == 0

    def raise_in_destructor(message: str) -> None:
        class Dropped:
            def __del__(self):
                raise RuntimeError(message)

        Dropped()

    raise_in_destructor("Event loop is closed")
    closed = RuntimeError("Event loop is closed")
    sys.excepthook(RuntimeError, closed, None)
    logging.getLogger("asyncio").error("a future was never retrieved", exc_info=closed)
    drop_unfinished_read("site-packages/orbax/checkpoint/serialization.py")
    assert capfd.readouterr().err == ""
    raise_in_destructor("another one")
    drop_unfinished_read("site-packages/other/serialization.py")
    shown = capfd.readouterr().err
    assert "another one" in shown and "an array cannot be read" in shown


def test_ctrl_c_at_the_end_of_python_prints_nothing():
    code = (
        "import atexit, os, signal, sys, time; from moe_embed_jax import launching\n"
        "atexit.register(time.sleep, 60)\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "sys.exit(launching.run(lambda: None))\n"
    )
    result = run_python(["-c", code])
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


def test_writes_that_fail_after_the_first_one_print_no_trace():
    """TensorStore's: its event loop is closed by then. Other errors that nobody gets are shown."""
    code = (
        "import sys; from moe_embed_jax import launching\n"
        "class Callback:\n"
        "    def __init__(self, text): self.text = text\n"
        "    def __del__(self): raise RuntimeError(self.text)\n"
        "def main():\n"
        "    Callback('Event loop is closed')\n"
        "    Callback('a fault')\n"
        "sys.exit(launching.run(main))\n"
    )
    result = run_python(["-c", code])
    assert result.returncode == 0
    assert "Event loop" not in result.stderr and "RuntimeError: a fault" in result.stderr


def test_the_standard_output_may_be_full():
    code = (
        "import sys; from moe_embed_jax import launching\n"
        "sys.exit(launching.run(lambda: print('x')))"
    )
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=python_environment(1, PYTHONUNBUFFERED=""),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 2
    assert result.stderr.startswith("error: standard output: there is no room left")
