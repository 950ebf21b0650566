"""What to run on the day that a GPU is there: ten minutes, one table, one JSON.

    python benchmarks/gpu_check.py [--output=FILE.json] [--only=PART,PART] [--small] [--minutes=10]

1. the card: matrix products, and bandwidth of its memory
2. every kernel for GPUs against its oracle: values and gradients
3. an expert layer and attention, forward and backward, against the ideal at the measured rates
4. PyTorch's own grouped product
5. encoding of texts, and of the same texts with the same weights by sentence-transformers
6. the training step of configs/pretrain.py, 1,024 pairs: MFU and peak memory

A part that fails is a row with its error; the others run, and the exit status is 1. A part that
this machine cannot run (PyTorch without CUDA), or that would begin after `--minutes`, is a row that
says so. `--small` is for machines without a GPU: the same parts, PyTorch's too, at sizes at which
interpreted kernels take seconds. Its rates say nothing.

Needs `pip install -e .[cuda12]`, for 4 and 5 also `[pytorch]` with a PyTorch for CUDA.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# PyTorch needs memory of the same card.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import gpu_parts
import gpu_torch
import jax
from rich.console import Console
from rich.table import Table

# The step is last: JAX does not give back memory of the card.
PARTS = {**gpu_parts.PARTS, **gpu_torch.PARTS}
PARTS = {name: PARTS[name] for name in [*(n for n in PARTS if n != "step"), "step"]}


def main(argv: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--output", type=pathlib.Path, default=pathlib.Path("gpu_check.json"))
    flags.add_argument("--only", help="parts, separated by commas: " + ", ".join(PARTS))
    flags.add_argument("--small", action="store_true")
    flags.add_argument("--minutes", type=float, default=10, help="no part begins after them")
    options = flags.parse_args(argv)
    names = options.only.split(",") if options.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        flags.error(f"--only: no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    device = jax.devices()[0]
    if device.platform != "gpu" and not options.small:
        flags.error(f"JAX sees no GPU, but {device.device_kind}: --small runs here")
    sizes = gpu_parts.SMALL if options.small else gpu_parts.FULL
    report = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "device": device.device_kind,
        "jax": jax.__version__,
        "small": options.small,
        "sizes": dataclasses.asdict(sizes),
        "rows": [],
    }
    end = time.monotonic() + 60 * options.minutes
    for name in names:
        if time.monotonic() < end:
            report["rows"] += run_part(name, PARTS[name], sizes, report["rows"])
        else:
            note = f"{options.minutes:g} minutes are over: --only={name}"
            report["rows"].append({"part": name, "name": "not run", "note": note})
        options.output.write_text(json.dumps(report, indent=2) + "\n")  # after every part
    print_table(report)
    return int(any("error" in row for row in report["rows"]))


def run_part(name: str, function, sizes, rows: list[dict]) -> list[dict]:
    """The rows of a part; of one that raises, those before it did, and one with the error.

    `rows`: of earlier parts, for shares of what was measured there.
    """
    found, start = [], time.perf_counter()
    try:
        for row in function(sizes, rows):
            found.append({"part": name, **row})
    except gpu_parts.Skipped as skipped:
        found.append({"part": name, "name": "not run", "note": str(skipped)})
    except Exception as error:
        found.append({"part": name, "name": "failed", "error": gpu_parts.one_line(error)})
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def print_table(report: dict) -> None:
    size = ", small: the rates say nothing" if report["small"] else ""
    title = f"{report['device']}, JAX {report['jax']}, {report['date']}{size}"
    table = Table(title=title, title_justify="left")
    for column in ("part", "", "value", "unit", "note"):
        table.add_column(column, justify="right" if column == "value" else "left", overflow="fold")
    for row in report["rows"]:
        value = f"{row['value']:.4g}" if "value" in row else ""
        note = row.get("error", row.get("note", ""))
        table.add_row(row["part"], row["name"], value, row.get("unit", ""), note)
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
