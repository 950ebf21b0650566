"""Notebooks run from top to bottom as a reader runs them, in small mode, and are clean to read."""

import collections
import glob
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, metric, python_environment
from helpers import synthetic_data
from rich.console import Console
from rich.table import Table

from moe_embed_jax.data.data_spec import vocabulary_path

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What an extra brings, of the notebooks that need one.
NEEDS = {
    "plan_a_pod": ("plan", ["libtpu"]),
    "pytorch_in_and_out": ("pytorch", ["torch", "transformers", "sentence_transformers"]),
}
NOWHERE = "http://127.0.0.1:9"  # nothing listens on the discard port
# After the notebook, in its kernel: what it found, and which Python found it.
REPORT = 'import json, sys; print(json.dumps([sys.executable, globals().get("result")]))'
by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: pathlib.Path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# ---- As they are stored --------------------------------------------------------------------------


def test_every_notebook_is_checked():
    assert CHECKS.keys() == {path.stem for path in NOTEBOOKS}


@by_notebook
def test_format(path):
    content = json.loads(path.read_text())
    nbformat.validate(content)
    notebook = read(path)
    assert notebook.nbformat == 4 and notebook.nbformat_minor >= 5
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.metadata, f"cell {cell.id} has metadata {cell.metadata}"
        assert cell.source.strip(), f"cell {cell.id} is empty"
    for cell in code_cells(notebook):
        assert not cell.outputs and cell.execution_count is None, f"cell {cell.id} has outputs"
    # Random ids change whenever a notebook is written anew.
    repeated = [i for i, n in collections.Counter(c.id for c in notebook.cells).items() if n > 1]
    assert not repeated
    assert not [cell.id for cell in notebook.cells if re.fullmatch("[0-9a-f]{8}", cell.id)]


@by_notebook
def test_a_reader_can_begin_and_rely_on_the_end(path):
    notebook = read(path)
    first, second = notebook.cells[:2]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "open in colab" in first.source.lower()
    assert second.cell_type == "code" and "pip" in second.source
    assert re.search(r"^assert ", code_cells(notebook)[-1].source, re.MULTILINE)
    for cell in notebook.cells:
        found = re.search(
            r"""(^|["'\s=(])(/(home|root|tmp|work|Users|content|mnt|opt)\b)""", cell.source
        )
        assert not found, f"cell {cell.id}: absolute path {found[2]}"


# ---- The first cell ------------------------------------------------------------------------------


class Machine:
    """Where a first cell runs: records the commands; `git clone` gives a repository."""

    def __init__(self, monkeypatch, importable=(), files=(), programs=()):
        self.commands = []
        monkeypatch.setattr(sys, "path", list(sys.path))
        spec = importlib.util.find_spec("moe_embed_jax")
        known = {name: spec for name in importable}
        monkeypatch.setattr(importlib.util, "find_spec", known.get)
        monkeypatch.setattr(glob, "glob", lambda pattern: [f for f in files if f in pattern])
        monkeypatch.setattr(shutil, "which", lambda name: name if name in programs else None)
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, command, check):
        assert check
        self.commands.append(command)
        if command[:2] == ["git", "clone"]:
            write_repository(pathlib.Path(command[-1]))


def write_repository(folder: pathlib.Path) -> pathlib.Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "quickstart.py").touch()
    return folder


def first_cell(path: pathlib.Path) -> str:
    return code_cells(read(path))[0].source


@by_notebook
def test_the_first_cell_installs_from_the_repository_around_it(path, tmp_path, monkeypatch):
    repository = write_repository(tmp_path / "repository")
    (repository / "notebooks").mkdir()
    monkeypatch.chdir(repository / "notebooks")
    machine = Machine(monkeypatch)
    exec(first_cell(path), {})
    (command,) = machine.commands
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    extra = NEEDS.get(path.stem, ("", []))[0]
    assert command[-2:] == ["--editable", f"{repository}[{extra}]"]
    assert sys.path[0] == str(repository)


@by_notebook
def test_alone_the_first_cell_clones_what_the_reader_names(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    machine = Machine(monkeypatch, files=["/dev/accel"], programs=["nvidia-smi"])
    source = first_cell(path)
    with pytest.raises(RuntimeError, match="set REPOSITORY"):
        exec(source, {})
    assert not machine.commands
    address = "https://example.org/moe_embed_jax.git"
    exec(source.replace('REPOSITORY = ""', f'REPOSITORY = "{address}"'), {})
    clone, install = machine.commands
    assert address in clone
    # A TPU and a GPU are seen (no machine has both).
    assert any(re.fullmatch(r".*\[(.*,)?tpu\]", word) for word in install)
    assert "jax[cuda12]" in install


@by_notebook
def test_the_first_cell_leaves_an_installation_alone(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    modules = NEEDS.get(path.stem, ("", []))[1]
    machine = Machine(monkeypatch, ["moe_embed_jax", *modules])
    variables = {}
    exec(first_cell(path), variables)
    assert not machine.commands and variables["ROOT"] == ROOT
    if modules:  # the package without the extra
        machine = Machine(monkeypatch, ["moe_embed_jax", *modules[1:]])
        exec(first_cell(path), {})
        assert len(machine.commands) == 1


# ---- From top to bottom --------------------------------------------------------------------------


def execute(path: pathlib.Path, folder: pathlib.Path, **environment):
    """(the notebook with outputs, its variable `result`); runs in `folder`, without a network."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    before = sorted(path.parent.rglob("*"))
    env = python_environment(
        1,
        MOE_EMBED_NOTEBOOK_SMALL="1",
        HF_HOME=str(folder / "hub"),
        HF_HUB_OFFLINE="1",
        IPYTHONDIR=str(folder / "ipython"),
        http_proxy=NOWHERE,
        https_proxy=NOWHERE,
        **environment,
    )
    notebook = read(path)
    notebook.cells.append(nbformat.v4.new_code_cell(REPORT))
    # No folder of installed kernels: what is left is the kernel of this Python.
    specs = KernelSpecManager(kernel_dirs=[])
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    client = nbclient.NotebookClient(notebook, km=manager, timeout=1200)
    client.execute(cleanup_kc=True, env=env, cwd=str(folder))
    executable, result = json.loads(notebook.cells[-1].outputs[0].text)
    assert executable == sys.executable
    assert sorted(path.parent.rglob("*")) == before, "the notebook wrote beside itself"
    return notebook, result


def skip_without_extra(name: str) -> None:
    extra, modules = NEEDS.get(name, ("", []))
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e .[{extra}]")


def check_train_and_search(notebook, result, folder):
    workdir = folder / "runs" / "train_and_search"
    assert result["ndcg_at_10"]["trained"] > result["ndcg_at_10"]["untrained"]
    assert list(result["first_is_right"]) == ["32", "16", "8", "4", "2"]
    losses = metric(workdir, "loss")
    assert len(losses) == 200 and losses[-20:].mean() < losses[:20].mean()
    kinds = {
        cell.id: [set(o.get("data", {})) for o in cell.get("outputs", [])]
        for cell in notebook.cells
    }
    assert any("image/png" in kind for kind in kinds["picture"])
    assert any("text/html" in kind for kind in kinds["search"])  # the table of hits


def check_pytorch_in_and_out(notebook, result, folder):
    exported = folder / "runs" / "pytorch_in_and_out" / "exported"
    assert (exported / "modeling_moe_embed.py").is_file()
    assert len(result) == 9
    large = {name for name, difference in result.items() if difference > 2e-5}
    assert {name.split(":")[0] for name in large} == {"upcycled, paper", "experts with noise"}


def check_plan_a_pod(notebook, result, folder):
    page, rows, pairs = result.values()
    assert page["predicted"] is True and page["fits"] and page["chips"] == 4
    assert 0 < page["hbm_bytes_per_chip"] < page["hbm_capacity_bytes"]
    assert page["predicted_step_seconds"] > 0 and page["run_chip_hours"] > 0
    assert rows["hbm_bytes_per_chip"] > page["hbm_bytes_per_chip"]
    assert pairs["model_flops_per_chip"] == pytest.approx(2 * page["model_flops_per_chip"], rel=0.1)
    printed = "".join(
        o.get("text", "") + str(o.get("data")) for c in code_cells(notebook) for o in c.outputs
    )
    assert printed.count("predicted") > 5


def check_look_inside_the_routing(notebook, result, folder):
    output = folder / "runs" / "look_inside_the_routing"
    losses = metric(output / "model", "loss")
    assert len(losses) == 80 and losses[-10:].mean() < losses[:10].mean()
    report = json.loads((output / "routing" / "routing.json").read_text())
    # Two kinds of three languages with 24 held-out pairs each; layers 1 and 3 have experts.
    assert result["texts"] == report["texts"] == 2 * 3 * 24
    information = report["language"]["information"]
    assert list(result["bits"]) == [str(layer["layer"]) for layer in information] == ["1", "3"]
    assert list(result["bits"].values()) == pytest.approx(
        [i["bits"] for i in information], abs=1e-6
    )
    assert max(result["bits"].values()) > result["shuffled_max"] > 0
    assert len(result["untrained"]) == 2 and all(bits >= 0 for bits in result["untrained"])
    assert result["untrained"] != pytest.approx(list(result["bits"].values()), abs=1e-4)
    cells = {cell.id: cell for cell in notebook.cells}
    for picture in ("report", "by-language", "chance"):
        assert any("image/png" in o.get("data", {}) for o in cells[picture].outputs), picture
    shown = cells["unknown"].outputs[0].data["text/plain"]
    assert all(f"│ {language} " in shown for language in synthetic_data.LANGUAGES), shown


CHECKS = {
    "look_inside_the_routing": check_look_inside_the_routing,
    "plan_a_pod": check_plan_a_pod,
    "pytorch_in_and_out": check_pytorch_in_and_out,
    "train_and_search": check_train_and_search,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.tpu_aot] if path.stem == "plan_a_pod" else [])
        for path in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
def test_runs_from_top_to_bottom(path, data_dir, tmp_path):
    skip_without_extra(path.stem)
    notebook, result = execute(path, tmp_path, MOE_EMBED_DATA=str(data_dir))
    assert result, "the last cell sets `result`: the numbers that the notebook found"
    CHECKS[path.stem](notebook, result, tmp_path)


@pytest.mark.slow
def test_a_checkpoint_of_the_readers_own(data_dir, tmp_path):
    """A BERT with a SentencePiece model, as multilingual-e5-small is."""
    skip_without_extra("pytorch_in_and_out")
    import transformers

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    config = transformers.BertConfig(vocab_size=512, initializer_range=0.2, **sizes)
    source = tmp_path / "own"
    transformers.BertModel(config).save_pretrained(source)
    vocabulary = vocabulary_path(synthetic_data.PREPARATION, data_dir)
    shutil.copyfile(vocabulary, source / "sentencepiece.bpe.model")
    path = ROOT / "notebooks" / "pytorch_in_and_out.ipynb"
    notebook, result = execute(path, tmp_path, MOE_EMBED_SOURCE=str(source))
    check_pytorch_in_and_out(notebook, result, tmp_path)
    (cell,) = (cell for cell in notebook.cells if cell.id == "summary")
    assert str(source)[:20] in str(cell.outputs[0].data)
    assert not (tmp_path / "runs" / "pytorch_in_and_out" / "bert").exists()


def test_a_wrong_number_stops_a_notebook():
    """The checks at the end can fail: a difference to PyTorch of 1e-3 does."""
    source = code_cells(read(ROOT / "notebooks" / "pytorch_in_and_out.ipynb"))[-1].source
    given = {"Table": Table, "Console": Console, "SOURCE": "", "same_bytes": True}
    exec(source, given | {"differences": {"dense: embeddings": 1e-6}})
    with pytest.raises(AssertionError, match="more than rounding"):
        exec(source, given | {"differences": {"dense: embeddings": 1e-3}})
    with pytest.raises(AssertionError, match="should be a change"):
        exec(source, given | {"differences": {"upcycled, paper: embeddings": 1e-6}})
