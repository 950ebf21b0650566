"""What a command has made, as {name: hash}, without what depends on the clock.

As a script: results.py FOLDER OUTPUT writes hashes of the arrays of the newest checkpoint.
"""

import contextlib
import hashlib
import json
import pathlib
import sys

from campaign.outcome import files

RECORDS = ("config.json", "metrics.jsonl", "evaluations.jsonl", "results.json", "routing.json")
CLOCK = ("evaluation_time", "seconds", "date")


def of_files(target: pathlib.Path, without=(), place=None) -> dict[str, str]:
    """place: the folder whose path is left out of JSON files; default: the target's."""
    place = str(place or target.parent)
    found = files(target, without=without)
    for name in [n for n in found if n.endswith(".json")]:
        path = target if target.is_file() else target / name
        with contextlib.suppress(ValueError, RecursionError):  # then its bytes are compared
            content = json.loads(path.read_text())
            if place != str(target.parent) and path.name == "manifest.json":
                content.pop("hash", None)
            timeless = repr(_timeless(content)).replace(place, "PLACE")
            found[name] = hashlib.sha256(timeless.encode()).hexdigest()
    return found


def _timeless(value):
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in sorted(value.items()) if k not in CLOCK}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def of_run(target: pathlib.Path, arrays: dict[str, str]) -> dict[str, str]:
    """Records byte for byte, and `arrays` of the newest checkpoint as `main` writes them."""
    found = {}
    for name in RECORDS:
        if (target / name).is_file():
            found |= {name: hashlib.sha256((target / name).read_bytes()).hexdigest()}
    return found | arrays


def of_recipe(target: pathlib.Path) -> dict[str, str]:
    """Manifests say where the pairs came from, in their `hash` too; `content_hash` stays.

    The export's made_by.json stands for paths and times of the files of its run.
    """
    found = {}
    for step in ("pairs", "filtered", "mined", "export", "evaluation"):
        without = ("report", "work", "made_by")
        found |= {
            f"{step}/{k}": v for k, v in of_files(target / step, without, target.parent).items()
        }
    for stage in ("stage1", "stage2", "stage3"):
        for name in ("metrics.jsonl", "results.json", "evaluations.jsonl"):
            if (path := target / stage / name).is_file():
                found[f"{stage}/{name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def main(folder: str, output: str) -> None:
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    found = {}
    steps = (pathlib.Path(folder) / "checkpoints").absolute()
    newest = max((p for p in steps.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    for item in ("params", "optimizer", "mlm_head"):
        if not (newest / item).is_dir():
            continue
        reader = ocp.PyTreeCheckpointer()
        tree = reader.metadata(newest / item).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = reader.restore(newest / item, args=ocp.args.PyTreeRestore(restore_args=how))
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
            array = np.ascontiguousarray(leaf)
            name = f"{newest.name}/{item}{jax.tree_util.keystr(path)}"
            found[name] = hashlib.sha256(
                f"{array.dtype}{array.shape}".encode() + array.tobytes()
            ).hexdigest()
    pathlib.Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
