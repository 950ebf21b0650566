"""A process that makes attempts: worker.py WORLD SCRATCH; a line of JSON asks, a line answers.

It never sets JAX's devices up, if it is asked for commands alone, and so may be forked; what a
reader does to it is its own affair: when it dies, the attempt that killed it is known.
"""

import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from campaign import outcome
from campaign.world import World

LIMIT_SECONDS = 40  # for one reading
MEMORY = 6 << 30  # bytes that one reading may add


def main(world_folder: str, scratch_folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the answers
    world, scratch = World(pathlib.Path(world_folder)), pathlib.Path(scratch_folder)
    for line in sys.stdin:
        asked = json.loads(line)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            result = attempt(world, asked["area"], asked["seed"], scratch)
        except Exception:
            result = outcome.Outcome("broken", traceback.format_exc())
        answers.write(json.dumps([result.kind, result.detail]) + "\n")
        answers.flush()


def attempt(world: World, area: str, seed: int, scratch: pathlib.Path) -> outcome.Outcome:
    if area.startswith(("fuzz/", "damage/")):
        from campaign import readers

        def late(*_):
            raise outcome.Timeout(f"no end after {LIMIT_SECONDS} s")

        _limit_memory()
        signal.signal(signal.SIGALRM, late)
        readers.pristine(world, area)  # what the first one costs is not the attempt's
        signal.alarm(LIMIT_SECONDS)
        try:
            return readers.attempt(world, area, seed, scratch)
        finally:
            signal.alarm(0)
    from campaign import commands

    return commands.attempt(world, area, seed, scratch)


def _limit_memory() -> None:
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(*sys.argv[1:])
