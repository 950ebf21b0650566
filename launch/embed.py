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
and refuses to continue with another model, prompt or input.
"""

import itertools
import pathlib
import sys
import time

from moe_embed_jax import launching

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
    arguments = flags.parse_args()

    from moe_embed_jax.data.text_files import read_texts
    from moe_embed_jax.errors import UserError

    output = pathlib.Path(arguments.output)
    if output.suffix not in (".npy", ".zarr") or (output.suffix == ".npy" and output.is_dir()):
        raise UserError(f"--output={output} must be a file named *.npy or a folder named *.zarr")
    if output.suffix == ".npy" and arguments.dtype != "float32":
        raise UserError(f"--dtype={arguments.dtype}: .npy is float32; choose an --output=*.zarr")
    if pathlib.Path(arguments.input).is_fifo():
        raise UserError(f"--input={arguments.input} is a pipe; it is read twice, so give a file")
    launching.check_model(arguments.model)
    count = sum(1 for _ in read_texts(arguments.input, arguments.field))

    from moe_embed_jax.embedder import Embedder
    from moe_embed_jax.mesh import MeshConfig, make_mesh

    embedder = Embedder.load(arguments.model, mesh=make_mesh(MeshConfig()))
    prompt = launching.prompt(arguments.prompt)
    launching.report_prompts(embedder, {"texts": prompt})
    start = time.monotonic()

    def texts():
        return read_texts(arguments.input, arguments.field)

    def encode(chunk):
        return embedder.encode(chunk, prompt=prompt, dim=arguments.dim)

    if output.suffix == ".zarr":
        from moe_embed_jax.ownership import own
        from moe_embed_jax.search.vectors import write_vectors

        identity = embedder.identity(prompt)
        with own(output):
            shape = write_vectors(output, texts, encode, identity, arguments.dtype).shape
    else:
        shape = write_embeddings(encode, texts(), count, output)
    seconds = time.monotonic() - start
    rate = f"{count / seconds:,.0f} texts/s"
    print(f"{output}: {arguments.dtype} {list(shape)}, {seconds:.1f} s, {rate}")


def write_embeddings(encode, texts, count: int, output: pathlib.Path) -> tuple[int, int]:
    """Writes `encode(texts)` to `output` chunk by chunk, atomically; returns the shape."""
    import numpy as np
    from tqdm import tqdm

    from moe_embed_jax.data.text_files import written_whole
    from moe_embed_jax.errors import UserError

    shape = (count, encode([]).shape[1])
    texts, done = iter(texts), 0
    with (
        written_whole(output) as file,
        tqdm(total=count, unit=" texts", disable=None, leave=False) as bar,
    ):
        # A header and rows, not a memory map: a full disk is then an error, not a bus error.
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        while chunk := list(itertools.islice(texts, TEXTS_PER_CHUNK)):
            file.write(np.asarray(encode(chunk), "<f4").tobytes())
            done += len(chunk)
            bar.update(len(chunk))
        if done != count:
            raise UserError(f"the input changed meanwhile: {count} lines before, {done} now")
    return shape


if __name__ == "__main__":
    sys.exit(launching.run(main))
