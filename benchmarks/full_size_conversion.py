"""Time and memory of export and import of the 475M-parameter model, in a process each.

    python benchmarks/full_size_conversion.py [--output=FILE.json] [--keep=DIR]

Makes a randomly initialised model of the published size (475,292,928 parameters, 305,423,616 active
per token), exports it, imports the export, encodes ids with it, and compares every tensor byte for
byte. Peak memory is the process's resident set at its highest. `ratio` compares the import with
safetensors' own reading of the same file into memory, in the same run.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def make(folder: str) -> dict:
    import jax

    from moe_embed_jax.model_folder import LoadedModel, save_model
    from moe_embed_jax.models.encoder import EncoderConfig, count_params, init_params

    model = EncoderConfig()
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    lengths = {"query": 512, "document": 512}
    prompts = {"query": "search_query: ", "document": "search_document: "}
    loaded = LoadedModel(model, params, None, None, prompts, lengths)
    save_model(pathlib.Path(folder), loaded, "random numbers")
    total, active = count_params(model)
    counted = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"total": total, "active": active, "counted": counted}


def export(source: str, target: str) -> dict:
    from moe_embed_jax.conversion import export_model

    export_model(source, target)
    return {}


def bring_in(source: str, target: str) -> dict:
    from moe_embed_jax.conversion import import_model

    import_model(source, target)
    return {}


def encode(folder: str) -> dict:
    import numpy as np

    from moe_embed_jax import Embedder

    embedder = Embedder.load(folder)
    ids = np.random.default_rng(0).integers(4, 250_000, (4, 32))
    start = time.perf_counter()
    embeddings = embedder.encode_ids(ids, np.ones_like(ids))
    norms = np.linalg.norm(embeddings, axis=1)
    return {"shape": list(embeddings.shape), "norms": norms.tolist(),
            "encode_seconds": time.perf_counter() - start}  # fmt: skip


def read_with_safetensors(folder: str) -> dict:
    from safetensors.numpy import load_file

    tensors = load_file(pathlib.Path(folder) / "model.safetensors")
    return {"tensors": len(tensors), "values": sum(x.size for x in tensors.values())}


def compare(one: str, other: str) -> dict:
    """Tensor by tensor, so that two models never lie in memory together."""
    from safetensors import safe_open

    equal = True
    paths = [pathlib.Path(folder) / "model.safetensors" for folder in (one, other)]
    with safe_open(paths[0], "numpy") as a, safe_open(paths[1], "numpy") as b:
        equal = sorted(a.keys()) == sorted(b.keys())
        for name in a.keys():  # noqa: SIM118
            equal = equal and a.get_tensor(name).tobytes() == b.get_tensor(name).tobytes()
    return {"byte_equal": equal}


STEPS = {f.__name__: f for f in (make, export, bring_in, encode, read_with_safetensors, compare)}


def run(step: str, *arguments) -> dict:
    """Runs one step in a separate process; adds its seconds and its peak memory."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--step", step, *map(str, arguments)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    report = json.loads(result.stdout.splitlines()[-1])
    report |= {"process_seconds": time.perf_counter() - start}
    print(f"{step:22} {report}", flush=True)
    return report


def main():
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--output", help="JSON file to write")
    flags.add_argument("--keep", help="folder for the models; default: a temporary one")
    flags.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.step:
        name, *rest = arguments.step
        start = time.perf_counter()
        report = STEPS[name](*rest)
        report["seconds"] = time.perf_counter() - start
        report["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(report))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(arguments.keep or temporary)
        made, exported, imported, again = (folder / n for n in ("made", "out", "in", "again"))
        reports = {
            "make": run("make", made),
            "export": run("export", made, exported),
            "safetensors": run("read_with_safetensors", exported),
            "import": run("bring_in", exported, imported),
            "encode": run("encode", imported),
            "export again": run("export", imported, again),
            "compare": run("compare", exported, again),
        }
    ratio = reports["import"]["seconds"] / reports["safetensors"]["seconds"]
    report = {
        "ratio": ratio,
        "compares": "seconds of import / seconds of safetensors reading the same file",
        **reports,
    }
    print(f"import / safetensors read: {ratio:.1f}")
    if arguments.output:
        pathlib.Path(arguments.output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
