"""What the documentation says exists: links, files, flags, keys, commands; and Sphinx builds it."""

import argparse
import ast
import csv
import importlib
import importlib.util
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, load_benchmark

import moe_embed_jax
from moe_embed_jax import config as config_files
from moe_embed_jax import launching
from moe_embed_jax.evaluation.heldout import load_heldout
from moe_embed_jax.recipe.config import Recipe
from moe_embed_jax.training.run_config import RUN_CONFIGS

PAGES_OF_TEXT = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("benchmarks", "configs", "docs", "launch", "moe_embed_jax", "tests")
DOCSTRINGS = [*sorted(ROOT.glob("configs/*.py")), *sorted(ROOT.glob("launch/*.py"))]
FILES = [
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.*"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.*")))
]
# No files of the repository.
MADE_BY_COMMANDS = {"report.md", "routing.md", "table.md", "modeling_moe_embed.py"}
SCRIPT = r"(?:(?:launch|benchmarks|docs/pictures)/\w+\.py|-m moe_embed_jax\.[\w.]+)"


def name(path):
    return str(path.relative_to(ROOT))


def fences(text: str) -> list[str]:
    """Code blocks: fenced, and indented by four."""
    indented = "\n".join(line[4:] if line.startswith("    ") else "" for line in text.splitlines())
    fenced = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [*fenced, indented]


def inline(text: str) -> list[str]:
    """What stands in single backticks, outside of blocks."""
    outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", outside)]


def slugs(path) -> set[str]:
    """The anchors that GitHub and Sphinx make of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- links and names ---------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES_OF_TEXT, ids=name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), f"{name(page)} links to {link}"
        if anchor:
            assert anchor in slugs(path), f"{name(page)} links to {link}"


@pytest.mark.parametrize("page", PAGES_OF_TEXT, ids=name)
def test_named_files_and_tests_exist(page):
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for code in inline(page.read_text()):
        if re.fullmatch(r"[\w./-]+\.(py|md|sh|svg|cfg)", code) and not code.startswith("runs/"):
            known = any(f"/{path}".endswith(f"/{code}") for path in FILES)
            assert known or code.removeprefix("OUTPUT/") in MADE_BY_COMMANDS, (
                f"{name(page)} names {code}"
            )
        if re.fullmatch(r"test_\w+", code):
            assert f"def {code}(" in tests, f"{name(page)} names {code}"


def test_a_missing_file_would_be_seen():
    """The checks above look at something: the pages have links, files and commands."""
    text = "".join(page.read_text() for page in PAGES_OF_TEXT)
    assert len(re.findall(r"\]\([^)\s]+\)", text)) > 50
    assert sum(code.endswith(".py") for code in inline(text)) > 30
    assert len(COMMANDS) > 40


# ---- commands ----------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """`python SCRIPT ...` of a block, whole, without what a shell would not pass on."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(rf"python ({SCRIPT}[^\n]*)", joined)
    return [re.split(r" && | & | \| |   ", command)[0].rstrip(" &") for command in found]


def plain(command: str) -> list[str]:
    """The words of a command with its notation resolved: [optional], a|b, N."""
    command = command.replace("[:variant]", ":smoke")
    command = command.replace("--config=...", "--config=configs/mlm.py:smoke")
    before = None
    while before != command:
        before = command
        command = re.sub(r"\[(?!--)[^\[\]]*\]", "", command)
    command = re.sub(r"\[(--[^\[\]]*)\]", r"\1", command)
    command = re.sub(r"=N\b", "=1", command)
    if command.count('"') % 2:  # the end of what another command is given in quotes
        command = command.rstrip(' "')
    return [word.partition("|")[0] for word in shlex.split(command, comments=True)]


def docstring(path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


COMMANDS = sorted(
    {
        (command, name(path))
        for path in [*PAGES_OF_TEXT, *DOCSTRINGS]
        for block in (fences(path.read_text()) if path.suffix == ".md" else [docstring(path)])
        for command in commands(block)
    }
)


class Parsed(Exception):
    """Raised in place of doing what the command says, once it is understood."""


def load_main(script: str):
    """The `main` of launch/x.py, benchmarks/x.py or a module."""
    if script.startswith("launch/"):
        spec = importlib.util.spec_from_file_location(script, ROOT / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main
    if script.startswith("benchmarks/"):
        return load_benchmark(script.removeprefix("benchmarks/").removesuffix(".py")).main
    if script.endswith(".py"):
        return runpy.run_path(str(ROOT / script))["main"]
    return importlib.import_module(script).main


@pytest.mark.parametrize(("command", "page"), COMMANDS, ids=[c[:90] for c, _ in COMMANDS])
def test_commands_parse(command, page, monkeypatch):
    """Script, flags, config page, keys and the kinds of their values."""
    words = plain(command)
    if words[0] == "-m":
        words = words[1:]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    parse_args = argparse.ArgumentParser.parse_args
    parse_with_config = launching.parse_with_config

    def parse_only(self, *arguments):
        parse_args(self, *arguments)
        raise Parsed

    def parse_only_with_config(*arguments):
        parse_with_config(*arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(launching, "parse_with_config", parse_only_with_config)
    if words[0] == "launch/prepare.py":
        pytest.importorskip("apache_beam")
        from moe_embed_jax.preparation.beam import pipeline, sources

        def check_only(options):
            pipeline._check_flags(options.beam)
            raise Parsed

        monkeypatch.setattr(sources, "read_sources", lambda path: [])  # its files are not here
        monkeypatch.setattr(pipeline, "prepare", check_only)
    if words[0].startswith("docs/"):
        assert (ROOT / words[0]).is_file()
        return
    with pytest.raises(Parsed):
        load_main(words[0])()


def test_wrong_commands_do_not_parse(monkeypatch):
    for command in (
        "launch/embed.py --model=DIR --input=a.txt --output=a.npy --prompt=query --dimension=3",
        "launch/train.py --config=configs/mlm.py:smoke --workdir=a --config.data.row_lenght=3",
        "launch/train.py --config=configs/mlm.py:smoke --workdir=a --config.batch_size=many",
        "launch/train.py --config=configs/none.py --workdir=a",
    ):
        with pytest.raises(Exception, match=r"argument|config"):
            test_commands_parse(command, "", monkeypatch)


def keys_of(section, prefix: str = ""):
    """Full names of the keys of a page, sections included."""
    for key, value in section.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


@pytest.mark.parametrize("page", PAGES_OF_TEXT, ids=name)
def test_named_keys_exist(page):
    """`data.chunk_rows`, `--config.filter.k=5` and the like, wherever they are named."""
    pages = [config_files.defaults(cls) for cls in (*RUN_CONFIGS.values(), Recipe)]
    known = set(itertools.chain.from_iterable(map(keys_of, pages)))
    sections = "init|model|data|optimizer|loss|mesh|health"
    text = page.read_text()
    named = re.findall(r"--config\.([\w.]*\w)", text)
    for code in inline(text):
        named += re.findall(rf"^((?:{sections})\.[a-z_.]+[a-z_])(?:=.*|)$", code)
        named += re.findall(rf"^config\.((?:{sections})\.\w+)$", code)
    for key in named:
        key = re.sub(r"^stage\d\.set\.|^stageN\.set\.", "", key)
        if re.search(r"\.(py|safetensors|prepare)$|^stage\d\.config$", key):  # a file, a module
            continue
        key = re.sub(r"^(loss\.dims|data\.rates)\..*", r"\1", key)
        assert key in known, f"{name(page)} names the key {key}"


# ---- pages that are run, and built -------------------------------------------------------------


@pytest.fixture
def split(tmp_path, monkeypatch):
    """split(bytes of a CSV file) runs the program of docs/own_data.md on it."""
    page = (ROOT / "docs" / "own_data.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    limit = csv.field_size_limit()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "own").mkdir(parents=True)

    def run(content: bytes) -> None:
        (tmp_path / "runs" / "own" / "faq.csv").write_bytes(content)
        exec(compile(program, "split.py", "exec"), {"__name__": "__main__"})

    yield run
    csv.field_size_limit(limit)


LONG = "sehr lang " * 20_000


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("cell", [",", ";", "\t"])
def test_the_split_of_own_data(split, tmp_path, cell, start):
    """The program of docs/own_data.md on a small CSV file with what such files have."""
    rows = [f'"How, or; why, {i}?"{cell}"Because of {i // 2}."' for i in range(300)]
    rows += [rows[0], f'"  "{cell}"An answer without a question."', f'"Größe?"{cell}"多 行\nzwei"']
    rows += [f"{LONG}{cell}x"]
    split(start + "\n".join([f"question{cell}answer", *rows]).encode())
    own = tmp_path / "runs" / "own"
    train = [json.loads(line) for line in (own / "train.jsonl").read_text().splitlines()]
    (heldout,) = load_heldout(own / "data").values()
    assert not {row["query"] for row in train} & set(heldout.queries)
    assert len(train) + len(heldout.queries) == 302
    assert 15 <= len(heldout.queries) <= 50
    assert heldout.oddities() == ""
    assert {row["document"] for row in train} <= set(heldout.documents)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"question,answer\na,b\nonly\n", "faq.csv, line 3: cells are missing, or not quoted"),
        (b"question,answer\na,b, and more\n", "faq.csv, line 2: cells are missing, or not quoted"),
        (b"Question,answer\na,b\n", "no column question; there are ['Question', 'answer']"),
        (b"", "faq.csv: no column answer; there are None"),
        (b'question,answer\na,"b\nc,d\n', "faq.csv: unexpected end of data"),
        (b"question,answer\na,\xfc\n", "faq.csv: 'utf-8' codec can't decode byte 0xfc"),
    ],
)
def test_the_split_names_what_it_cannot_read(split, content, message):
    with pytest.raises(SystemExit) as ended:
        split(content)
    assert message in ended.value.code and "\n" not in ended.value.code


def test_versions_agree():
    version = moe_embed_jax.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert {"cff-version", "message", "title", "authors", "references"} <= set(citation)
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_sphinx_builds_without_warnings(tmp_path):
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module, reason="pip install -e .[docs]")
    command = ["-m", "sphinx", "-W", "--keep-going", "--quiet", "-E", "-b", "html", "docs"]
    result = subprocess.run(
        [sys.executable, *command, tmp_path / "html", "-d", tmp_path / "doctrees"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    page = (tmp_path / "html" / "api" / "embedder.html").read_text()
    assert 'id="moe_embed_jax.embedder.Embedder.encode"' in page
    assert "Matryoshka" in page  # the docstring's text, not the signature alone
    modules = set(
        re.findall(
            r"automodule:: ([\w.]+)",
            "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.rst")),
        )
    )
    built = "".join(path.read_text() for path in (tmp_path / "html" / "api").glob("*.html"))
    missing = [module for module in modules if f'id="module-{module}"' not in built]
    assert not missing
