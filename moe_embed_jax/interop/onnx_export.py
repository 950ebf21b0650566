"""ONNX files of an exported folder, where sentence-transformers and other runtimes look for them::

    onnx/model.onnx         float32, made by torch.onnx.export of the folder's PyTorch model; from
                            1.5 GB on its weights lie beside it in model.onnx_data
    onnx/model_qint8.onnx   matrices and word table as int8, activations quantised as they come

Inputs `input_ids` and `attention_mask`, int64 [batch, sequence], of any size; output
`last_hidden_state`, float32 [batch, sequence, width], which means nothing at padding. Routing stays
sparse: each expert computes its own tokens alone.

PyTorch and onnx are imported inside the functions: exports without ONNX need neither.
"""

import contextlib
import importlib.util
import logging
import pathlib
import warnings

from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.source import CONFIG_FILE
from moe_embed_jax.json_file import read_object

FOLDER = "onnx"
FILES = {"fp32": "model.onnx", "int8": "model_qint8.onnx"}  # what --onnx names
WEIGHTS = "model.onnx_data"  # the name that browsers and optimum look for
CHOICES = (*FILES, "both")
# A protobuf message holds 2 GB at most; graph and names need some of it.
_LARGEST_SINGLE_FILE = 1536 << 20
_TALKATIVE = (
    *("root", "transformers", "onnxscript", "onnx_ir", "torch.onnx"),
    "torch.onnx._internal.exporter._registration",
)
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """Raises `UserError` that names packages which are not installed."""
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"--onnx needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}: "
            "pip install -e .[onnx]"
        )


def write_onnx(folder: pathlib.Path, choice: str) -> None:
    """Writes what `choice`, one of CHOICES, names into a local exported folder.

    Raises `UserError` where a package is missing.
    """
    check_packages()
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    float32 = target / FILES["fp32"]
    with _quiet():
        _write_float32(folder, float32)
        if choice in ("int8", "both"):
            _write_int8(float32, target / FILES["int8"])
    if choice == "int8":
        float32.unlink()
        (target / WEIGHTS).unlink(missing_ok=True)


def _write_float32(folder: pathlib.Path, target: pathlib.Path) -> None:
    import onnx_ir
    import torch

    model = _torch_model(folder)
    ids = torch.arange(4, 4 + 3 * 7).reshape(3, 7) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    program = torch.onnx.export(
        _states_of(model),
        (ids, mask),
        dynamo=True,
        input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state"],
        dynamic_shapes=(axes, axes),
        verbose=False,
    )
    size = sum(tensor.const_value.nbytes for tensor in program.model.graph.initializers.values())
    weights = WEIGHTS if size > _LARGEST_SINGLE_FILE else None
    onnx_ir.save(program.model, target, external_data=weights)


def _torch_model(folder: pathlib.Path):
    """The PyTorch model of an exported folder, for tracing."""
    import torch
    import transformers

    if read_object(folder / CONFIG_FILE).get("model_type") == "bert":
        model_class, options = transformers.BertModel, {"add_pooling_layer": False}
    else:  # the modelling file that every other export carries
        from moe_embed_jax.interop.torch_model import NomicBertModel as model_class

        options = {}
    model = model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", **options
    ).eval()
    for module in model.modules():
        if hasattr(module, "experts") and hasattr(module, "router"):
            module.experts.mlp = _split(module.experts.mlp)
    return model


def _split(stored):
    """`ExpertWeights` with matrices of their own for each expert.

    Of one matrix for all the graph would cut out an expert in each call, and the quantiser would
    not find the expert's part.
    """
    from torch import nn
    from torch.nn import functional

    class SplitExpertWeights(nn.Module):
        def __init__(self):
            super().__init__()
            experts, ffn, _ = stored.shape
            self.w1, self.w2 = (
                nn.ParameterList(nn.Parameter(part) for part in matrix.detach().split(ffn))
                for matrix in (stored.w1, stored.w2)
            )
            self.b1 = [None] * experts
            if stored.b1 is not None:
                parts = stored.b1.detach().split(ffn)
                self.b1 = nn.ParameterList(nn.Parameter(part) for part in parts)

        def forward(self, x, expert: int):
            hidden = functional.linear(x, self.w1[expert], self.b1[expert])
            return functional.gelu(hidden) @ self.w2[expert]

    return SplitExpertWeights()


def _states_of(model):
    from torch import nn

    class States(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, return_dict=False
            )[0]

    return States()


def _write_int8(float32: pathlib.Path, target: pathlib.Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(float32, load_external_data=False).graph
    # A rounded router sends tokens to other experts. Its matrix is tiny. The quantiser makes a
    # MatMul, named after it, of each Gemm.
    routers = [node.name for node in graph.node if any(".router." in name for name in node.input)]
    quantize_dynamic(
        float32,
        target,
        weight_type=QuantType.QInt8,
        per_channel=True,
        # Weights of 7 bits: x86 processors without VNNI add two products of 8 bits in 16, which
        # overflow without a word.
        reduce_range=True,
        nodes_to_exclude=[f"{name}{suffix}" for name in routers for suffix in ("", "_MatMul")],
        extra_options={"MatMulConstBOnly": True},
    )


@contextlib.contextmanager
def _quiet():
    """Without the libraries' notes to their developers and their advice about other options."""
    from transformers.utils import logging as of_transformers

    had_bars = of_transformers.is_progress_bar_enabled()
    of_transformers.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            of_transformers.enable_progress_bar()
