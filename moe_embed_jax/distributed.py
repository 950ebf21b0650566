"""Whether this process is one of several, and how they find each other."""

import glob
import io
import logging
import os
import re
import signal
import sys
import threading
import time

from moe_embed_jax.errors import INTERRUPTED, UserError

# Seconds that a process which ends waits for the others to end. Runs end together; one that stopped
# with an error alone takes the others down after this time.
EXIT_WAIT = 60
# Seconds that a process has to end after Ctrl-C; process 0, which the others need, has twice that.
INTERRUPT_WAIT = 5


def start() -> None:
    """Joins the other processes of the run where the environment says that there are some.

    Any one of these does:
    * JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID;
    * TPU_WORKER_HOSTNAMES with several hosts, MEGASCALE_COORDINATOR_ADDRESS: Kubernetes sets them;
    * a TPU VM with other workers in its slice, or other slices, by Compute Engine's metadata.

    From then on only process 0 prints and logs; warnings and errors of the others keep coming, with
    the number of the process in front. Must come before anything that asks jax for devices.

    Raises `UserError` where the environment is incomplete.
    """
    cause = _several_processes()
    if cause is None:
        return
    import jax

    try:
        jax.distributed.initialize(
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
            shutdown_timeout_seconds=EXIT_WAIT,
        )
    except ValueError as error:  # jax found no cluster that knows what is missing
        raise UserError(
            f"{cause}, but jax cannot join the run ({error}): set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or unset it to run alone"
        ) from error
    if jax.process_index() > 0:
        _silence(jax.process_index())
    _end_after_interrupts(jax.process_index())


def _end_after_interrupts(process: int) -> None:
    """Lets Ctrl-C end this process also where it waits for others inside jax: Python answers no
    signal there, and at its exit jax waits for all of them.

    Where the program has put its own handler in place, because it saves first, it does nothing;
    unless the handler has the attribute `waits`.
    """
    raising = signal.getsignal(signal.SIGINT)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # Python writes each signal's number

    def saves() -> bool:
        handler = signal.getsignal(signal.SIGINT)
        return handler != raising and not hasattr(handler, "waits")

    def watch() -> None:
        while os.read(reader, 1)[0] != signal.SIGINT or saves():
            pass
        time.sleep(INTERRUPT_WAIT * (1 if process else 2))
        if threading.main_thread().is_alive():  # else its line is printed
            prefix = f"[process {process}] " if process else ""
            os.write(
                2, f"{prefix}interrupted: the same command starts again, or continues\n".encode()
            )
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


def refuse_several_processes(instead: str = "start it on one machine") -> None:
    """For a launcher that is one process. instead: the advice, after "unset it, and".

    Raises `UserError` where a variable says that this process is one of several.
    """
    if cause := _several_processes(of_variables_alone=True):
        raise UserError(f"{cause}, but this command runs as one process: unset it, and {instead}")


def _several_processes(of_variables_alone: bool = False) -> str | None:
    """What in the environment says that this process has others beside it; None: nothing."""
    for name in ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS"):
        if os.environ.get(name):
            return f"{name} is set"
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if os.environ.get(name):
            return f"{name} names several hosts" if "," in os.environ[name] else None
    if not of_variables_alone and (
        "," in _metadata("worker-network-endpoints")
        or re.search(r"MEGASCALE_NUM_SLICES: *'?([2-9]|\d\d)", _metadata("tpu-env"))
    ):
        return "this TPU VM has other workers beside it"
    return None


def _metadata(attribute: str) -> str:
    """What the metadata server says of this TPU VM; "" elsewhere. The bare shell of `gcloud compute
    tpus ... ssh` knows neither the workers of the slice nor the other slices."""
    # Compute Engine's TPU VMs show their chips as one or the other.
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    if not chips or os.environ.get("JAX_PLATFORMS") == "cpu":
        return ""
    import urllib.request

    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{attribute}",
        headers={"Metadata-Flavor": "Google"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=10) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdecimal():
        raise UserError(f"environment variable {variable}={text!r} must be a whole number")
    return int(text)


def _silence(process: int) -> None:
    """Prints go nowhere, what is logged below a warning neither, the rest says where it is from."""
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # of the libraries underneath Python too
    sys.stderr = _PrefixedLines(sys.stderr, f"[process {process}] ")
    logging.disable(logging.INFO)
    from absl import logging as absl_logging

    absl_logging.get_absl_handler().python_handler.setStream(sys.stderr)


class _PrefixedLines(io.TextIOBase):
    """A text stream that puts `prefix` before every line it passes on to `stream`.

    A formatter of `logging` would miss lines that are printed, and stack traces.
    """

    def __init__(self, stream, prefix: str):
        self._stream = stream
        self._prefix = prefix
        self._at_line_start = True

    def write(self, text: str) -> int:
        if text:
            lines = text.splitlines(keepends=True)
            parts = [self._prefix + line for line in lines]
            if not self._at_line_start:
                parts[0] = lines[0]
            self._stream.write("".join(parts))
            self._at_line_start = text.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()
