"""Embeds the texts of a file into a .npy array, one row per line, in the order of the file.

    python launch/embed.py --model=DIR --input=texts.jsonl --output=emb.npy \\
        --prompt=query|document|none|"PREFIX: " [--dim=N] [--field=NAME]

Input: .jsonl (a line is a JSON string, or an object with "text", after "title" if there is one, or
with --field) or .txt (a line is a text), plain or .gz, UTF-8. Output: float32 [lines, dim] of unit
norm. An empty text is embedded as its prompt; a file without lines gives [0, dim]. The file is
read twice: a bad line is reported before anything is embedded, and neither the texts nor the
embeddings are ever in memory as a whole. The output appears when it is complete.
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
    flags.add_argument("--output", required=True, help="array to write: .npy")
    flags.add_argument("--prompt", required=True, help=launching.PROMPT_HELP)
    flags.add_argument("--dim", type=int, help="keep the first features only (Matryoshka)")
    flags.add_argument("--field", help='JSON field of the text; default "text" after "title"')
    arguments = flags.parse_args()

    from moe_embed_jax.data.text_files import read_texts
    from moe_embed_jax.errors import UserError

    output = pathlib.Path(arguments.output)
    if output.suffix != ".npy" or output.is_dir():
        raise UserError(f"--output={output} must be a file named *.npy")
    if pathlib.Path(arguments.input).is_fifo():
        raise UserError(f"--input={arguments.input} is a pipe; it is read twice, so give a file")
    count = sum(1 for _ in read_texts(arguments.input, arguments.field))

    from moe_embed_jax.embedder import Embedder
    from moe_embed_jax.mesh import MeshConfig, make_mesh

    embedder = Embedder.load(arguments.model, mesh=make_mesh(MeshConfig()))
    prompt = launching.prompt(arguments.prompt)
    start = time.monotonic()
    shape = write_embeddings(
        lambda texts: embedder.encode(texts, prompt=prompt, dim=arguments.dim),
        read_texts(arguments.input, arguments.field),
        count,
        output,
    )
    seconds = time.monotonic() - start
    print(f"{output}: float32 {list(shape)}, {seconds:.1f} s, {count / seconds:,.0f} texts/s")


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
