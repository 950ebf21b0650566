"""launch/verify_export.py: runtimes that are installed, servers, what is wrong or absent."""

import importlib.util
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from conftest import ROOT
from helpers import labelled_model
from helpers.commands import launch
from helpers.stand_in_servers import serving

from moe_embed_jax import Embedder, storage
from moe_embed_jax.conversion import export_model
from moe_embed_jax.interop.verify import golden, report

NODE = pathlib.Path(os.environ.get("MOE_EMBED_NODE", ROOT))
HAVE_ONNX = all(importlib.util.find_spec(name) for name in ("torch", "onnxscript", "onnxruntime"))
MODULES = {
    "sentence-transformers": "sentence_transformers",
    "transformers": "transformers",
    "onnxruntime": "onnxruntime",
    "onnxruntime-int8": "onnxruntime",
    "openvino": "openvino",
    "fastembed": "fastembed",
}


@pytest.fixture(scope="module")
def exported(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    labelled_model.write_model(folder / "source", data_dir, n_layer=2, num_experts=2)
    export_model(folder / "source", folder / "out", onnx="both" if HAVE_ONNX else None)
    return folder / "out"


@pytest.fixture(scope="module")
def embedder(exported):
    return Embedder.load(exported)


def verify(monkeypatch, folder, *flags):
    try:
        return launch(monkeypatch, "verify_export", f"--model={folder}", *flags)
    except SystemExit as error:
        return error.code


def rows(folder):
    """runtime -> cells of the table in the card."""
    card = (folder / "README.md").read_text()
    table = card[card.index(report.BEGIN) : card.index(report.END)]
    lines = [line for line in table.splitlines() if line[:1] == "|"]
    return {cells[1].strip(): cells[2:-1] for line in lines[2:] for cells in [line.split("|")]}


def test_the_installed_runtimes_are_right(exported, embedder, monkeypatch, capsys):
    installed = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]
    if not HAVE_ONNX:
        pytest.skip("needs PyTorch and onnx")
    status = verify(monkeypatch, exported, f"--runtimes={','.join(installed)}")
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    assert list(rows(exported)) == ["moe_embed_jax", *installed]
    for name in installed:
        ids, difference, cosine = (cell.strip() for cell in rows(exported)[name][1:4])
        assert ids in ("34/35", "35/35") and float(cosine) > 0.95
        assert float(difference) < (0.2 if name == "onnxruntime-int8" else 1e-5)
    kept = json.loads((exported / "golden.json").read_text())
    assert kept["prefixes"] == {"query": "search_query: ", "document": "search_document: "}
    for text in kept["texts"]:
        (expected,) = embedder.encode([text["text"]], text["prompt"])
        np.testing.assert_allclose(text["vector"], expected, atol=1e-6)
        assert text["ids"] == embedder.tokenize([text["text"]], text["prompt"])[0].tolist()


def test_another_model_is_wrong_by_name(exported, tmp_path, monkeypatch, capsys):
    if not HAVE_ONNX:
        pytest.skip("needs PyTorch and onnx")
    shutil.copytree(exported, tmp_path / "out")
    shutil.copy(exported / "onnx" / "model_qint8.onnx", tmp_path / "out" / "onnx" / "model.onnx")
    assert verify(monkeypatch, tmp_path / "out", "--runtimes=onnxruntime") == 1
    error = capsys.readouterr().err
    assert error.startswith("onnxruntime is wrong: vectors differ although the token ids are equal")
    assert "**wrong**: vectors differ" in (tmp_path / "out" / "README.md").read_text()


def test_servers(exported, embedder, monkeypatch, capsys):
    with serving(embedder) as url:
        flags = [f"--{name}_url={url}" for name in ("tei", "vllm", "llama_server")]
        assert verify(monkeypatch, exported, "--runtimes=", *flags) == 0
    versions = {name: cells[0].strip() for name, cells in rows(exported).items()}
    assert versions == {
        "moe_embed_jax": "0.1.0",
        "text-embeddings-inference": "1.9.9, float32",
        "vllm": "0.33.0",
        "llama-server": "b9999",
    }
    assert all(float(cells[2]) < 1e-5 for cells in rows(exported).values())
    capsys.readouterr()

    def without_last_number(vector):
        return np.append(vector[:-1], 0) / np.linalg.norm(vector[:-1])

    with serving(embedder, without_last_number) as url:
        assert verify(monkeypatch, exported, "--runtimes=", f"--vllm_url={url}") == 1
    assert capsys.readouterr().err.startswith("vllm is wrong: vectors differ although the token")

    long = golden.golden_texts(max(embedder.max_lengths.values()))[-1]
    refused = [embedder.prefix(long.prompt) + long.text]
    with serving(embedder, refuse=refused) as url:
        assert verify(monkeypatch, exported, "--runtimes=", f"--llama_server_url={url}") == 0
    assert "refuses the long text (HTTP 413" in rows(exported)["llama-server"][-1]

    assert verify(monkeypatch, exported, "--runtimes=", f"--tei_url={url}") == 1  # it has ended
    error = capsys.readouterr().err
    assert error.startswith(f"text-embeddings-inference does not work: {url} does not answer: ")
    assert error.count("\n") == 1


def test_a_server_of_another_kind(exported, embedder, monkeypatch, capsys):
    with serving(embedder) as url:
        assert verify(monkeypatch, exported, "--runtimes=", f"--tei_url={url}/v1") == 1
    assert "text-embeddings-inference does not work: " in capsys.readouterr().err


def test_a_folder_in_a_bucket(exported, embedder, bucket, monkeypatch):
    for path in exported.rglob("*"):
        if path.is_file():
            storage.copy(path, bucket / path.relative_to(exported).as_posix())
    runtime = "onnxruntime" if HAVE_ONNX else ""
    assert verify(monkeypatch, bucket, f"--runtimes={runtime}") == 0
    assert len(json.loads((bucket / "golden.json").read_text())["texts"]) == 35
    assert "moe_embed_jax" in rows(bucket)


def test_what_is_asked_for_and_not_here_is_a_fault(exported, tmp_path, monkeypatch, capsys):
    flags = ("--runtimes=llama.cpp", f"--node_folder={tmp_path}")
    assert verify(monkeypatch, exported, *flags) == 1
    assert capsys.readouterr().err.startswith("llama.cpp is not here: the folder has no *.gguf: ")
    source = exported.with_name("source")
    assert verify(monkeypatch, source) == 2
    assert f"{source} is no export with a tokenizer" in capsys.readouterr().err


@pytest.mark.node
def test_transformers_js(exported, monkeypatch, capsys):
    package = NODE / "node_modules" / "@huggingface" / "transformers"
    if shutil.which("node") is None or not package.is_dir() or not HAVE_ONNX:
        pytest.skip(f"needs node, {package} and onnx")
    flags = ("--runtimes=transformers.js", f"--node_folder={NODE}")
    assert verify(monkeypatch, exported, *flags) == 0, capsys.readouterr().err
    assert float(rows(exported)["transformers.js"][2]) < 1e-5


@pytest.mark.node
def test_llama_cpp_starts(exported, tmp_path, monkeypatch, capsys):
    """Its package forks, and the child was refused the options of the worker: no model was read."""
    if shutil.which("node") is None or not (NODE / "node_modules" / "node-llama-cpp").is_dir():
        pytest.skip(f"needs node, and node-llama-cpp in {NODE}")
    folder = shutil.copytree(exported, tmp_path / "with_gguf")
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert verify(monkeypatch, folder, "--runtimes=llama.cpp", f"--node_folder={NODE}") == 1
    said = capsys.readouterr().err
    assert "llama.cpp does not work" in said and "NoBinary" not in said, said
