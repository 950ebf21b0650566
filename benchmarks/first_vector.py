"""Time from a fresh process to the first vector: Embedder against SentenceTransformer.

    python benchmarks/first_vector.py --model=DIR [--rounds=5] [--output=FILE.json]

Each turn is a process of its own that imports, loads the model folder and embeds one short text;
"start" is what Python itself takes. `ours, programs kept` finds its compiled programs in a folder
(`Embedder.load(compilation_cache=...)`), `ours` compiles them. sentence-transformers reads the
exported folder. Everything has been read once before, so that no turn waits for the disk.

Needs `pip install -e .[pytorch]`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import contestants

OURS, KEPT, PEER = "ours", "ours, programs kept", "sentence-transformers"
TEXT = "what is a mixture of experts?"
PARTS = ("start", "import", "load", "encode")
MARK = """
import json, sys, time
marks = [(time.time(), time.process_time())]
def mark():
    marks.append((time.time(), time.process_time()))
"""
EMBEDDER = """
from moe_embed_jax import Embedder
mark()
model = Embedder.load(sys.argv[1], compilation_cache=sys.argv[2] or None)
mark()
vector = model.encode([sys.argv[3]], "query")
"""
SENTENCE_TRANSFORMER = """
import transformers
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
from sentence_transformers import SentenceTransformer
mark()
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
mark()
vector = model.encode([sys.argv[3]], prompt_name="query", show_progress_bar=False)
"""
REPORT = """
mark()
print(json.dumps({"marks": marks, "vector": vector[0].tolist()}))
"""


def turn(script: str, folder: str, cache: str) -> dict:
    """Seconds of each part, by the clock and of the processor, and the vector."""
    environment = {name: value for name, value in os.environ.items() if "COMPILATION" not in name}
    command = [sys.executable, "-c", MARK + script + REPORT, folder, cache, TEXT]
    start, machine = time.time(), contestants.machine_seconds()
    done = subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(contestants.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    machine = contestants.machine_seconds() - machine
    if done.returncode:
        raise SystemExit(f"error: a turn failed:\n{done.stderr}")
    report = json.loads(done.stdout.splitlines()[-1])
    wall, cpu = zip(*([start, 0.0], *report["marks"]), strict=True)
    result = {
        name: {"wall": wall[i + 1] - wall[i], "cpu": cpu[i + 1] - cpu[i]}
        for i, name in enumerate(PARTS)
    }
    total = {"wall": wall[-1] - wall[0], "cpu": cpu[-1]}
    others = {"others_cpu": max(machine - total["cpu"], 0.0)}
    return {"parts": result, "vector": report["vector"], **total, **others}


def main():
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--model", required=True, help="model folder")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--output", help="JSON file to write")
    arguments = flags.parse_args()
    contestants.require("pytorch", "sentence_transformers")
    from moe_embed_jax.conversion import export_model

    with contestants.temporary_folder() as folder:
        export_model(arguments.model, f"{folder}/exported")
        calls = {
            OURS: (EMBEDDER, arguments.model, ""),
            KEPT: (EMBEDDER, arguments.model, f"{folder}/programs"),
            PEER: (SENTENCE_TRANSFORMER, f"{folder}/exported", ""),
        }
        vectors = {name: turn(*call)["vector"] for name, call in calls.items()}
        results = {name: [] for name in calls}
        for index in range(arguments.rounds):
            for name, call in calls.items():
                results[name].append(turn(*call))
                wall = results[name][-1]["wall"]
                print(f"round {index + 1}/{arguments.rounds}  {name:24} {wall:6.2f} s", flush=True)

    difference = max(abs(a - b) for a, b in zip(vectors[OURS], vectors[PEER], strict=True))

    def median(name: str, scale: str, part: str | None = None) -> float:
        turns = (turn["parts"][part] if part else turn for turn in results[name])
        return statistics.median(turn[scale] for turn in turns)

    ratio = {name: median(PEER, "wall") / median(name, "wall") for name in calls}
    contestants.print_table(
        "Seconds from the start of a process to its first vector",
        ["", *PARTS, "in all", "processor", "ours is faster by"],
        [
            [
                name,
                *(median(name, "wall", part) for part in PARTS),
                median(name, "wall"),
                median(name, "cpu"),
                ratio[name],
            ]
            for name in calls
        ],
    )
    print(f"largest difference of the vectors: {difference:.1e}")
    report = {
        "ratio": ratio[KEPT],
        "compares": "seconds by the clock, start of a process to its first vector: "
        "SentenceTransformer / Embedder with kept programs, medians",
        "ratio_compiling": ratio[OURS],
        "largest_difference": difference,
        "seconds": {
            name: {scale: median(name, scale) for scale in contestants.SCALES} for name in calls
        },
        "others_cpu_share": contestants.others_share(results),
        "rounds": {
            name: [{key: part for key, part in turn.items() if key != "vector"} for turn in turns]
            for name, turns in results.items()
        },
        "arguments": vars(arguments),
        "machine": contestants.machine(),
    }
    contestants.write_report(arguments.output, report)


if __name__ == "__main__":
    main()
