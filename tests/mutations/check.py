"""Does the suite notice mistakes? Puts single faults into copies of the repository and runs tests.

    python tests/mutations/check.py                            # every fault: half an hour
    python tests/mutations/check.py --only=routing --jobs=1    # of an area, or by name
    python tests/mutations/check.py --list

A fault is noticed if its tests fail, and survives if they pass. Tests that fail without the fault,
select nothing or do not end are an error. Exit status: 0 all noticed, 1 survivors, 2 errors.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from mutations import (
    curation,
    data,
    embedder,
    evaluation,
    interop,
    losses,
    models,
    planning,
    routing,
    search,
    training,
)
from mutations.fault import PACKAGE, Fault, problems

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
MODULES = (
    *(routing, losses, models, training, data, curation),
    *(search, evaluation, interop, planning, embedder),
)
AREAS = {module.__name__.removeprefix("mutations."): module.FAULTS for module in MODULES}
# The same examples in every run, so that the score is of the code alone; the first that fails is
# enough, where hypothesis would look for a smaller one.
PYTEST = """
import hypothesis, pytest, sys
phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile("once", derandomize=True, database=None, phases=phases)
hypothesis.settings.load_profile("once")
sys.exit(pytest.main())
"""
FLAGS = ("-x", "-q", "--tb=no", "-p", "no:cacheprovider")
LIMIT_SECONDS = 900  # of tests without a fault
NOTICED, SURVIVED, BROKEN = "noticed", "survived", "broken"
MEANINGS = {
    None: "the tests did not end in time",
    2: "the tests cannot be collected",
    4: "pytest does not start or find the tests",
    5: "no test is selected",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What tests did. status: of pytest, None if they had to be stopped."""

    status: int | None
    seconds: float
    output: str

    @property
    def why(self) -> str:
        """The first test that failed, or what else went wrong."""
        lines = self.output.splitlines()
        failed = [line for line in lines if line.startswith(("FAILED ", "ERROR"))]
        last = failed or lines[-1:]
        return "; ".join([MEANINGS.get(self.status, ""), *last[:1]]).strip("; ")[:200]


class Copy:
    """The files of the repository that git tracks, in a folder in which one fault at a time is."""

    def __init__(self, root: pathlib.Path, folder: pathlib.Path, compiled: pathlib.Path):
        self.folder = folder
        names = subprocess.run(
            ["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True
        )
        for name in names.stdout.rstrip("\0").split("\0"):
            if (root / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, folder / name)
        # Bytecode in __pycache__ beside the sources, where `_write` finds it.
        dropped = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
        self.environment = {k: v for k, v in os.environ.items() if k not in dropped} | {
            "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "tests")]),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "COLUMNS": "200",  # the summary's lines are cut there
        }
        code = f"import {PACKAGE}; print({PACKAGE}.__file__)"
        found = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder.parent,
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        if pathlib.Path(found).resolve() != (folder / PACKAGE / "__init__.py").resolve():
            raise RuntimeError(f"the tests would import {found}, not the copy in {folder}")
        print(f"tests import {found}", flush=True)

    @contextlib.contextmanager
    def with_fault(self, fault: Fault):
        path = self.folder / fault.path
        whole = path.read_text()
        self._write(path, fault.apply(whole))
        try:
            yield
        finally:
            self._write(path, whole)

    @staticmethod
    def _write(path: pathlib.Path, text: str) -> None:
        """Bytecode is known by size and second of its source, which two edits may share."""
        for old in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            old.unlink()
        path.write_text(text)

    def run(self, arguments: list[str], limit: float) -> Result:
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", PYTEST, *FLAGS, f"--basetemp={self.folder}.tmp", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that tests have started
            output, status = process.communicate()[0], None
        return Result(status, time.monotonic() - start, output)


class Copies:
    """As many copies as there are jobs, each lent to one job at a time."""

    def __init__(self, root: pathlib.Path, folder: pathlib.Path, jobs: int):
        self._free = queue.SimpleQueue()
        for job in range(jobs):
            self._free.put(Copy(root, folder / f"copy_{job}", folder / "compiled"))

    @contextlib.contextmanager
    def one(self):
        copy = self._free.get()
        try:
            yield copy
        finally:
            self._free.put(copy)

    def without_fault(self, arguments: tuple[str, ...]) -> Result:
        with self.one() as copy:
            result = copy.run(list(arguments), LIMIT_SECONDS)
        # Skipped tests alone pass too, and notice nothing.
        if result.status == 0 and not re.search(r"\b[1-9]\d* passed", result.output):
            return dataclasses.replace(result, status=5)
        return result

    def with_fault(self, fault: Fault, whole: Result) -> tuple[str, Result]:
        if whole.status != 0:
            return BROKEN, whole
        with self.one() as copy, copy.with_fault(fault):
            result = copy.run(fault.arguments, 120 + 5 * whole.seconds)
        return {1: NOTICED, 0: SURVIVED}.get(result.status, BROKEN), result


def check(root: pathlib.Path, areas: dict[str, tuple[Fault, ...]], jobs: int) -> int:
    """Runs all faults and prints what became of them; returns the exit status."""
    faults = {f: area for area, inside in areas.items() for f in inside if not f.equivalent}
    verdicts: dict[Fault, str] = {}
    reasons: dict[Fault, str] = {}
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies = Copies(root, pathlib.Path(folder), jobs)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            selections = list(dict.fromkeys(tuple(fault.arguments) for fault in faults))
            whole = {}
            for tests, result in zip(
                selections, pool.map(copies.without_fault, selections), strict=True
            ):
                whole[tests] = result
                said = "pass" if result.status == 0 else f"ERROR: {result.why}"
                print(f"without a fault: {' '.join(tests)}: {said}", flush=True)
            running = {
                pool.submit(copies.with_fault, fault, whole[tuple(fault.arguments)]): fault
                for fault in faults
            }
            for future in concurrent.futures.as_completed(running):
                fault = running[future]
                verdicts[fault], result = future.result()
                reasons[fault] = fault.tests if verdicts[fault] == SURVIVED else result.why
                if whole[tuple(fault.arguments)].status != 0:
                    reasons[fault] = f"without the fault too: {result.why}"
                what = f"{verdicts[fault]:8}  {faults[fault]}: {fault.name}"
                print(f"{what} ({result.seconds:.0f} s): {reasons[fault]}", flush=True)
    print_table(areas, verdicts)
    for verdict in (SURVIVED, BROKEN):
        for fault in (f for f in faults if verdicts[f] == verdict):
            print(f"{verdict}: {faults[fault]}: {fault.name} ({fault.path}): {reasons[fault]}")
    for fault in (f for inside in areas.values() for f in inside if f.equivalent):
        print(f"not counted: {fault.name} ({fault.path}): {fault.equivalent}")
    found = set(verdicts.values())
    return 2 if BROKEN in found else int(SURVIVED in found)


def print_table(areas: dict[str, tuple[Fault, ...]], verdicts: dict[Fault, str]) -> None:
    columns = (NOTICED, SURVIVED, BROKEN)
    total = collections.Counter(verdicts.values())
    print(f"\n{'area':12}{'faults':>10}" + "".join(f"{column:>10}" for column in columns))
    for area, inside in areas.items():
        counts = collections.Counter(verdicts[fault] for fault in inside if fault in verdicts)
        numbers = (counts.total(), *(counts[column] for column in columns))
        print(f"{area:12}" + "".join(f"{number:10}" for number in numbers))
    share = total[NOTICED] / max(total.total(), 1)
    print(f"noticed: {total[NOTICED]} of {total.total()} ({share:.1%})")


def selected(areas: dict[str, tuple[Fault, ...]], only: str) -> dict[str, tuple[Fault, ...]]:
    """The areas and faults that `only` names, separated by commas; everything for ""."""
    wanted = {name for name in only.split(",") if name}
    known = {*areas, *(fault.name for inside in areas.values() for fault in inside)}
    if unknown := sorted(wanted - known):
        raise ValueError(f"--only={only}: no area or fault is called {', '.join(unknown)}")
    found = {
        area: tuple(f for f in inside if not wanted or {area, f.name} & wanted)
        for area, inside in areas.items()
    }
    return {area: inside for area, inside in found.items() if inside}


def main(arguments=None, root=ROOT, areas=AREAS) -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--only", default="", help="names of faults or areas, separated by commas")
    flags.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults at a time")
    flags.add_argument("--list", action="store_true", help="print the faults and run nothing")
    given = flags.parse_args(arguments)
    try:
        areas = selected(areas, given.only)
    except ValueError as error:
        flags.error(str(error))
    if given.list:
        for area, inside in areas.items():
            for fault in inside:
                print(f"{area}: {fault.name} ({fault.path}): {fault.tests}")
        return 0
    if found := problems(root, areas):
        print("\n".join(f"error: {problem}" for problem in found), file=sys.stderr)
        return 2
    return check(root, areas, given.jobs)


if __name__ == "__main__":
    sys.exit(main())
