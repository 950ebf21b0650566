"""What each step was made with: WORKDIR/recipe/STEP.json.

{"id": of this making of the step, "arguments", "after": {step it needed: its id}, "seconds",
 "finished", "crc32": of all the others}
"""

import contextlib
import fcntl
import json
import os
import pathlib
import time
import uuid

from moe_embed_jax import storage
from moe_embed_jax.checksums import take_own, with_own
from moe_embed_jax.config import differences, save_json
from moe_embed_jax.errors import UserError
from moe_embed_jax.json_file import read_object
from moe_embed_jax.ownership import own
from moe_embed_jax.recipe.steps import Step

FOLDER = "recipe"
_KEYS = {"id", "arguments", "after", "seconds", "finished"}
LONGEST_WAIT = 600  # seconds for a process that a killed recipe left behind, which may save


class Records:
    """The records of one work directory."""

    def __init__(self, workdir: pathlib.Path):
        self.workdir = workdir
        self.folder = workdir / FOLDER

    def read(self, name: str) -> dict | None:
        path = self.folder / f"{name}.json"
        if not storage.has_entry(path):
            return None
        record = read_object(path)
        # Earlier versions wrote no checksum.
        if take_own(record) is False or record.keys() != _KEYS:
            raise UserError(
                f"{path} is damaged (its CRC-32 differs): put the right file back, or remove it "
                f"and {self.workdir / name}"
            )
        return record

    def write(self, name: str, record: dict) -> None:
        save_json(self.folder / f"{name}.json", with_own(record))

    def check(self, steps: list[Step]) -> None:
        """Raises `UserError` where a step, done or begun, is not what it would be now."""
        for i, step in enumerate(steps):
            if not step.folder.exists():
                continue
            record = self.read(step.name)
            if record is None:
                raise UserError(
                    f"{step.folder} is there, and no record of this recipe says how it was made: "
                    "move it away, or use another --workdir"
                )
            later = [str(s.folder) for s in steps[i:] if s is step or _depends(s, step, steps)]
            remedy = f"use another --workdir, or delete {' '.join(later)}"
            # As a file has them: lists for tuples.
            now = json.loads(json.dumps(step.arguments))
            if lines := differences(record["arguments"], now):
                raise UserError(
                    f"step {step.name} was made with other settings ({'; '.join(lines)}): give "
                    f"the old ones, {remedy}"
                )
            for name, identity in record["after"].items():
                above = self.read(name)
                folder = next(s.folder for s in steps if s.name == name)
                if above is None or above["id"] != identity or not folder.exists():
                    raise UserError(
                        f"step {step.name} was made from another {name} than the one that is "
                        f"there now: {remedy}"
                    )

    def begin(self, step: Step) -> dict:
        """The record of a step that is about to run: a new one unless it was begun before."""
        made_of = {
            # As a file has them: lists for tuples.
            "arguments": json.loads(json.dumps(step.arguments)),
            "after": {name: self.read(name)["id"] for name in step.needs},
        }
        record = self.read(step.name)
        # The folder of a step that was begun may not be there yet.
        goes_on = record is not None and (step.folder.exists() or not record["finished"])
        if not goes_on or any(record[key] != value for key, value in made_of.items()):
            record = {"id": uuid.uuid4().hex, **made_of, "seconds": 0.0, "finished": False}
            self.write(step.name, record)
        return record


def _depends(step: Step, on: Step, steps: list[Step]) -> bool:
    if on.name in step.needs:
        return True
    return any(_depends(s, on, steps) for s in steps if s.name in step.needs)


@contextlib.contextmanager
def lock(workdir: pathlib.Path, say=print, longest_wait: float = LONGEST_WAIT):
    """Holds the lock of a work directory; gives its file descriptor, for processes to inherit.

    A process that a killed recipe left behind on this machine holds it until it ends. Recipes on
    other machines are refused by the owner of the work directory. Raises `UserError` when another
    process works there and does not end.
    """
    folder = storage.local_place(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".recipe.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        start, has_reported = time.monotonic(), False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() - start > longest_wait:
                    raise UserError(
                        f"another process works in {workdir}: wait for it, or end it"
                    ) from None
            if not has_reported:
                say(f"waiting for another process that works in {workdir}")
                has_reported = True
            time.sleep(0.2)
        with own(workdir, inside=True):
            yield descriptor
    finally:
        os.close(descriptor)
