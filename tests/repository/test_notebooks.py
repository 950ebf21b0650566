"""Notebooks run from top to bottom as a reader runs them, in small mode, and are clean to read."""

import collections
import fnmatch
import glob
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
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
CONSTRAINTS = f"constraints/python{sys.version_info.major}.{sys.version_info.minor}.txt"
ON_CPU = ("plan_a_pod", "pytorch_in_and_out")  # whatever the machine has
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
    assert second.cell_type == "code" and "installation.py" in second.source
    assert re.search(r"^assert ", code_cells(notebook)[-1].source, re.MULTILINE)
    for cell in notebook.cells:
        found = re.search(
            r"""(^|["'\s=(])(/(home|root|tmp|work|Users|content|mnt|opt)\b)""", cell.source
        )
        assert not found, f"cell {cell.id}: absolute path {found[2]}"


# ---- The first cell ------------------------------------------------------------------------------


class Machine:
    """Where a first cell runs: records the commands; `git clone` gives a repository.

    `devices`: what JAX sees; an error, what it raises.
    """

    def __init__(self, monkeypatch, importable=(), files=(), programs=(), devices=("gpu",)):
        self.commands = []
        monkeypatch.setenv("JAX_PLATFORMS", "")
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        self.devices = devices
        monkeypatch.setattr(jax, "devices", self.seen)
        monkeypatch.setattr(sys, "path", list(sys.path))
        spec = importlib.util.find_spec("moe_embed_jax")
        known = {name: spec for name in importable}
        monkeypatch.setattr(importlib.util, "find_spec", known.get)
        monkeypatch.setattr(
            glob, "glob", lambda pattern: [f for f in files if fnmatch.fnmatch(f, pattern)]
        )
        monkeypatch.setattr(shutil, "which", lambda name: name if name in programs else None)
        monkeypatch.setattr(subprocess, "run", self.run)

    def seen(self):
        if isinstance(self.devices, Exception):
            raise self.devices
        return [types.SimpleNamespace(platform=name, device_kind=name) for name in self.devices]

    def run(self, command, check):
        assert check
        self.commands.append(command)
        if command[:2] == ["git", "clone"]:
            write_repository(pathlib.Path(command[-1]))


def write_repository(folder: pathlib.Path) -> pathlib.Path:
    for name in ("notebooks/installation.py", CONSTRAINTS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "configs").mkdir()
    (folder / "configs" / "quickstart.py").touch()
    return folder


def first_cell(path: pathlib.Path) -> str:
    return code_cells(read(path))[0].source


@by_notebook
def test_the_first_cell_installs_from_the_repository_around_it(path, tmp_path, monkeypatch):
    repository = write_repository(tmp_path / "repository")
    monkeypatch.chdir(repository / "notebooks")
    machine = Machine(monkeypatch)
    exec(first_cell(path), {})
    (command,) = machine.commands
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-4:-2] == ["--constraint", str(repository / CONSTRAINTS)]
    extra = f"[{NEEDS[path.stem][0]}]" if path.stem in NEEDS else ""
    assert command[-2:] == ["--editable", f"{repository}{extra}"]
    assert sys.path[0] == str(repository)


@by_notebook
def test_alone_the_first_cell_clones_what_the_reader_names(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    machine = Machine(monkeypatch)
    source = first_cell(path)
    with pytest.raises(RuntimeError, match="set REPOSITORY"):
        exec(source, {})
    assert not machine.commands
    address = "https://example.org/moe_embed_jax.git"
    exec(source.replace('REPOSITORY = ""', f'REPOSITORY = "{address}"'), {})
    clone, install = machine.commands
    assert address in clone and str(tmp_path / "repository") in install[-1]


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


ACCELERATORS = {
    "tpu": dict(files=["/dev/accel0"], devices=["tpu"]),
    "tpu behind vfio": dict(files=["/dev/vfio/0"], devices=["tpu"]),
    "cuda12": dict(programs=["nvidia-smi"], devices=["gpu"]),
}


def in_repository(tmp_path, monkeypatch) -> pathlib.Path:
    repository = write_repository(tmp_path / "repository")
    monkeypatch.chdir(repository)
    return repository


@by_notebook
@pytest.mark.parametrize("kind", ACCELERATORS)
def test_the_first_cell_installs_the_jax_of_the_machine(path, kind, tmp_path, monkeypatch, capsys):
    in_repository(tmp_path, monkeypatch)
    machine = Machine(monkeypatch, **ACCELERATORS[kind])
    exec(first_cell(path), {})
    (command,) = machine.commands
    extras = command[-1].partition("[")[2].strip("]").split(",")
    needed = [] if path.stem in ON_CPU else [kind.split()[0]]
    assert [extra for extra in extras if extra in ("tpu", "cuda12")] == needed
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(pathlib.Path.cwd() / "runs/compiled")
    assert ("JAX" in capsys.readouterr().out) == bool(needed)


@pytest.mark.parametrize("devices", [["cpu"], RuntimeError("no device\nmore")])
def test_an_accelerator_that_jax_does_not_see_is_one_line(devices, tmp_path, monkeypatch):
    in_repository(tmp_path, monkeypatch)
    path = ROOT / "notebooks" / "train_and_search.ipynb"
    Machine(monkeypatch, ["moe_embed_jax"], programs=["nvidia-smi"], devices=devices)
    with pytest.raises(RuntimeError, match=r"has a GPU, but JAX does not see it.*restart") as said:
        exec(first_cell(path), {})
    assert len(str(said.value).splitlines()) == 1
    Machine(monkeypatch, ["moe_embed_jax"], programs=["nvidia-smi"], devices=devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # the reader's wish
    exec(first_cell(path), {})


def test_what_was_imported_before_the_installation_changed_it_is_named(tmp_path, monkeypatch):
    in_repository(tmp_path, monkeypatch)
    Machine(monkeypatch)
    monkeypatch.setattr(jax, "__version__", "0.7.2")
    path = ROOT / "notebooks" / "train_and_search.ipynb"
    with pytest.raises(RuntimeError, match="has imported the old jax: restart"):
        exec(first_cell(path), {})


def test_a_python_without_constraints_is_refused(tmp_path, monkeypatch):
    (in_repository(tmp_path, monkeypatch) / CONSTRAINTS).unlink()
    machine = Machine(monkeypatch)
    with pytest.raises(RuntimeError, match="is not supported"):
        exec(first_cell(ROOT / "notebooks" / "train_and_search.ipynb"), {})
    assert not machine.commands


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
    client = nbclient.NotebookClient(notebook, km=manager, timeout=800)
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
