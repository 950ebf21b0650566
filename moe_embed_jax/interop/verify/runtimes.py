"""The runtimes that read an exported folder by themselves, each in a process of its own.

One process for each because their libraries want different releases of the same packages, and
because a crash of one is then its own.
"""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np

from moe_embed_jax.interop.verify.compare import Result
from moe_embed_jax.interop.verify.known import RUNTIMES, Runtime

_HERE = pathlib.Path(__file__).parent
_SECONDS = 1800  # until a runtime counts as hanging; a large model embeds a long text in a minute
_RESULT = "verify-result "  # as worker.py and worker.mjs have it


class Absent(Exception):
    """A runtime that is not here, or a file for it; the message says how to get it."""


class Failed(Exception):
    """A runtime that ended without an answer; the message is what it said last."""


def answer_of(
    name: str, folder: pathlib.Path, request: dict, python: str | None, node_folder: str
) -> tuple[Result, str]:
    """(what a runtime makes of the texts of `request`, its precision).

    Args:
      name: of RUNTIMES.
      folder: an export on this machine's disk.
      request: as worker.py has it, without runtime, folder and file.
      python: that has the runtime's packages; None: this one.
      node_folder: which has `node_modules`.

    Raises:
      Absent, Failed
    """
    runtime = RUNTIMES[name]
    file = _file(runtime, folder)
    if runtime.node:
        command, place = _node_command(runtime, node_folder), node_folder
        file = os.fspath((folder / file).absolute())
    else:
        missing = [each for each in runtime.packages if importlib.util.find_spec(each) is None]
        if python is None and missing:
            raise Absent(f"{', '.join(missing)} is not installed: {runtime.install}")
        command, place = [python or sys.executable, os.fspath(_HERE / "worker.py")], None
    full = request | {"runtime": name, "folder": os.fspath(folder.absolute()), "file": file}
    answer = _run(command, full, place)
    if "missing" in answer:
        raise Absent(f"it cannot be imported ({answer['missing']:.160}): {runtime.install}")
    width = request["width"]
    rows = [[np.nan] * width if row is None else row for row in answer["vectors"]]
    if len({len(row) for row in rows}) > 1:
        raise Failed("its vectors have different widths")
    result = Result(
        answer["version"],
        answer["ids"],
        np.array(rows, np.float32),
        answer["ms"],
        {int(i): reason for i, reason in answer["refused"].items()},
    )
    return result, answer.get("precision", runtime.precision)


def _file(runtime: Runtime, folder: pathlib.Path) -> str:
    """The name of the file that the runtime reads; "" if it reads the folder."""
    if not runtime.file:
        return ""
    found = sorted(folder.glob(runtime.file))
    if not found:
        raise Absent(f"the folder has no {runtime.file}: {runtime.make}")
    return found[0].relative_to(folder).as_posix()


def _node_command(runtime: Runtime, node_folder: str) -> list[str]:
    node = shutil.which("node")
    if node is None:
        raise Absent(f"node is not installed; then {runtime.install}")
    (package,) = runtime.packages
    if not (pathlib.Path(node_folder) / "node_modules" / package).is_dir():
        raise Absent(f"{package} is not in {node_folder}/node_modules: {runtime.install}")
    code = (_HERE / "worker.mjs").read_text()
    return [node, "--input-type=module", "--eval", code]


def _run(command: list[str], request: dict, place: str | None) -> dict:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": "",
    }
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment,
            cwd=place,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"no answer after {_SECONDS} s") from None
    except OSError as error:
        raise Absent(f"{command[0]} cannot be started: {error.strerror}") from None
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_RESULT):
            try:
                return json.loads(line.removeprefix(_RESULT))
            except ValueError:
                raise Failed("its answer is cut off") from None
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in said if "Error" in line or "error" in line]
    raise Failed(f"it ended with status {done.returncode}: {(errors or said or ['?'])[-1]:.300}")
