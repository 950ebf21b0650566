"""Rows of Parquet, Arrow and Feather files, read by a separate process.

The library that reads these formats trusts what they say: a damaged file can kill the process that
reads it. Here that is a child, which prints a JSON object per row, and the file is named.

Run as a script by `read_rows`: imports nothing of this package.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator

ROWS_PER_BATCH = 256
# A file of a few kilobytes can say that it holds terabytes. Row groups of the hub have up to 1 GB.
MOST_MEMORY = 8 << 30  # bytes of the child
_DAMAGED = "damaged"  # what the child prints in place of a row: [_DAMAGED, why]


class Damaged(ValueError):
    """A file cannot be read on; the message says why."""


def read_rows(path: str) -> Iterator[str | None]:
    """The rows of a local file, each as the JSON text of an object; None for one that is too long.

    BINARY values become texts where they are UTF-8, and objects that say what they are where not.

    Raises `Damaged` where the file cannot be read on, in whatever way, or not in `MOST_MEMORY`.
    """
    from moe_embed_jax.data.bounded_lines import split_lines

    command = [sys.executable, "-P", os.path.abspath(__file__), path, str(MOST_MEMORY)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said)
        try:
            for line in split_lines(process.stdout):
                if line is None:
                    yield None
                elif line.startswith(b"["):
                    raise Damaged(json.loads(line)[1])
                elif line.endswith(b"\n"):  # else the child died in the middle of it
                    yield line[:-1].decode("utf-8")
            if status := process.wait():
                said.seek(0)
                last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
                how = f"signal {-status}" if status < 0 else f"status {status}"
                raise Damaged(f"its reader ended with {how}{last and f': {last:.200}'}")
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def _print_rows(path: str, most_memory: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most_memory, hard))
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    try:
        with open(path, "rb") as file:
            for batch in _batches(file, path):
                batch.validate(full=True)
                for row in batch.to_pylist():
                    print(json.dumps(row, default=_as_json, ensure_ascii=False))
    except MemoryError:  # pyarrow's is one, too
        why = f"{ROWS_PER_BATCH} of its rows take more than {most_memory:,} bytes of memory"
        print(json.dumps([_DAMAGED, why]))
    except Exception as error:  # whatever it is, the file is why
        why = " ".join(str(error).split())[:300] or type(error).__name__
        print(json.dumps([_DAMAGED, why]))


def _batches(file, path: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(1)  # Beam reads many files at once; the stacks of threads count as memory
    pa.set_io_thread_count(1)
    head = file.read(6)
    file.seek(0)
    if path.endswith(".parquet"):
        yield from pq.ParquetFile(file).iter_batches(ROWS_PER_BATCH)
    elif head.startswith(b"FEA1"):
        raise ValueError("Feather of version 1: write it again as version 2, or as Parquet")
    elif head == b"ARROW1":  # Feather of version 2, and what pyarrow.ipc.new_file writes
        reader = pa.ipc.open_file(file)
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(file)  # the form in which datasets.save_to_disk writes


def _as_json(value):
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return {"BINARY, no UTF-8": repr(value[:16])}
    return repr(value)[:200]


if __name__ == "__main__":
    _print_rows(sys.argv[1], int(sys.argv[2]))
