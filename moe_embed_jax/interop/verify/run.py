"""What launch/verify_export.py does: every runtime that is here against ours, one table."""

import contextlib
import pathlib
import statistics
import time
from collections.abc import Iterator

from moe_embed_jax import storage
from moe_embed_jax.interop.source import CONFIG_FILE
from moe_embed_jax.interop.verify import report, runtimes, servers
from moe_embed_jax.interop.verify.compare import Comparison, Result, compare
from moe_embed_jax.interop.verify.golden import (
    Golden,
    golden_texts,
    golden_vectors,
    write_golden,
)


def verify(
    folder: pathlib.Path,
    reference,
    names: list[str],
    urls: dict[str, str],
    pythons: dict[str, str],
    node_folder: str,
    server_precision: str = "float32",
    required: bool = False,
) -> list[str]:
    """Compares runtimes, prints the table, writes golden.json and the card of `folder`.

    Args:
      folder: an export, on a disk or in a bucket.
      reference: the `Embedder` of it.
      names: of `runtimes.RUNTIMES`, in the order of the table.
      urls: of `servers.SERVERS` -> address.
      pythons: runtime -> the Python that has it.
      required: whether a runtime that is not here is a fault.

    Returns: of every runtime that is wrong, its name and why, in a sentence.
    """
    texts = golden_texts(max(reference.max_lengths.values()))
    prefixed = [reference.prefix(golden.prompt) + golden.text for golden in texts]
    ours = _ours(reference, texts)
    write_golden(folder, texts, reference, ours)
    same = Comparison(f"{len(texts)}/{len(texts)}", 0.0, 1.0, "", "the reference")
    rows, faults = [("moe_embed_jax", ours, same)], []
    request = {
        "texts": prefixed,
        "raw": [golden.text for golden in texts],
        "prompts": [golden.prompt for golden in texts],
        "max_length": max(reference.max_lengths.values()),
        "pooling": reference.model.pooling,
        "width": reference.width,
    }

    def add(name, result, precision):
        comparison = compare(texts, ours, result, precision)
        rows.append((name, result, comparison))
        if comparison.wrong:
            faults.append(f"{name} is wrong: {comparison.wrong}")

    with _on_disk(folder) as local:
        for name in names:
            print(f"{name} ...", flush=True)
            try:
                python = pythons.get(name)
                answer = runtimes.answer_of(name, local, request, python, node_folder)
                add(name, *answer)
            except runtimes.Absent as error:
                print(f"{name} is not compared: {error}", flush=True)
                if required or name in pythons:
                    faults.append(f"{name} is not here: {error}")
            except runtimes.Failed as error:
                faults.append(f"{name} does not work: {error}")
    for name, url in urls.items():
        print(f"{name} ...", flush=True)
        try:
            result = servers.answer_of_server(name, url, texts, prefixed, ours)
            add(name, result, server_precision)
        except runtimes.Failed as error:
            faults.append(f"{name} does not work: {error}")
    table = report.table(rows)
    print(f"\n{table}\n")
    report.write_card(folder, table, len(texts))
    return faults


def _ours(reference, texts: list[Golden]) -> Result:
    import moe_embed_jax

    ids = [
        reference.tokenize([golden.text], golden.prompt, "ignore")[0].tolist() for golden in texts
    ]
    vectors = golden_vectors(reference, texts)
    ms = []
    for golden in texts[:10]:
        reference.encode([golden.text], golden.prompt, on_truncation="ignore")  # compiles
        start = time.perf_counter()
        reference.encode([golden.text], golden.prompt, on_truncation="ignore")
        ms.append(1e3 * (time.perf_counter() - start))
    return Result(moe_embed_jax.__version__, ids, vectors, statistics.median(ms))


@contextlib.contextmanager
def _on_disk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """`folder`, or a copy of it while it is needed: runtimes read disks only."""
    if not storage.is_remote(folder):
        yield folder
        return
    local = storage.local_place(folder)
    storage.remove(local)
    try:
        for path in folder.rglob("*"):
            if path.is_file():
                target = local / path.relative_to(folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                storage.copy(path, target)
        yield local
    finally:
        storage.remove(local)


def is_export(folder: pathlib.Path) -> bool:
    """Whether PyTorch's libraries can read the folder, as exports are."""
    names = (CONFIG_FILE, "modules.json", "tokenizer.json")
    return all((folder / name).is_file() for name in names)
