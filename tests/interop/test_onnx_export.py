"""ONNX files of an export: our states in ONNX Runtime, sparse routing, int8, what is missing."""

import functools
import importlib.util
import json

import numpy as np
import pytest
from helpers import labelled_model
from helpers.commands import launch
from helpers.published_models import NOMIC, nomic_shapes, random_tensors, write_folder

from moe_embed_jax import Embedder
from moe_embed_jax.conversion import export_model
from moe_embed_jax.interop import onnx_export

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

LAYOUTS = {
    "nomic_bert": dict(n_layer=2, num_experts=3),
    "moe_embed": dict(
        n_layer=1,
        moe_every_n_layers=1,
        moe_normalize_expert_weights=True,
        moe_expert_bias=True,
        moe_shared_expert_width=24,
        num_experts=2,
    ),
    "bert": dict(n_layer=1, num_experts=0, rotary_emb_fraction=0),  # XLM-RoBERTa leaves so too
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(layout): a folder with both ONNX files. That of moe_embed has its weights beside."""

    @functools.cache
    def export(layout):
        folder = tmp_path_factory.mktemp("onnx") / layout
        config = NOMIC | LAYOUTS[layout]
        write_folder(folder / "source", config, random_tensors(nomic_shapes(config)))
        with pytest.MonkeyPatch.context() as patch:
            if layout == "moe_embed":
                patch.setattr(onnx_export, "_LARGEST_SINGLE_FILE", 0)
            export_model(folder / "source", folder / "out", onnx="both")
        return folder / "out"

    return export


def states(path, ids, mask):
    """The session's output, zeros where the mask is 0."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    assert np.isfinite(found).all()
    return found * mask[..., None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_batch_and_length_gives_our_states(exported, layout):
    folder = exported(layout)
    assert json.loads((folder / "config.json").read_text())["model_type"] == layout
    assert (folder / "onnx" / "model.onnx_data").is_file() == (layout == "moe_embed")
    embedder = Embedder.load(folder)
    for batch, length in ((3, 7), (1, 1), (5, 13), (2, 31)):  # the first is as traced
        ids = np.random.default_rng(length).integers(4, 128, (batch, length))
        mask = (np.arange(length) < length - 2 * np.arange(batch)[:, None]).astype(np.int64)
        expected = embedder.hidden_states(ids, mask)
        found = states(folder / "onnx" / "model.onnx", ids, mask)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        rounded = states(folder / "onnx" / "model_qint8.onnx", ids, mask)
        real = mask > 0
        cosine = np.sum(rounded * expected, -1)[real]
        cosine /= np.linalg.norm(rounded, axis=-1)[real] * np.linalg.norm(expected, axis=-1)[real]
        # On processors without VNNI, too, whose products of 8 bits overflow: 0.98.
        assert not np.array_equal(rounded, found) and cosine.min() > 0.999


def test_int8_matrices_leave_a_bit_free(exported):
    """Then no processor's sum of two products overflows: 2 * 255 * 64 < 2^15."""
    graph = onnx.load(exported("nomic_bert") / "onnx" / "model_qint8.onnx").graph
    quantised = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == 2 * 2 + 2 + 3 * 2  # attention, the dense layer, experts
    for node in products:
        assert np.abs(quantised[node.input[1]].astype(int)).max() in (63, 64)


def test_an_expert_computes_its_own_tokens(exported):
    graph = onnx.load(exported("nomic_bert") / "onnx" / "model.onnx").graph
    assert [n.op_type for n in graph.node].count("NonZero") == 3  # one for each expert
    maker = {name: node for node in graph.node for name in node.output}
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    inputs = [n.input for n in graph.node if n.op_type == "Gemm" and sizes[n.input[1]][0] == 64]
    chosen = [maker[hidden] for hidden, *_ in inputs]
    assert [node.op_type for node in chosen] == ["GatherND"] * 3


def test_int8_keeps_the_router_and_is_smaller(exported):
    folder = exported("nomic_bert") / "onnx"
    tensors = {
        kind: onnx.load(folder / name).graph.initializer for kind, name in onnx_export.FILES.items()
    }
    sizes = {kind: sum(len(t.raw_data) for t in each) for kind, each in tensors.items()}
    assert sizes["int8"] < 0.35 * sizes["fp32"]
    types = [t.data_type for t in tensors["int8"] if ".router." in t.name]
    assert types == [onnx.TensorProto.FLOAT]
    matrices = [t.data_type for t in tensors["int8"] if t.raw_data and len(t.dims) == 2]
    assert matrices.count(onnx.TensorProto.INT8) == 2 * 2 + 2 + 3 * 2  # attention, dense, experts
    assert matrices.count(onnx.TensorProto.UINT8) == 1  # the word table


def test_int8_alone_leaves_no_other_file(exported, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    monkeypatch.setattr(
        onnx_export, "_write_float32", lambda _, target: target.write_text("float32")
    )
    monkeypatch.setattr(onnx_export, "_write_int8", lambda _, target: target.write_text("int8"))
    folder.mkdir()
    onnx_export.write_onnx(folder, "int8")
    assert [path.name for path in (folder / "onnx").iterdir()] == ["model_qint8.onnx"]


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name.startswith("onnx") else find_spec(name, *rest),
    )
    flags = ("export", f"--source={tmp_path}", f"--target={tmp_path / 'out'}", "--onnx=both")
    assert launch(monkeypatch, "convert", *flags) == 2
    packages = "--onnx needs the packages onnx, onnxscript, onnxruntime: pip install -e .[onnx]"
    assert packages in capsys.readouterr().err


def test_sentence_transformers_opens_it(exported, data_dir, tmp_path):
    """In environments that have optimum-onnx; 0.1.0 refuses transformers 5."""
    try:
        import optimum.onnxruntime  # noqa: F401
    except ImportError as error:
        pytest.skip(f"optimum-onnx cannot be imported: {error}")
    from sentence_transformers import SentenceTransformer

    labelled_model.write_model(tmp_path / "source", data_dir, n_layer=2, num_experts=2)
    export_model(tmp_path / "source", tmp_path / "out", onnx="fp32")
    options = dict(backend="onnx", trust_remote_code=True, device="cpu")
    found = SentenceTransformer(str(tmp_path / "out"), **options).encode(["tanara", ""])
    expected = Embedder.load(tmp_path / "out").encode(["tanara", ""], prompt=None)
    np.testing.assert_allclose(found, expected, atol=1e-5)
