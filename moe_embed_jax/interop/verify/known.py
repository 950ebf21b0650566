"""Which runtimes an export is compared in, and what each needs."""

import dataclasses

from moe_embed_jax.interop.onnx_export import FILES, FOLDER

ONNX, ONNX_INT8 = (f"{FOLDER}/{FILES[kind]}" for kind in ("fp32", "int8"))
# (largest difference, lowest cosine) that the arithmetic of a runtime may cost.
TOLERANCE = {
    "float32": (1e-4, 0.99999),
    "half": (None, 0.999),  # bfloat16 and float16
    "int8": (None, 0.95),
}


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A library that embeds texts from an exported folder.

    Attributes:
      packages: modules of Python, or for `node` packages of npm.
      install: the command that installs them.
      file: what it reads beside the tokenizer, in the folder: a name, or a pattern; "": any export.
      make: how such a file is made.
      precision: one of `compare.TOLERANCE`.
    """

    packages: tuple[str, ...]
    install: str
    file: str = ""
    make: str = ""
    precision: str = "float32"
    node: bool = False


_BY_EXPORT = "launch/convert.py export --onnx=both"
RUNTIMES = {
    "sentence-transformers": Runtime(("sentence_transformers",), "pip install -e .[pytorch]"),
    "transformers": Runtime(("torch", "transformers"), "pip install -e .[pytorch]"),
    "sentence-transformers-onnx": Runtime(
        ("sentence_transformers", "optimum"),
        "pip install sentence-transformers[onnx] in another environment, because optimum-onnx "
        "refuses transformers 5, and --python=sentence-transformers-onnx=ITS_PYTHON",
        ONNX,
        _BY_EXPORT,
    ),
    "onnxruntime": Runtime(("onnxruntime",), "pip install -e .[onnx]", ONNX, _BY_EXPORT),
    "onnxruntime-int8": Runtime(
        ("onnxruntime",), "pip install -e .[onnx]", ONNX_INT8, _BY_EXPORT, "int8"
    ),
    "openvino": Runtime(("openvino",), "pip install -e .[openvino]", ONNX, _BY_EXPORT),
    "fastembed": Runtime(
        ("fastembed",),
        "pip install fastembed in another environment, because it refuses huggingface_hub 2, and "
        "--python=fastembed=ITS_PYTHON",
        ONNX,
        _BY_EXPORT,
    ),
    "transformers.js": Runtime(
        ("@huggingface/transformers",),
        "npm install @huggingface/transformers, and --node_folder=FOLDER of node_modules",
        ONNX,
        _BY_EXPORT,
        node=True,
    ),
    "llama.cpp": Runtime(
        ("node-llama-cpp",),
        "npm install node-llama-cpp, and --node_folder=FOLDER of node_modules",
        "*.gguf",
        "llama.cpp's convert_hf_to_gguf.py --outtype f32 --outfile FOLDER/model.gguf",
        node=True,
    ),
}
