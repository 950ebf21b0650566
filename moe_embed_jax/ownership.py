"""One owner at a time for a folder that a program writes: a work directory, or a target.

An owner is a small file. It says who writes, and its modification time is a lease: a thread renews
it while the process lives. It needs exclusive creation, listing, deletion and modification times,
which shared file systems and object stores offer, too; it needs no locks.

The owner files of one folder are numbered. A newcomer that finds only dead owners creates the file
with the next number, which only one process can do, and then looks again: if another live owner
appeared meanwhile, it withdraws. So of two processes the second to create its file sees the first,
and two never own one folder.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import random
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError

LEASE = 60.0  # seconds without renewal after which an owner on another machine counts as dead
RENEWALS = 6  # in the time of a lease
LONGEST_PAUSE = 2.0  # seconds between two looks of a process that waits for its turn
TRIES = 20  # to create an owner file while other processes do the same


class InUse(UserError):
    """Another process owns the folder."""


class Owner:
    """The process owns the folder while this object is in use (see `own`)."""

    def __init__(self, target: pathlib.Path, file: pathlib.Path, token: str, lease: float):
        self._target, self._file, self._token = target, file, token
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, args=(lease / RENEWALS,), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `UserError` if another process took the folder over, which happens to a process
        that stood still for longer than a lease. Programs call it before they replace anything."""
        if _read(self._file).token != self._token:
            raise UserError(
                f"{self._target} was taken over by another process, because this one did not "
                f"renew {self._file} for a long time: let that process end, or stop it, and then "
                "repeat this command"
            )

    def _renew(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            with contextlib.suppress(OSError):  # `check` says what is wrong
                storage.touch(self._file)

    def _release(self) -> None:
        self._stop.set()
        self._thread.join()
        if _read(self._file).token == self._token:
            _delete(self._file)


@contextlib.contextmanager
def own(target, inside: bool = False, lease: float = LEASE, wait: bool = False) -> Iterator[Owner]:
    """Owns `target` in the body of the `with` statement. It is not reentrant.

    On the machine of a dead owner (more exactly: among the processes that see each other's numbers)
    its death is seen at once. Elsewhere this function waits until the owner renews its lease, and
    refuses, or until the lease has run out, and takes the folder over.

    Args:
      target: a folder. It need not exist.
      inside: True keeps the owner file in the folder, which is created: for work directories.
        False keeps it beside the folder, whose parents are created: for folders, or files, that
        appear whole by a rename.
      lease: seconds.
      wait: for the turn of this process. What lasts longer than some seconds is said.

    Raises:
      InUse: another process owns the folder, and `wait` is False; it is named.
      OSError: the owner file cannot be written (no room, read-only, not a folder).
    """
    target = storage.path(target)
    absolute = target.absolute()
    folder, stem = (absolute, ".owner") if inside else (absolute.parent, f".{absolute.name}.owner")
    folder.mkdir(parents=True, exist_ok=True)
    pause = lease / RENEWALS / 100
    while True:
        try:
            owner = _take(target, folder, stem, lease)
            break
        except InUse as error:
            if not wait:
                raise
            if pause == LONGEST_PAUSE:
                _say_once(f"waiting: {error}")
        time.sleep(random.uniform(0, pause))
        pause = min(1.1 * pause, LONGEST_PAUSE)
    try:
        yield owner
    finally:
        owner._release()


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def is_owner_file(path: pathlib.Path) -> bool:
    """Whether a file in a folder is an owner file: no content of the folder."""
    return re.fullmatch(r"\..*owner-\d+", path.name) is not None


@dataclasses.dataclass(frozen=True)
class _Record:
    """What an owner file says. Empty fields: it is gone, or not written to its end."""

    host: str = ""
    place: str = ""  # where process numbers mean the same: boot of the machine, PID namespace
    pid: int = 0
    start: str = ""  # of the process, so that a reused number is no sign of life
    since: str = ""
    token: str = ""

    def __str__(self) -> str:
        who = f"process {self.pid} on {self.host}, since {self.since}"
        return who if self.token else "a process that does not say who it is"


def _take(target: pathlib.Path, folder: pathlib.Path, stem: str, lease: float) -> Owner:
    mine = _Record(
        host=socket.gethostname(),
        place=_place(),
        pid=os.getpid(),
        start=_start_of(os.getpid()) or "",
        since=datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        token=uuid.uuid4().hex,
    )
    for _ in range(TRIES):
        dead = {}  # {owner file: what it was like when its process was found dead}
        for file in _owner_files(folder, stem):
            dead[file] = _state(file)
            if _is_alive(file, mine, lease):
                raise _in_use(target, file)
        number = 1 + max(map(_number, dead), default=0)
        file = folder / f"{stem}-{number}"
        if not _create(file, mine):
            continue
        others = [other for other in _owner_files(folder, stem) if other != file]
        news = [other for other in others if dead.get(other) != _state(other)]
        if any(_is_alive(other, mine, lease) for other in news):
            _delete(file)
            time.sleep(random.uniform(0, 0.1))
            continue
        for other in others:
            _delete(other)
        return Owner(target, file, mine.token, lease)
    raise InUse(f"{target}: several processes want to write it at once: start one of them")


def _in_use(target: pathlib.Path, file: pathlib.Path) -> InUse:
    return InUse(
        f"{target} is in use by {_read(file)}: wait until it has ended, or stop it; or choose "
        f"another folder (its owner file is {file})"
    )


def _owner_files(folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
    pattern = re.compile(re.escape(stem) + r"-\d{1,9}")
    return sorted((p for p in folder.glob(f"{stem}-*") if pattern.fullmatch(p.name)), key=_number)


def _number(file: pathlib.Path) -> int:
    return int(file.name.rpartition("-")[2])


def _create(file: pathlib.Path, record: _Record) -> bool:
    """Writes a new owner file; False: another process did."""
    return storage.create(file, json.dumps(dataclasses.asdict(record)).encode())


def _read(file: pathlib.Path) -> _Record:
    try:
        record = _Record(**json.loads(file.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return _Record()
    return record if isinstance(record.pid, int) else _Record()


def _state(file: pathlib.Path) -> tuple[_Record, float | None]:
    return _read(file), _modified(file)


def _delete(file: pathlib.Path) -> None:
    with contextlib.suppress(OSError):  # what stays is a dead owner
        file.unlink()


def _is_alive(file: pathlib.Path, mine: _Record, lease: float) -> bool:
    """Whether the process of an owner file lives; waits for its lease where only that can tell."""
    seen, deadline = _modified(file), None
    while True:
        record, modified = _state(file)
        if modified is None:
            return False
        if record.token and record.place == mine.place:
            return _start_of(record.pid) == record.start
        if modified != seen:
            return True
        if deadline is None:
            if storage.now(file.parent) - modified > lease:
                return False
            # Its age may be wrong, if clocks are: what counts is whether somebody renews it.
            deadline = time.monotonic() + lease
            _say_once(f"waiting: {file} says that {record} works here")
        if time.monotonic() > deadline:
            return False
        time.sleep(min(0.2, lease / RENEWALS))


def _modified(file: pathlib.Path) -> float | None:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return None


def _place() -> str:
    """Processes with equal places see each other's numbers. Elsewhere than on Linux: the host."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_of(pid: int) -> str | None:
    """When the process started, in the units of /proc; "" where there is no /proc; None: no such
    process, or one that has ended and is not yet reaped."""
    if not os.path.exists("/proc/self/stat"):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, *numbers = stat.rpartition(")")[2].split()  # the name before may hold spaces
    return None if state in "ZX" else numbers[18]  # fields 3 and 22
