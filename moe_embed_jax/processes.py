"""Several processes, one run: arrays that span them, and what process 0 does before the others.

All of them run the same program. Whatever is computed on the mesh is called by every process, in
the same order; process 0 alone writes files (checkpoints apart) and talks to the user.
"""

import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_embed_jax.errors import INTERRUPTED, UserError, end_at_once

T = TypeVar("T")
FAILED, STOPPED = 1, 1000  # how process 0 left `process_0_first`; STOPPED + its exit status
LONGEST_WAIT = 24 * 3600  # seconds that others wait for process 0, which may prepare a large corpus


def process_0_first(name: str, action: Callable[[], T]) -> T:
    """The result of `action()`, called on process 0 and, when that has returned, on the others.

    `name` stands for this place in the program: it must not be used twice. Ctrl-C waits for the
    other processes, so that all end together; a second one ends the process at once.

    Raises:
      KeyboardInterrupt: Ctrl-C here.
      SystemExit: another process was stopped (SIGTERM, Ctrl-C); with the same status.
      UserError, on the others: process 0 failed. It says why.
    """
    if jax.process_count() == 1:
        return action()
    status, result, error = 0, None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except BaseException as raised:
            status, error = _status(raised), raised
    with _held_interrupts() as interrupts:
        wait_for_all(name)
        if interrupts and not status:
            status = STOPPED + INTERRUPTED
        status_P = _gathered([status], 1)[:, 0]
    if error is not None:
        raise error
    if interrupts:
        raise KeyboardInterrupt
    if status_P.any():
        _end_like(name, status_P)
    return result if jax.process_index() == 0 else action()


def _status(raised: BaseException) -> int:
    if isinstance(raised, KeyboardInterrupt):
        return STOPPED + INTERRUPTED
    return STOPPED + (raised.code or 0) if isinstance(raised, SystemExit) else FAILED


def _end_like(name: str, status_P: np.ndarray) -> None:
    """Raises what `process_0_first` raises if other processes ended like this."""
    if status_P[0] == FAILED:
        raise UserError(f"process 0 failed here ({name}); its message says why")
    stopped = int(np.argmax(status_P >= STOPPED))
    print(
        f"process {stopped} was stopped here ({name}), so this process ends, too", file=sys.stderr
    )
    raise SystemExit(int(status_P[stopped]) - STOPPED)


@contextlib.contextmanager
def _held_interrupts() -> Iterator[list[int]]:
    """Gives a list to which Ctrl-C adds its signal, instead of raising. If the other processes do
    not come, `distributed` ends this one."""
    signals: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None) or threading.current_thread() != threading.main_thread():
        yield signals
        return

    def hold(signum, frame):
        del frame
        if signals:
            end_at_once()
        signals.append(signum)

    hold.waits = True
    signal.signal(signal.SIGINT, hold)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


def on_process_0(name: str, action: Callable[[], T]) -> T | None:
    """`process_0_first` of what process 0 alone does; the others get None."""
    return process_0_first(name, lambda: action() if jax.process_index() == 0 else None)


def wait_for_all(name: str) -> None:
    """Returns when every process is here, however long one takes; `name` as above."""
    # A barrier of the coordination service, not of the devices: those give up, or log warnings,
    # long before a corpus is prepared.
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp  # here: embedding on one process does not need it

        ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=LONGEST_WAIT * 1000)


def true_anywhere(flag: bool) -> bool:
    """Whether `flag` is true in any process; all of them have to call this together."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def from_process_0(array: np.ndarray) -> np.ndarray:
    """Process 0's `array` in every process; all of them have to call this together, with arrays of
    one shape and dtype."""
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def share_of_process(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """(number of this process, how many there are) among those that share work on `mesh`: all of
    the run where the mesh has devices of all, else this one alone."""
    count = jax.process_count()
    if len({device.process_index for device in mesh.devices.flat}) < count:
        return 0, 1
    return jax.process_index(), count


def tokenized_together(
    texts: list[str], tokenize: Callable[[list[str]], list[np.ndarray]], mesh: jax.sharding.Mesh
) -> list[np.ndarray]:
    """`tokenize(texts)`, int32 ids of each text, in every process.

    On a mesh of all processes, which call this together with the same texts, each tokenises its
    share.
    """
    process, count = share_of_process(mesh)
    if not texts or count == 1:
        return tokenize(texts)
    edges = [len(texts) * i // count for i in range(count + 1)]
    most = max(stop - start for start, stop in itertools.pairwise(edges))
    share = slice(*edges[process:][:2])
    sequences = tokenize(texts[share])
    length_PS = _gathered([len(ids) for ids in sequences], most)
    # In powers of two: each size compiles.
    longest = 1 << int(length_PS.sum(axis=1).max()).bit_length()
    token_PT = _gathered(np.concatenate([*sequences, np.zeros(0, np.int32)]), longest)
    return [
        ids
        for process, (start, stop) in enumerate(itertools.pairwise(edges))
        for ids in np.split(
            token_PT[process], np.cumsum(length_PS[process, : stop - start], dtype=np.int64)
        )[:-1]
    ]


def summed_over(mesh: jax.sharding.Mesh, counts: np.ndarray) -> np.ndarray:
    """`counts`, int64 below 2 ** 62, summed over the processes that share work on `mesh`."""
    if share_of_process(mesh)[1] == 1:
        return counts
    # Without 64-bit mode devices hold int32.
    low, high = counts % (1 << 31), counts >> 31
    parts = multihost_utils.process_allgather(np.stack([low, high]).astype(np.int32))
    low, high = parts.astype(np.int64).sum(axis=0)
    return low + (high << 31)


def _gathered(values, size: int) -> np.ndarray:
    """int32 [processes, size]: `values` of every process, followed by zeros."""
    padded = np.zeros(size, np.int32)
    padded[: len(values)] = values
    rows = multihost_utils.process_allgather(padded)
    # They come in the order of the devices, which need not be that of the processes.
    device_P = np.array(jax.devices()).reshape(jax.process_count(), -1)[:, 0]
    return rows[np.argsort([device.process_index for device in device_P])]


def to_devices(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """A host array, the same in every process, as a global array.

    `jax.device_put` does the same, but compares the whole array between the processes first.
    """
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of a global array, in every process; all of them have to call this together."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
