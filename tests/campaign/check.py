"""Is anything silent, lost, or a stack trace? Attacks the project for a given time.

    python tests/campaign/check.py --minutes=60 --seed=0          # make campaign MINUTES=60 SEED=0
    python tests/campaign/check.py --only=kill/train --seed=17    # one attempt, again
    python tests/campaign/check.py --only=fuzz --minutes=5        # areas by the start of their name
    python tests/campaign/check.py --quick                        # half a minute, for the suite
    python tests/campaign/check.py --list

kill    a launcher gets SIGKILL, SIGTERM or SIGINT at a random time; the same command is repeated
disk    its disk, or one file, becomes full; then there is room, and the command is repeated
race    it is started twice on one target; a model is loaded while a run removes checkpoints
again   what a killed launcher left is damaged, then the command is repeated
damage  a folder that the project wrote is damaged, then read
fuzz    an input of users is changed inside its format, then read

Outcomes. same bits: equal to the undisturbed result, file by file or array by array. accepted: an
input of users that is read as another one; nothing is claimed about it. refused: one line that says
what is wrong, status 2. Bad are: trace (a stack trace), lost (missing or different without a word,
or the same command cannot continue), crash (a signal) and hang. Every attempt is made from its area
and seed alone (kills also depend on the machine's speed); files of the bad ones are kept. Exit
status: 0, or 1 if anything is bad, 2 if the campaign itself failed.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from campaign.areas import AREAS, QUICK, READERS, WEIGHTS
from campaign.outcome import ACCEPTED, BAD, CRASH, HANG, REFUSED, SAME, Outcome

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BROKEN = "broken"  # the campaign's own failure
COLUMNS = (SAME, ACCEPTED, REFUSED, *BAD, BROKEN)
LIMITS = {"fuzz": 120, "damage": 120}  # seconds of an attempt, and of making its input
LONGEST = 3600


class Worker:
    """A process that makes attempts; when it dies, the next attempt starts another."""

    def __init__(self, world: pathlib.Path, scratch: pathlib.Path):
        self.world, self.scratch = world, scratch
        self._process = None

    def _start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": os.environ.get(
                "JAX_COMPILATION_CACHE_DIR", str(self.world / "compiled")
            ),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        script = ROOT / "tests" / "campaign" / "worker.py"
        self.scratch.parent.mkdir(parents=True, exist_ok=True)
        self.log = self.scratch.with_suffix(".log")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(self.world), str(self.scratch)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            start_new_session=True,
        )

    def attempt(self, area: str, seed: int) -> Outcome:
        if self._process is None:
            self._start()
        process = self._process
        process.stdin.write((json.dumps({"area": area, "seed": seed}) + "\n").encode())
        process.stdin.flush()
        limit = LIMITS.get(area.split("/")[0], LONGEST)
        ready, _, _ = select.select([process.stdout], [], [], limit)
        line = process.stdout.readline() if ready else b""
        if line:
            return Outcome(*json.loads(line))
        about = self.scratch / "attempt.json"
        done = json.loads(about.read_text())["done"] if about.is_file() else ""
        status = process.wait() if ready else None
        self.close()
        last = self.log.read_text(errors="replace")[-1500:]
        if status is None:
            return Outcome(HANG, f"{done}\nno answer after {limit} s\n{last}")
        return Outcome(CRASH, f"{done}\nthe process ended with {status}\n{last}")

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Campaign:
    """Counts what became of attempts, keeps the bad ones, prints them when they happen."""

    def __init__(self, folder: pathlib.Path, seed: int, tells_all: bool = False):
        self.folder = folder
        self.seed = seed
        self.tells_all = tells_all
        self.counts = collections.defaultdict(collections.Counter)
        self.seconds = collections.Counter()
        self.bad: list[tuple[str, int, Outcome]] = []
        self._tried = collections.Counter()
        self._busy = set()
        self._lock = threading.Lock()

    def next(self, areas: list[str]) -> tuple[str, int]:
        """The area that has had the least of its share of time, and its next seed."""
        with self._lock:
            kinds = collections.Counter(area.split("/")[0] for area in areas)

            def spent(area: str) -> float:
                kind = area.split("/")[0]
                share = WEIGHTS[kind] / kinds[kind]
                return (self.seconds[area] + 30 * (area in self._busy)) / share

            area = min(areas, key=lambda a: (self._tried[a] > 0, spent(a)))
            self._busy.add(area)
            seed = self.seed + self._tried[area]
            self._tried[area] += 1
            return area, seed

    def run(self, worker: Worker, area: str, seed: int) -> None:
        begin = time.monotonic()
        result = worker.attempt(area, seed)
        with self._lock:
            self._busy.discard(area)
            self.seconds[area] += time.monotonic() - begin
            self.counts[area][result.kind] += 1
            is_bad = result.kind in (*BAD, BROKEN)
            if is_bad:
                self.bad.append((area, seed, result))
                self._keep(worker.scratch, area, seed, result)
            if is_bad or self.tells_all:
                print(f"{result.kind}: --only={area} --seed={seed}: {_short(result)}", flush=True)

    def _keep(self, scratch: pathlib.Path, area: str, seed: int, result: Outcome) -> None:
        kept = self.folder / "bad" / f"{area.replace('/', '-')}-{seed}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        (kept / "outcome.txt").write_text(f"{result.kind}\n{result.detail}\n", errors="replace")
        with contextlib.suppress(shutil.Error, OSError):  # what still runs there removes files
            shutil.copytree(scratch, kept / "files", symlinks=True, dirs_exist_ok=True)

    def print_table(self) -> None:
        print(f"\n{'area':24}{'tried':>8}" + "".join(f"{column:>10}" for column in COLUMNS))
        total = collections.Counter()
        for area in sorted(self.counts):
            total += self.counts[area]
            self._print_row(area, self.counts[area])
        self._print_row("all", total)
        seeds = collections.defaultdict(list)
        for area, seed, result in self.bad:
            seeds[result.kind, area].append(str(seed))
        for (kind, area), found in sorted(seeds.items()):
            print(f"{kind}: --only={area} --seed={' '.join(found[:40])}")
        if self.bad:
            print(f"their files: {self.folder / 'bad'}")

    @staticmethod
    def _print_row(name: str, counts: collections.Counter) -> None:
        print(f"{name:24}{counts.total():8}" + "".join(f"{counts[c]:10}" for c in COLUMNS))


def _short(result: Outcome) -> str:
    lines = [line for line in result.detail.splitlines() if line.strip()]
    return " | ".join([*lines[:1], *lines[1:][-1:]])[:400]


def attack(campaign: Campaign, areas: list[str], minutes: float, jobs: int) -> None:
    """Attempts in `areas` for `minutes`; once each for 0. Ctrl-C ends it after those that run."""
    end = time.monotonic() + 60 * minutes
    stopped = []  # no Event: a second signal may come while the first one sets it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.append(True))

    def attempts(number: int):
        if not minutes:
            yield from ((area, campaign.seed) for area in areas[number::jobs])
        while time.monotonic() < end and not stopped:
            yield campaign.next(areas)

    _in_parallel(campaign, [attempts(number) for number in range(jobs)])


def _in_parallel(campaign: Campaign, streams) -> None:
    with concurrent.futures.ThreadPoolExecutor(len(streams)) as pool:
        running = [pool.submit(work, campaign, s, str(n)) for n, s in enumerate(streams)]
        for future in running:
            future.result()  # raises what went wrong there


def work(campaign: Campaign, attempts, name: str) -> None:
    """Makes the attempts, one after the other."""
    # Readers set JAX's devices up, after which commands cannot be forked from a process.
    world = campaign.folder / "world"
    folder = campaign.folder / str(os.getpid())  # campaigns may share a world
    reader, command = (Worker(world, folder / f"{kind}_{name}") for kind in ("read", "command"))
    with contextlib.closing(reader), contextlib.closing(command):
        for area, seed in attempts:
            campaign.run(reader if area in READERS else command, area, seed)


def quick(campaign: Campaign) -> None:
    """Fixed seeds: what they find must not depend on the machine."""
    fixed = [(area, seed) for area, seeds in QUICK.items() for seed in seeds]
    readings = [attempt for attempt in fixed if attempt[0] in READERS]
    commands = [attempt for attempt in fixed if attempt[0] not in READERS]
    _in_parallel(campaign, (readings, commands))


def main(arguments=None) -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--only", default="", help="areas, or beginnings of their names, with commas"
    )
    flags.add_argument("--seed", type=int, default=0, help="of the first attempt in each area")
    flags.add_argument("--minutes", type=float, default=0, help="0: one attempt in each area")
    flags.add_argument("--jobs", type=int, default=os.cpu_count(), help="attempts at a time")
    flags.add_argument(
        "--folder", help="where inputs and bad attempts are kept; default: temporary"
    )
    flags.add_argument("--quick", action="store_true", help="the fixed attempts of the suite")
    flags.add_argument("--list", action="store_true", help="print the areas and run nothing")
    given = flags.parse_args(arguments)
    begins = tuple(name for name in given.only.split(",") if name) or ("",)
    areas = [area for area in AREAS if area.startswith(begins)]
    if not areas:
        flags.error(f"--only={given.only}: there are: {', '.join(AREAS)}")
    if given.list:
        print("\n".join(areas))
        return 0
    folder = pathlib.Path(given.folder or tempfile.mkdtemp(prefix="campaign-")).absolute()
    campaign = Campaign(folder, given.seed, tells_all=not (given.minutes or given.quick))
    if given.quick:
        quick(campaign)
    else:
        attack(campaign, areas, given.minutes, min(given.jobs, len(areas)))
    shutil.rmtree(folder / str(os.getpid()), ignore_errors=True)
    campaign.print_table()
    kinds = {result.kind for _, _, result in campaign.bad}
    if not given.folder and not campaign.bad:
        shutil.rmtree(folder)
    return 2 if BROKEN in kinds else int(bool(kinds))


if __name__ == "__main__":
    sys.exit(main())
