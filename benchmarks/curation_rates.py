"""What filtering costs a host beside its chips, and what 1.6 billion pairs cost 16 hosts.

    python benchmarks/curation_rates.py --pairs=DIR --tokenizer=FOLDER_OR_FILE [--rows=100000] \\
        [--width=384] [--dtype=float16] [--tokens=102] [--output=FILE.json]

Measures each step of a part of launch/filter.py in this process, on the first --rows pairs of a
prepared folder: reading, tokenising, packing, vectors to disk and back, shards, and the copy of
--finish. A stand-in takes the place of the chips. Rates are per second of a processor, so that
other work on the machine does not count; waiting for a slow disk does not count either.

Then a table for --total pairs of two texts and --tokens tokens, in --hosts parts: hours of one core
of a host from these rates, and of its chips from rates that launch/plan.py predicted
(docs/measured/filtering.md says how).
"""

import argparse
import pathlib
import sys
import tempfile
import time

import contestants
import numpy as np

# Of one v5e chip, predicted: a sixteenth of what docs/measured/filtering.md has for v5e:4x4.
SLOTS_PER_SECOND = 18.6e6 / 16
QUERIES_PER_SECOND = 520_000 / 16
FINISH = "copy shards (--finish)"
FULL = 0.9  # share of the slots of a row that hold a token


class Clock:
    """Processor seconds, and seconds by the clock, of one step after the other."""

    def __init__(self):
        self.steps: dict[str, dict] = {}
        self.start()

    def start(self) -> None:
        self._at = time.perf_counter(), time.process_time()

    def stop(self, name: str, count: int, unit: str) -> None:
        """The step `name` has done `count` units; the next one starts."""
        wall, cpu = time.perf_counter() - self._at[0], time.process_time() - self._at[1]
        step = {"count": count, "unit": unit, "wall": wall, "cpu": cpu}
        self.steps[name] = step | {"per_second": count / cpu}
        self.start()


def measure(arguments, work: pathlib.Path) -> dict[str, dict]:
    """name of a step -> count, unit, seconds, units per processor second."""
    from moe_embed_jax.curation import units
    from moe_embed_jax.curation.pair_texts import read_texts
    from moe_embed_jax.data.packing import fill_rows
    from moe_embed_jax.inference_batches import plan_calls
    from moe_embed_jax.pairs.folder import PairFolder
    from moe_embed_jax.search.vectors import write_vectors
    from moe_embed_jax.tokenizers.files import load_tokenizer

    pairs, tokenizer = PairFolder(arguments.pairs), load_tokenizer(arguments.tokenizer)
    rows = min(arguments.rows, len(pairs))
    clock = Clock()
    read = read_texts(pairs, 0, rows)
    clock.stop("read pairs, find duplicates", rows, "pairs")
    texts = read.queries.texts + read.documents.texts
    sequences = []
    for begin in range(0, len(texts), 8192):  # as vectors are embedded
        sequences += tokenizer.encode_texts(texts[begin : begin + 8192], arguments.length)
    lengths = np.array([len(ids) for ids in sequences])
    clock.stop("tokenise", int(lengths.sum()), "tokens")
    for call in plan_calls(lengths, arguments.chips):
        members = [sequences[i] for i in call.members]
        fill_rows(call.packing, members, call.rows, call.row_length, 1, None)
    clock.stop("pack", len(texts), "texts")
    vectors_ND = np.random.default_rng(0).normal(size=(8192, arguments.width)).astype(np.float32)
    clock.start()
    store = write_vectors(
        work / "vectors.zarr",
        lambda: texts,
        lambda chunk: vectors_ND[: len(chunk)],
        {"hash": "a stand-in"},
        arguments.dtype,
    )
    clock.stop("write vectors", len(texts), "texts")
    for begin in range(0, len(store), 131_072):
        store[begin : begin + 131_072]
    clock.stop("read vectors", len(texts), "texts")
    unit = units.Unit(0, "all", "en", 0, rows, work)
    numbers = range(0, rows, 8192)
    pair_rows = (row for n in numbers for row in pairs.read(range(n, min(n + 8192, rows))))
    _, shards = units.write_shards(unit, pair_rows)
    clock.stop("write shards", rows, "pairs")
    (work / "output").mkdir()
    for number, shard in enumerate(shards):
        entry = shard | {"file": f"{number}", "lengths": f"{number}.npy"}
        units.copy_shard(unit, number, work / "output", entry)
    clock.stop(FINISH, rows, "pairs")
    return clock.steps


def costs(arguments, steps: dict[str, dict]) -> list[tuple[str, float, str]]:
    """(step, hours, of what) of one host; one host does --finish for all."""
    pairs_per_host = arguments.total / arguments.hosts
    units_per_pair = {"pairs": 1, "texts": 2, "tokens": arguments.tokens}
    lines = []
    for name, step in steps.items():
        pairs = arguments.total if name == FINISH else pairs_per_host
        hours = pairs * units_per_pair[step["unit"]] / step["per_second"] / 3600
        lines.append((name, hours, "of a core, measured"))
    slots = pairs_per_host * arguments.tokens / FULL
    for name, work, rate in (
        ("embed", slots, SLOTS_PER_SECOND),
        ("search", pairs_per_host, QUERIES_PER_SECOND),
    ):
        lines.append((name, work / rate / arguments.chips / 3600, "of all chips, predicted"))
    return lines


def main():
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--pairs", required=True, help="prepared folder")
    flags.add_argument("--tokenizer", required=True, help="model folder or tokenizer file")
    flags.add_argument("--rows", type=int, default=100_000, help="pairs to measure with")
    flags.add_argument("--length", type=int, default=512, help="most tokens of a text")
    flags.add_argument("--width", type=int, default=384)
    flags.add_argument("--dtype", default="float16", help="of stored vectors")
    flags.add_argument("--tokens", type=float, default=102, help="of a pair of the table")
    flags.add_argument("--total", type=float, default=1.6e9, help="pairs of the table")
    flags.add_argument("--hosts", type=int, default=16)
    flags.add_argument("--chips", type=int, default=8, help="of a host")
    flags.add_argument("--output", help="JSON file to write")
    arguments = flags.parse_args()
    with tempfile.TemporaryDirectory() as work:
        steps = measure(arguments, pathlib.Path(work))
    contestants.print_table(
        f"{steps['write shards']['count']:,} pairs, {steps['tokenise']['count']:,} tokens",
        ["step", "of", "per processor second", "processor s", "s"],
        [[name, s["unit"], s["per_second"], s["cpu"], s["wall"]] for name, s in steps.items()],
    )
    lines = costs(arguments, steps)
    contestants.print_table(
        f"{arguments.total:,.0f} pairs on {arguments.hosts} hosts of {arguments.chips} v5e",
        ["step", "hours", ""],
        [list(line) for line in lines],
    )
    report = {
        "steps": steps,
        "hours": [dict(zip(("step", "hours", "of"), line, strict=True)) for line in lines],
        "arguments": vars(arguments),
        "machine": contestants.machine(),
    }
    contestants.write_report(arguments.output, report)


if __name__ == "__main__":
    sys.exit(main())
