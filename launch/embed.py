"""Embeds the texts of a file into an array, one row per line, in the order of the file.

    python launch/embed.py --model=DIR --input=texts.jsonl --output=emb.npy|emb.zarr \\
        --prompt=query|document|none|"PREFIX: " [--dim=N] [--field=NAME] [--dtype=bfloat16]

Input: .jsonl (a line is a JSON string, or an object with "text", after "title" if there is one, or
with --field), .json (the same, or one array of those) or .txt (a line is a text), plain or .gz,
UTF-8. Blank lines at the end of JSON lines are skipped. Output: [lines, dim] of unit norm,
float32. An empty text is embedded as its prompt; a file without lines gives [0, dim]. The file is
read twice: a bad line is reported before anything is embedded, and neither the texts nor the
embeddings are ever in memory as a whole.

A .npy file appears when it is complete. A .zarr folder (zarr3, written with TensorStore, in any of
--dtype float32, bfloat16, float16) grows chunk by chunk: the same command continues after a kill,
and refuses to continue with another model, prompt or input. Many machines share a .zarr with
--part=0/16 to --part=15/16, each of which takes every 16th chunk of 8,192 texts; --finish completes
it when all of them are done. Where the environment describes several processes (docs/tpu_pods.md),
they work as one on one mesh, and process 0 writes.
"""

import contextlib
import itertools
import os
import pathlib
import sys
import time

from moe_embed_jax import distributed, launching, storage
from moe_embed_jax.parts import add_part_flags

TEXTS_PER_CHUNK = 8192


def main():
    flags = launching.parser(__doc__)
    flags.add_argument("--model", required=True, help="folder of the model")
    flags.add_argument("--input", required=True, help="texts: .jsonl or .txt, plain or .gz")
    flags.add_argument("--output", required=True, help="array to write: .npy or .zarr")
    flags.add_argument("--prompt", required=True, help=launching.PROMPT_HELP)
    flags.add_argument("--dim", type=int, help="keep the first features only (Matryoshka)")
    flags.add_argument("--field", help='JSON field of the text; default "text" after "title"')
    launching.add_dtype_flag(flags, "of a .zarr output")
    launching.add_weights_flag(flags)
    add_part_flags(flags)
    arguments = flags.parse_args()
    alone = arguments.part is not None or arguments.finish
    if alone:
        distributed.refuse_several_processes("start the parts by themselves")

    from moe_embed_jax.data.text_files import read_texts
    from moe_embed_jax.errors import UserError

    output = storage.path(arguments.output)
    if output.suffix not in (".npy", ".zarr") or (output.suffix == ".npy" and output.is_dir()):
        raise UserError(f"--output={output} must be a file named *.npy or a folder named *.zarr")
    if output.suffix == ".npy" and arguments.dtype != "float32":
        raise UserError(f"--dtype={arguments.dtype}: .npy is float32; choose an --output=*.zarr")
    if output.suffix == ".npy" and alone:
        raise UserError("--part and --finish write a .zarr: choose an --output=*.zarr")
    if storage.path(arguments.input).is_fifo():
        raise UserError(f"--input={arguments.input} is a pipe; it is read twice, so give a file")
    launching.check_model(arguments.model)
    count = sum(1 for _ in read_texts(arguments.input, arguments.field))
    if not alone:
        distributed.start()

    from moe_embed_jax.embedder import Embedder
    from moe_embed_jax.mesh import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig())
    embedder = Embedder.load(arguments.model, mesh=mesh, weights=arguments.weights)
    prompt = launching.prompt(arguments.prompt)
    launching.report_prompts(embedder, {"texts": prompt})
    start = time.monotonic()

    def texts():
        return read_texts(arguments.input, arguments.field)

    def encode(chunk):
        return embedder.encode(chunk, prompt=prompt, dim=arguments.dim)

    if output.suffix == ".npy":
        shape, done = write_embeddings(encode, texts(), count, output), count
    else:
        what = (output, texts, encode, embedder.identity(prompt), arguments.dtype)
        shape, done = write_zarr(what, arguments.part, arguments.finish)
    seconds = time.monotonic() - start
    launching.report_truncation(embedder)
    name = output if arguments.part is None else f"part {arguments.part} of {output}"
    rate = f", {seconds:.1f} s, {done / seconds:,.0f} texts/s" if done else ""
    print(f"{name}: {arguments.dtype} {shape}{rate}")


def write_zarr(what: tuple, part, finish: bool) -> tuple[list[int], int]:
    """Calls the writer of `search.vectors` that the flags ask for with the arguments `what`;
    returns the shape of what it wrote or completed, and how many texts it took care of."""
    from moe_embed_jax.ownership import own
    from moe_embed_jax.processes import on_process_0
    from moe_embed_jax.search import vectors

    output, *_ = what
    if part is not None:
        with own(output.with_name(f"{output.name}.part-{part.index}-of-{part.count}")):
            rows, width = vectors.write_part(*what, part)
        return [rows, width], rows
    with contextlib.ExitStack() as stack:
        on_process_0(f"{output}", lambda: stack.enter_context(own(output)))
        store = (vectors.finish_vectors if finish else vectors.write_vectors)(*what)
    return list(store.shape), 0 if finish else len(store)


def write_embeddings(encode, texts, count: int, output: pathlib.Path) -> list[int]:
    """Writes `encode(texts)` to `output` chunk by chunk, atomically; returns the shape.

    All processes call it; process 0 writes.
    """
    import numpy as np
    from tqdm import tqdm

    from moe_embed_jax.data.text_files import written_whole
    from moe_embed_jax.errors import UserError
    from moe_embed_jax.processes import on_process_0

    shape = (count, encode([]).shape[1])
    texts, done = iter(texts), 0
    with (
        contextlib.ExitStack() as stack,
        tqdm(total=count, unit=" texts", disable=None, leave=False) as bar,
    ):
        file = on_process_0(f"{output}", lambda: stack.enter_context(written_whole(output)))
        if file is None:  # on another process
            file = stack.enter_context(open(os.devnull, "wb"))
        # A header and rows, not a memory map: a full disk is then an error, not a bus error.
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        while chunk := list(itertools.islice(texts, TEXTS_PER_CHUNK)):
            file.write(np.asarray(encode(chunk), "<f4").tobytes())
            done += len(chunk)
            bar.update(len(chunk))
        if done != count:
            raise UserError(f"the input changed meanwhile: {count} lines before, {done} now")
    return list(shape)


if __name__ == "__main__":
    sys.exit(launching.run(main))
