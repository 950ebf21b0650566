"""Proves that an exported folder gives the same vectors in every runtime that is here.

    python launch/verify_export.py --model=FOLDER [--runtimes=transformers,onnxruntime,...]

Embeds golden texts (20 scripts, odd characters, an empty and a long one) by this package, and by
each runtime in a process of its own: sentence-transformers, transformers, ONNX Runtime, OpenVINO,
FastEmbed; by Node.js transformers.js and llama.cpp; and by servers whose addresses are given.
Prints one table, puts it into the folder's README.md, and ids and vectors into golden.json. The
status is 1 if a runtime gives other vectors, with a line that names it and says why. A runtime that
is not here is named with the command that installs it, which is a fault if --runtimes asks for it.

FOLDER is what launch/convert.py export wrote, with --onnx=both for the runtimes that read ONNX. The
folder's own modelling file is run.
"""

import sys

from moe_embed_jax import distributed, launching, storage

SERVER_FLAGS = {
    "tei_url": "text-embeddings-inference",
    "vllm_url": "vllm",
    "llama_server_url": "llama-server",
}


def main():
    from moe_embed_jax.errors import UserError
    from moe_embed_jax.interop.verify.known import RUNTIMES, TOLERANCE

    flags = launching.parser(__doc__)
    flags.add_argument("--model", required=True, help="exported folder")
    flags.add_argument(
        "--runtimes", help=f"default: all of {','.join(RUNTIMES)}; empty: only servers"
    )
    flags.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="RUNTIME=PYTHON",
        help="Python of another environment that has the runtime; may be repeated",
    )
    flags.add_argument("--node_folder", default=".", help="folder that has node_modules")
    for flag, name in SERVER_FLAGS.items():
        flags.add_argument(f"--{flag}", metavar="URL", help=f"of a running {name}")
    flags.add_argument(
        "--server_precision",
        choices=TOLERANCE,
        default="float32",
        help="what the servers compute in; half: bfloat16 or float16",
    )
    arguments = flags.parse_args()
    names = list(RUNTIMES)
    if arguments.runtimes is not None:
        names = [name for name in arguments.runtimes.split(",") if name]
    pairs = [pair.partition("=") for pair in arguments.python]
    for name in [*names, *(pair[0] for pair in pairs)]:
        if name not in RUNTIMES:
            raise UserError(f"runtime {name!r}: choose from {', '.join(RUNTIMES)}")
    distributed.refuse_several_processes()
    launching.check_model(arguments.model)
    folder = storage.path(arguments.model)

    from moe_embed_jax.embedder import Embedder
    from moe_embed_jax.interop.verify.run import is_export, verify

    if not is_export(folder):
        raise UserError(
            f"{folder} is no export with a tokenizer: make one by launch/convert.py export"
        )
    urls = {name: getattr(arguments, flag) for flag, name in SERVER_FLAGS.items()}
    faults = verify(
        folder,
        Embedder.load(folder),
        names,
        {name: url for name, url in urls.items() if url},
        {name: python for name, _, python in pairs},
        arguments.node_folder,
        arguments.server_precision,
        required=arguments.runtimes is not None,
    )
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(launching.run(main))
