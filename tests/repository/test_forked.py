"""A program forked from a process with imports is a process as others (helpers/forked.py)."""

import os
import signal
import subprocess

import pytest
from conftest import run_python
from helpers.forked import run_forked, start_forked

DESCRIBES_ITSELF = """
import json, os, signal, sys, threading
streams = [[f.encoding, f.errors, f.line_buffering, f.write_through, f.isatty(), f.fileno()]
           for f in (sys.stdin, sys.stdout, sys.stderr)]
names = sorted(globals().keys() - {"__file__", "__cached__", "__annotations__", "__builtins__"})
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)
print(json.dumps([
    sys.argv, sys.path, os.getcwd(), dict(os.environ), names, globals().get("__file__"), __name__,
    vars(sys.modules["__main__"]) is globals(), streams, len(os.listdir("/proc/self/fd")),
    [str(signal.getsignal(number)) for number in numbers], os.getpgrp(), threading.active_count(),
]), flush=True)
import jax
config = jax.config
print(jax.device_count(), config.jax_compilation_cache_dir, config.jax_enable_compilation_cache)
print("error\\r\\n", file=sys.stderr)
sys.exit(3)
"""


def test_it_is_set_up_as_a_started_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DESCRIBES_ITSELF)
    for devices, enabled, arguments in (
        (1, "true", ["-c", DESCRIBES_ITSELF, 1, "a"]),
        (4, "false", [script, "--flag", "a b"]),
    ):
        started, forked = (
            run(arguments, devices=devices, JAX_ENABLE_COMPILATION_CACHE=enabled)
            for run in (run_python, run_forked)
        )
        assert started.returncode == forked.returncode == 3, forked.stderr
        assert started.stdout.splitlines() == forked.stdout.splitlines()
        assert started.stderr == forked.stderr


def test_its_imports_are_made_and_its_pid_is_its_own(tmp_path):
    code = "import os, sys; print(os.getpid(), 'orbax.checkpoint' in sys.modules)"
    process = start_forked(["-c", code])
    assert process.communicate() == (f"{process.pid} True\n", "")
    with (tmp_path / "out").open("w") as out:
        process = start_forked(["-c", code], stdout=out, stderr=subprocess.STDOUT)
        assert process.communicate() == (None, None)
    assert (tmp_path / "out").read_text() == f"{process.pid} True\n"


def test_signals_reach_it_and_its_end_is_seen():
    sleeps = ["-c", "import time; print('x', flush=True); time.sleep(60)"]
    process = start_forked(sleeps)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL == process.poll()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    process.send_signal(signal.SIGTERM)  # nothing: it has ended
    with pytest.raises(subprocess.TimeoutExpired):
        run_forked(sleeps, timeout=0.5)
    ends = (
        "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    result = run_forked(["-c", ends])
    assert result.returncode == -signal.SIGINT and "KeyboardInterrupt" in result.stderr


def test_what_it_registers_at_exit_is_run_and_errors_are_shown():
    code = "import atexit; atexit.register(print, 'at exit'); print('text'); 1 / 0"
    result = run_forked(["-c", code])
    assert (result.returncode, result.stdout) == (1, "text\nat exit\n")
    assert result.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_a_variable_that_jax_has_read_before_is_refused():
    result = run_forked(["-c", ""], JAX_ENABLE_X64="1")
    assert result.returncode == 1
    assert "JAX_ENABLE_X64 is read when jax is imported" in result.stderr
