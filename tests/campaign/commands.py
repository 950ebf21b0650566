"""The launchers under kills, full disks, races and damaged work: what is left is repeated.

The same command is given again, and its result compared, file by file or array by array, with that
of an undisturbed run.
"""

import ctypes
import dataclasses
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import time

from campaign import damage, outcome, results, start
from campaign.outcome import CRASH, HANG, LOST, REFUSED, SAME, TRACE, Outcome
from campaign.world import World

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclasses.dataclass(frozen=True)
class Command:
    """argv: flags, in which {part} is a part of the world and {out} the target to make.

    result: "files" of the target, or "run": arrays of the newest checkpoint and the records.
    processes, devices: of the run, devices of each process.
    """

    argv: tuple[str, ...]
    target: str = "target"
    result: str = "files"
    without: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    processes: int = 1
    devices: int = 1


def _train(config: str, **more) -> Command:
    argv = ("launch/train.py", f"--config={{config}}/{config}.py", "--workdir={out}")
    return Command(argv, result="run", parts=("config",), **more)


EMBED = ("launch/embed.py", "--model={model}", "--input={texts}/texts.jsonl", "--prompt=query")
CURATED = ("--pairs={pairs}", "--teacher={model}", "--output={out}")
COMMANDS = {
    "train": _train("run"),
    "train_masked": _train("masked"),
    "train_4_devices": _train("run", devices=4),
    "train_2_processes": _train("run", processes=2, devices=2),
    "embed_npy": Command(
        (*EMBED, "--output={out}"),
        target="target.npy",
        parts=("model", "texts"),
    ),
    "embed_zarr": Command(
        (*EMBED, "--output={out}"),
        target="target.zarr",
        parts=("model", "texts"),
    ),
    "filter": Command(("launch/filter.py", *CURATED, "--chunk=40"), parts=("pairs", "model")),
    "mine": Command(
        ("launch/mine.py", *CURATED, "--count=3", "--search=20"),
        parts=("pairs", "model"),
    ),
    "evaluate": Command(
        ("launch/evaluate.py", "--model={model}", "--dataset={beir}", "--output={out}"),
        target="target.json",
        parts=("model", "beir"),
    ),
    "suite": Command(
        (
            *("launch/evaluate.py", "--model={model}", "--suite={sets}/suite.py"),
            *("--data={sets}", "--output={out}", "--name=a/b"),
        ),
        without=("vectors", "png", "model_meta"),
        parts=("model", "sets"),
    ),
    "import": Command(
        ("launch/convert.py", "import", "--source={model}", "--target={out}"),
        result="run",
        parts=("model",),
    ),
    "upcycle": Command(
        ("launch/convert.py", "upcycle", "--source={dense}", "--target={out}", "--mode=paper"),
        result="run",
        parts=("dense",),
    ),
    "export": Command(
        ("launch/convert.py", "export", "--source={imported}", "--target={out}"),
        parts=("imported",),
    ),
    "prepare": Command(
        (
            *("launch/prepare.py", "--sources={raw}/sources.json", "--output={out}"),
            *("--max_bad_share=0.9", "--rows_per_shard=16"),
        ),
        without=("report", "work"),
        parts=("raw",),
    ),
    "recipe": Command(
        (
            *("launch/recipe.py", "--workdir={out}", "--config={root}/configs/recipe.py:smoke"),
            *("--config.data_dir={data}", "--config.prepare.mixture=''"),
            "--config.prepare.sources={recipe_sources}/sources.json",
            "--config.stage1.set.data.vocabulary.size=512",
            "--config.stage1.set.model.vocab_size=512",
            "--config.stage2.set.data.query_length=16",
            "--config.stage2.set.data.document_length=24",
            "--config.stage2.set.data.chunk_rows=0",
            *(f"--config.stage{i}.set.model.remat_rows=0" for i in (2, 3)),
        ),
        result="recipe",
        parts=("data", "recipe_sources"),
    ),
}


class Place:
    """Where one attempt runs a command: a folder with its target and nothing else, and logs."""

    def __init__(self, world: World, name: str, scratch: pathlib.Path):
        self.command = COMMANDS[name]
        self.name, self.world, self.scratch = name, world, scratch
        self.folder, self.logs = scratch / "place", scratch / "logs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        self.target = self.folder / self.command.target
        self.started = 0

    def start(self, cold: bool = False, files: int = 0, more=()) -> list[start.Child]:
        """Its processes."""
        parts = {part: self.world.part(part) for part in self.command.parts}
        argv = [a.format(out=self.target, root=start.ROOT, **parts) for a in self.command.argv]
        self.started += 1
        count, port = self.command.processes, _free_port()
        children = []
        for index in range(count):
            environment = {}
            if self.command.devices > 1:
                flag = f"--xla_force_host_platform_device_count={self.command.devices}"
                environment["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}"
                environment["JAX_COMPILATION_CACHE_DIR"] = str(self.scratch / "compiled")
            if count > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(index),
                }
            log = f"{self.started}_{index}"
            child = start.Child([*argv, *more], self.logs, log, environment, cold, files)
            children.append(child)
        return children

    def result(self) -> dict[str, str]:
        """What is in the target, and the names of all that is beside it."""
        names = {f"beside/{path.name}": "" for path in self.folder.iterdir()}
        if not self.target.exists():
            return names
        if self.command.result == "recipe":
            return names | results.of_recipe(self.target)
        if self.command.result == "files":
            return names | results.of_files(self.target, self.command.without)
        output = self.logs / "arrays.json"
        output.unlink(missing_ok=True)
        script = ["tests/campaign/results.py", str(self.target), str(output)]
        if start.Child(script, self.logs, "arrays").wait() != 0:
            return names | {"arrays": "cannot be read"}
        return names | results.of_run(self.target, json.loads(output.read_text()))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def reference(world: World, name: str) -> dict:
    """Of an undisturbed run: its result, seconds, and bytes on disk; kept in the world."""
    path = world.folder / f"reference_{name}.json"
    world.make_apart(COMMANDS[name].parts)
    with world.lock(f"reference_{name}"):
        if not path.is_file():
            scratch = world.folder / f"undisturbed_{name}"
            shutil.rmtree(scratch, ignore_errors=True)
            place = Place(world, name, scratch)
            begin = time.monotonic()
            children = place.start()
            statuses = [child.wait() for child in children]
            if any(status != 0 for status in statuses):  # None: it was ended at the limit
                raise RuntimeError(f"{name}, undisturbed: {statuses}: {children[0].errors[-2000:]}")
            seconds = time.monotonic() - begin
            size = sum(p.stat().st_size for p in place.folder.rglob("*") if p.is_file())
            about = {"result": place.result(), "seconds": seconds, "bytes": size}
            if len(about["result"]) < 2:
                raise RuntimeError(f"{name}, undisturbed: nothing was made: {about}")
            path.write_text(json.dumps(about))
    return json.loads(path.read_text())


def attempt(world: World, area: str, seed: int, scratch: pathlib.Path) -> Outcome:
    start.preload()
    kind, _, name = area.partition("/")
    rng = random.Random(f"{area} {seed}")
    if kind == "disk":
        return _on_small_disk(world, name, rng, scratch)
    return {"kill": kill, "race": race, "again": damaged_work}[kind](world, name, rng, scratch)


def _complaint(children, allowed: tuple[int, ...]) -> Outcome | None:
    """What is wrong with how these processes ended."""
    for child in children:
        if child.status is None:
            return Outcome(HANG, f"no end: {child.errors[-1500:]}")
        if "Traceback (most recent call last)" in child.errors:
            return Outcome(TRACE, child.errors[-2500:])
        if child.status < 0 and child.status not in allowed:
            return Outcome(CRASH, f"signal {-child.status}: {child.errors[-1500:]}")
        if child.status not in (0, 2, *allowed):
            return Outcome(TRACE, f"status {child.status}: {child.errors[-1500:]}")
    return None


def again(place: Place, done: str, cold: bool = False) -> Outcome:
    """Gives the command once more and compares."""
    expected = reference(place.world, place.name)["result"]
    children = place.start(cold)
    statuses = [child.wait() for child in children]
    if complaint := _complaint(children, ()):
        return Outcome(complaint.kind, f"{done}; then the same command: {complaint.detail}")
    differs = outcome.difference(expected, place.result())
    said = children[0].errors.strip()[-600:]
    if not differs:
        return Outcome(SAME, done)
    if any(statuses):
        return Outcome(LOST, f"{done}; the same command cannot continue: {said} ({differs})")
    return Outcome(LOST, f"{done}; another result: {differs}; {said}")


def kill(world: World, name: str, rng: random.Random, scratch: pathlib.Path) -> Outcome:
    """A signal at a random time, once or twice, then the same command."""
    seconds = reference(world, name)["seconds"]
    place, cold, done = Place(world, name, scratch), rng.random() < 0.2, []
    for _ in range(rng.choice((1, 1, 2))):
        number = rng.choice(SIGNALS)
        # Before that Python, and not yet the project, answers a signal.
        after = rng.uniform(0, 1.1 * seconds) + (1.5 if cold else 0.1)
        children = place.start(cold)
        deadline = time.monotonic() + after
        while time.monotonic() < deadline and any(child.poll() is None for child in children):
            time.sleep(0.002)
        for child in children if number == signal.SIGKILL else rng.sample(children, 1):
            child.send(number)
        done.append(f"{signal.Signals(number).name} after {after:.2f} s of {seconds:.2f}")
        for child in children:
            child.wait(90)
        # A process whose fellow ended alone ends with 134, or is ended by jax's runtime.
        fellow = (134, -signal.SIGABRT) if len(children) > 1 else ()
        if complaint := _complaint(children, (-number, 128 + number, *fellow)):
            return Outcome(complaint.kind, f"{', '.join(done)}: {complaint.detail}")
    return again(place, ", ".join(done), cold=cold)


def race(world: World, name: str, rng: random.Random, scratch: pathlib.Path) -> Outcome:
    """The same command twice at once; or a reader beside a run that removes checkpoints."""
    seconds = reference(world, name.replace("load", "train"))["seconds"]
    if name == "load":
        place = Place(world, "train", scratch)
        children = place.start(more=["--config.checkpoint_every=1"])
        while not (place.target / "checkpoints").is_dir() and children[0].poll() is None:
            time.sleep(0.01)
        script = ["tests/campaign/load_beside.py", str(place.target)]
        children.append(start.Child(script, place.logs, "load"))
        done = "loads beside a run that saves every step"
    else:
        place = Place(world, name, scratch)
        children = place.start()
        after = rng.choice((0, rng.uniform(0, seconds)))
        time.sleep(after)
        children += place.start()
        done = f"the same command {after:.2f} s later"
    statuses = [child.wait() for child in children]
    if complaint := _complaint(children, ()):
        return Outcome(complaint.kind, f"{done}: {complaint.detail}")
    said = "; ".join(child.errors.strip()[-200:] for child in children if child.status == 2)
    if name == "load":
        expected = reference(world, "train")["result"]
        own = {k: v for k, v in place.result().items() if "config.json" not in k}
        expected = {k: v for k, v in expected.items() if "config.json" not in k}
        differs = outcome.difference(expected, own)
        return Outcome(
            LOST if differs else SAME, f"{done}: {differs}; {children[-1].out.read_text()}"
        )
    if 0 not in statuses:
        return Outcome(LOST, f"{done}: {statuses}: {said}")
    differs = outcome.difference(reference(world, name)["result"], place.result())
    return Outcome(LOST if differs else SAME, f"{done}: {statuses}: {differs} {said}")


def damaged_work(world: World, name: str, rng: random.Random, scratch: pathlib.Path) -> Outcome:
    """What a killed command left is damaged; the same command repairs, refuses by name, or starts
    again."""
    seconds = reference(world, name)["seconds"]
    half = world.folder / f"half_{name}_{(number := rng.randrange(4))}"
    place = Place(world, name, scratch)
    with world.lock(half.name):
        for sooner in range(8) if not half.is_dir() else ():
            shutil.rmtree(place.folder)
            place.folder.mkdir()
            children = place.start()
            time.sleep(seconds * (0.5 + 0.15 * number) * 0.7**sooner)
            was_killed = all(child.poll() is None for child in children)
            for child in children:
                child.send(signal.SIGKILL)
                child.wait()
            if was_killed:  # what has ended is only refused again
                break
        if not half.is_dir():
            shutil.copytree(place.folder, half)
    shutil.rmtree(place.folder)
    shutil.copytree(half, place.folder)
    if not any(path.is_file() for path in place.folder.rglob("*")):
        return again(place, "nothing was there to damage")
    done = damage.damage(
        rng, place.folder, scratch / "outside", skip=("tensorboard", "report", "png")
    )
    outcome.write_input(scratch, {"area": f"again/{name}", "done": done})
    expected = reference(world, name)["result"]
    children = place.start()
    statuses = [child.wait() for child in children]
    if complaint := _complaint(children, ()):
        return Outcome(complaint.kind, f"{done}: {complaint.detail}")
    said = children[0].errors.strip()[-600:]
    # A file of records may be moved away; a run without it says so.
    without = f"{done.partition(':')[0].rpartition('/')[2]} has no records"
    if any(statuses) or without in children[0].errors:
        return Outcome(REFUSED, f"{done}: {said}")
    differs = outcome.difference(expected, place.result())
    # A result without the damaged file's own bytes is compared as a whole: nothing is exempt.
    return Outcome(LOST if differs else SAME, f"{done}: {differs}; {said}")


def _on_small_disk(world: World, name: str, rng: random.Random, scratch: pathlib.Path) -> Outcome:
    """A disk, or one file, that becomes full; then there is room, and the same command."""
    about = reference(world, name)
    place = Place(world, name, scratch)
    limit = int(rng.uniform(0.02, 1.0) * about["bytes"]) + 4096
    if rng.random() < 0.4 or COMMANDS[name].result == "recipe":
        files = limit if rng.random() < 0.3 else rng.choice((1, 100, 4096, 20_000))
        return _full(place, place.start(files=files), f"files of at most {files} bytes")
    answer, child = scratch / "answer.json", os.fork()
    if child == 0:  # a file system of its own, which ends with this process
        try:
            os.setsid()
            if rng.random() < 0.2:
                mount(place.folder, "size=1g")
                mount(place.folder, "remount,ro")
                done = "a disk that can only be read"
            else:
                mount(place.folder, f"size={limit}")
                done = f"a disk of {limit} bytes"
            room = functools.partial(mount, place.folder, "remount,rw,size=1g")
            result = _full(place, place.start(), done, room)
        except OSError as error:
            result = Outcome("broken", f"no disk: {error}")
        except BaseException as error:
            result = Outcome("broken", f"{type(error).__name__}: {error}")
        answer.write_text(json.dumps([result.kind, result.detail]))
        os._exit(0)
    os.waitpid(child, 0)
    return Outcome(*json.loads(answer.read_text()))


def mount(folder: pathlib.Path, options: str) -> None:
    """A tmpfs on `folder` that this process and its children alone see."""
    if not options.startswith("remount"):
        libc = ctypes.CDLL(None, use_errno=True)
        own_mounts, own_users = 0x00020000, 0x10000000
        if libc.unshare(own_mounts | (own_users if os.getuid() else 0)):
            raise OSError(ctypes.get_errno(), "unshare")
        subprocess.run(["mount", "--make-rprivate", "/"], check=False, capture_output=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "campaign", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(result.returncode, result.stderr)


def _full(place: Place, children, done: str, room=lambda: None) -> Outcome:
    for child in children:
        child.wait(120)
    if complaint := _complaint(children, ()):
        return Outcome(complaint.kind, f"{done}: {complaint.detail}")
    room()
    statuses = [child.status for child in children]
    return again(place, f"{done}: {statuses} {children[0].errors.strip()[-300:]}")
