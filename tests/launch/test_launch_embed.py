"""launch/embed.py and launch/evaluate.py, with a stand-in for the model."""

import gzip
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from helpers.stand_in_teacher import StandInTeacher

from moe_embed_jax import embedder as embedder_module
from moe_embed_jax import launching
from moe_embed_jax.curation import teacher
from moe_embed_jax.errors import UserError
from moe_embed_jax.ownership import own
from moe_embed_jax.pairs.row import PairRow
from moe_embed_jax.preparation.pair_writer import PairWriter
from moe_embed_jax.search.vectors import VectorStore
from moe_embed_jax.tokenizers.truncation import Truncation

WIDTH = 64


class StandIn:
    """Embeds a text as the normalised sum of its words' random vectors; the prompt is a word."""

    calls: list = []  # noqa: RUF012

    @classmethod
    def load(cls, folder, mesh, weights):
        cls.calls = []
        stand_in = cls()
        stand_in.mesh = mesh
        return stand_in

    has_prompts = True

    def __init__(self):
        self.truncation = Truncation()

    def identity(self, prompt):
        return {"hash": "stand-in", **self.text_form(prompt)}

    def text_form(self, prompt):
        return {"prefix": str(prompt), "max_length": 8}

    def encode(self, texts, prompt="query", dim=None, batch_size=None, show_progress=False):
        if prompt == "both":
            raise UserError("prompt='both': choose query or document")
        type(self).calls.append((prompt, len(texts)))
        # One token a word; it "reads" 8, as `text_form` says.
        length_N = np.array([len(text.split()) for text in texts], np.int64)
        cut_N = np.maximum(length_N - 8, 0)
        counts = len(texts), length_N.sum(), np.count_nonzero(cut_N), cut_N.sum()
        self.truncation.add("query" if prompt == "query" else "document", 8, counts)
        x = np.zeros((len(texts), WIDTH), np.float32)
        for row, text in zip(x, texts, strict=True):
            for word in [str(prompt)] * (not text) + text.lower().split():
                seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
                row += np.random.default_rng(seed).normal(size=WIDTH)
        x = x[:, :dim]
        return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def launch(monkeypatch, tmp_path):
    """launch("embed", "--flag=value", ...) -> exit status, in `tmp_path`, with a model folder."""
    monkeypatch.setattr(embedder_module, "Embedder", StandIn)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()

    def run(name, *arguments, chunk=None):
        path = ROOT / "launch" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"launch_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if chunk:
            monkeypatch.setattr(module, "TEXTS_PER_CHUNK", chunk)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        return launching.run(module.main)

    return run


EMBED = ("--model=model", "--output=emb.npy", "--prompt=document")


def one_line_error(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert not list(Path().glob("*.npy*")) and not list(Path().glob(".*.partial"))
    return captured.err


def test_embeds_in_order_and_in_chunks(launch, tmp_path):
    texts = [f"word{i} and {'more ' * (i % 7)}" for i in range(25)]
    lines = [json.dumps(t if i % 2 else {"text": t}) for i, t in enumerate(texts)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    assert launch("embed", *EMBED, "--input=texts.jsonl", chunk=10) == 0
    found = np.load("emb.npy")
    assert StandIn.calls == [("document", 0), ("document", 10), ("document", 10), ("document", 5)]
    assert found.dtype == np.float32 and found.shape == (25, WIDTH)
    np.testing.assert_array_equal(found, StandIn().encode(texts, prompt="document"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_writes_a_folder_that_continues(launch, tmp_path, capsys, dtype):
    texts = [f"word{i}" for i in range(25)]
    (tmp_path / "t.txt").write_text("\n".join(texts) + "\n")
    flags = ["--model=model", "--input=t.txt", "--output=emb.zarr", f"--dtype={dtype}"]
    assert launch("embed", *flags, "--prompt=document") == 0
    assert f"emb.zarr: {dtype} [25, 64]" in capsys.readouterr().out
    store = VectorStore("emb.zarr")
    expected = StandIn().encode(texts, prompt="document").astype(jnp.dtype(dtype))
    assert store[:].dtype == store.dtype == expected.dtype
    np.testing.assert_array_equal(store[:], expected)
    assert launch("embed", *flags, "--prompt=document") == 0
    assert StandIn.calls == [("document", 0)]  # nothing was left to embed
    assert launch("embed", *flags, "--prompt=query") == 2
    assert "encoder.prefix: document -> query" in one_line_error(capsys)


def test_says_how_many_texts_were_cut(launch, tmp_path, capsys):
    texts = ["eins zwei", "wort " * 10, "wort " * 12]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert launch("embed", "--input=in.jsonl", *EMBED, chunk=2) == 0
    line = "document: 2 of 3 texts are longer than 8 tokens: 6 of 24 tokens (25.0%) are cut off"
    assert line in capsys.readouterr().out.splitlines()


def test_titles_fields_and_dim(launch, tmp_path):
    record = {"title": "A title", "text": "the text", "body": "the body"}
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(json.dumps(record).encode()))
    encode = StandIn().encode
    assert launch("embed", *EMBED, "--input", "t.jsonl.gz", "--dim", "8") == 0
    np.testing.assert_array_equal(np.load("emb.npy"), encode(["A title the text"], dim=8))
    assert launch("embed", *EMBED, "--input=t.jsonl.gz", "--field=body") == 0
    np.testing.assert_array_equal(np.load("emb.npy"), encode(["the body"]))


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz"])
def test_plain_text_keeps_empty_lines(launch, tmp_path, name):
    data = "eins\n\n  drei\u2028drei\r\nvier".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert launch("embed", *EMBED, f"--input={name}") == 0
    expected = StandIn().encode(["eins", "", "  drei\u2028drei", "vier"], prompt="document")
    np.testing.assert_array_equal(np.load("emb.npy"), expected)


def test_empty_file(launch, tmp_path):
    (tmp_path / "t.jsonl").touch()
    assert launch("embed", *EMBED, "--input=t.jsonl", "--dim=16") == 0
    assert np.load("emb.npy").shape == (0, 16)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "t.jsonl:17: bad JSON at column 2"),
        (b"", "t.jsonl:17: empty line"),
        (b'"\xc3"', "t.jsonl:17: invalid UTF-8 at byte 2 of the line"),
        (b"3", "t.jsonl:17: expected a JSON string or object, got 3"),
        (b'{"txt": "x"}', "t.jsonl:17: field 'text' is missing (fields: txt)"),
        (b'{"text": null}', "t.jsonl:17: field 'text' must be a string, got None"),
        (b"[" * 100_000, "t.jsonl:17: bad JSON"),
    ],
)
def test_bad_lines(launch, tmp_path, capsys, line, message):
    (tmp_path / "t.jsonl").write_bytes(b'"fine"\n' * 16 + line + b'\n"fine"\n')
    StandIn.calls = []
    assert launch("embed", *EMBED, "--input=t.jsonl") == 2
    assert message in one_line_error(capsys)
    assert StandIn.calls == []  # found before anything was embedded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input=gone.jsonl"], "gone.jsonl: cannot be read: No such file"),
        (["--input=model"], "model: unknown kind of file"),
        (["--input=t.txt", "--model=nothing"], "model folder nothing does not exist"),
        (["--input=t.txt", "--output=emb.txt"], "must be a file named *.npy"),
        (["--input=t.txt", "--output=t.txt/emb.npy"], "cannot be written"),
        (["--input=t.txt", "--dtype=float16"], "--dtype=float16: .npy is float32"),
        (["--input=t.txt", "--output=emb.zarr", "--dtype=int8"], "dtype=int8: choose one of"),
        (["--input=t.txt", "--prompt=both"], "prompt='both': choose"),
        (["--input=t.txt", "--inptu=x"], "unrecognized arguments: --inptu=x"),
    ],
)
def test_bad_flags(launch, tmp_path, capsys, arguments, message):
    (tmp_path / "t.txt").write_text("a\n")
    assert launch("embed", *EMBED, *arguments) == 2
    assert message in one_line_error(capsys)


@pytest.mark.parametrize("name", ["emb.npy", "emb.zarr"])
def test_two_at_once_are_refused(launch, tmp_path, capsys, name):
    (tmp_path / "t.txt").write_text("a\nb\n")
    flags = ("--model=model", f"--output={name}", "--prompt=document", "--input=t.txt")
    (tmp_path / ".emb.npy.partial").write_bytes(b"as kill -9 leaves it")
    with own(tmp_path / name):
        assert launch("embed", *flags) == 2
    assert f"{name} is in use by process" in capsys.readouterr().err
    assert launch("embed", *flags) == 0
    assert [path.name for path in tmp_path.glob(".*")] == [".emb.npy.partial"] * (name != "emb.npy")


def test_an_earlier_output_survives_a_failure(launch, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("a\n")
    assert launch("embed", *EMBED, "--input=t.txt") == 0
    before = (tmp_path / "emb.npy").read_bytes()

    def fail(self, texts, **_):
        if texts:
            raise RuntimeError("device lost")
        return np.zeros((0, WIDTH), np.float32)

    monkeypatch.setattr(StandIn, "encode", fail)
    with pytest.raises(RuntimeError, match="device lost"):
        launch("embed", *EMBED, "--input=t.txt")
    assert (tmp_path / "emb.npy").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["embed", "evaluate"])
def test_as_a_command(tmp_path, name):
    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )

    assert run("--help").returncode == 0
    (tmp_path / "t.jsonl").write_text("{\n")
    flags = {"embed": ["--input=t.jsonl", "--prompt=query"], "evaluate": ["--dataset=t.jsonl"]}
    result = run("--model=.", "--output=x.npy", *flags[name])
    assert result.returncode == 2
    assert result.stderr.startswith("error: t.jsonl:") and result.stderr.count("\n") == 1


def write_beir(folder, documents):
    folder.mkdir(parents=True)
    numbered = list(enumerate(documents))
    lines = [json.dumps({"_id": f"d{i}", "title": "", "text": d}) for i, d in numbered]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"_id": f"q{i}", "text": d.split()[0]}) for i, d in numbered]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    (folder / "qrels.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i, _ in numbered))


def test_evaluates_folders_of_equal_and_other_names(launch, tmp_path, capsys):
    write_beir(tmp_path / "a/de", ["rot rot gelb", "blau blau blau", "weiss weiss"])
    write_beir(tmp_path / "b/de", ["eins eins", "zwei zwei"])
    write_beir(tmp_path / "b/en", ["one one"])
    status = launch(
        "evaluate", "--model=model", "--dataset=a/de,b/de,b/en", "--output=out/results.json"
    )
    assert status == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["a/de"] == {
        "ndcg_at_10": 1.0,
        "recall_at_100": 1.0,
        "mrr_at_10": 1.0,
        "queries": 3,
        "documents": 3,
    }
    assert [*results] == ["a/de", "b/de", "en"] and results["b/de"]["queries"] == 2
    printed = capsys.readouterr().out
    assert "ndcg_at_10" in printed and "a/de" in printed and "1.0000" in printed
    assert {prompt for prompt, _ in StandIn.calls} == {"query", "document"}


def test_evaluates_held_out_sets_at_several_widths(launch, tmp_path, capsys):
    for name in ("translations/de", "translations/fr"):
        folder = tmp_path / "data/retrieval" / name
        write_beir(folder, ["rot rot gelb", "blau blau blau", "weiss weiss", "gelb rot blau"])
        for file in ("corpus.jsonl", "queries.jsonl", "qrels.tsv"):
            (folder / f"{file}.gz").write_bytes(gzip.compress((folder / file).read_bytes()))
            (folder / file).unlink()
    write_beir(tmp_path / "set", ["eins eins", "zwei zwei"])
    flags = ["--model=model", "--heldout=data", "--output=r.json"]
    assert launch("evaluate", *flags, "--dataset=set", "--dim=64,2") == 0
    wide, narrow = (json.loads((tmp_path / "r.json").read_text())[dim] for dim in ("64", "2"))
    assert [*wide] == [*narrow] == ["translations/de", "translations/fr", "set"]
    assert wide["translations/de"]["ndcg_at_10"] == 1.0
    assert narrow["translations/de"]["ndcg_at_10"] < 1.0
    # Each text once, whatever the widths; equal texts of the held-out sets are one.
    assert [call for call in StandIn.calls if call[1]] == [
        *(("query", 4), ("document", 4)),
        *(("query", 2), ("document", 2)),
    ]
    assert "2 dimensions" in capsys.readouterr().out
    assert launch("evaluate", *flags, "--dim=2") == 0
    assert json.loads((tmp_path / "r.json").read_text())["translations/de"] == pytest.approx(
        narrow["translations/de"]
    )
    # In compressed indexes too, under names of their own; 2 bits tell 4 documents apart at most.
    assert launch("evaluate", *flags, "--dim=64,2", "--index=float32,int8,binary") == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert [*found] == ["64", "64 int8", "64 binary", "2", "2 int8", "2 binary"]
    assert found["64"]["translations/de"] == pytest.approx(wide["translations/de"])
    assert found["64 int8"]["translations/de"]["ndcg_at_10"] == 1.0
    assert found["2 binary"] != found["2"]
    assert launch("evaluate", *flags, "--index=int8") == 0
    assert json.loads((tmp_path / "r.json").read_text())["translations/de"]["ndcg_at_10"] == 1.0
    assert launch("evaluate", "--model=bm25", "--heldout=data", "--output=r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text())["translations/fr"]["ndcg_at_10"] > 0.9


def test_evaluate_prompts(launch, tmp_path, capsys):
    write_beir(tmp_path / "set", ["rot", "blau"])
    flags = ["--model=model", "--dataset", "set", "--output", "r.json", "--query_prompt=none"]
    assert launch("evaluate", *flags, "--document_prompt", "query") == 0
    assert [prompt for prompt, count in StandIn.calls if count] == [None, "query"]
    said = capsys.readouterr()
    assert 'query: prefix "None", at most 8 tokens' in said.out.splitlines()
    assert 'document: prefix "query", at most 8 tokens' in said.out.splitlines()
    assert "warning" not in said.err


@pytest.mark.parametrize(
    ("prompt", "warns"), [("query", True), ("document", True), ("none", False), ("q: ", False)]
)
def test_a_model_that_says_nothing_about_prompts(
    launch, tmp_path, capsys, monkeypatch, prompt, warns
):
    monkeypatch.setattr(StandIn, "has_prompts", False)
    (tmp_path / "t.txt").write_text("ein Text")
    flags = ("--model=model", "--input=t.txt", "--output=e.npy", f"--prompt={prompt}")
    assert launch("embed", *flags) == 0
    said = capsys.readouterr()
    assert said.out.startswith("texts: prefix ")
    assert ("the model's folder says nothing about prompts" in said.err) == warns


def test_a_held_out_set_does_not_vanish(launch, tmp_path, capsys):
    write_beir(tmp_path / "data/retrieval/set/de", ["rot", "blau"])  # plain files are read, too
    flags = ["--model=bm25", "--heldout=data", "--output=r.json"]
    assert launch("evaluate", *flags) == 0
    (tmp_path / "data/retrieval/set/de/qrels.tsv").unlink()
    assert launch("evaluate", *flags) == 2
    message = "error: data/retrieval/set/de: no qrels.tsv or qrels/test.tsv, neither plain nor .gz"
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=gone"], "error: gone: no such folder"),
        (["--dataset=set,,./set"], "error: set: the same folder was named twice"),
        (["--dataset=,"], "error: no folder of a retrieval set was named"),
        (["--heldout=gone"], "error: gone/retrieval holds no held-out sets"),
        (["--dataset=set", "--dim=a"], "error: --dim=a must be a number, or several with commas"),
        (["--dataset=set", "--index=int4"], "error: --index=int4: 'int4' is not one of float32"),
        (["--suite=s.py", "--index=int8"], "error: --index is of --dataset and --heldout; a suite"),
        (["--dataset=set", "--output=model"], "error: --output=model is a folder"),
        (["--dataset=set", "--model=none"], "error: model folder none does not exist"),
    ],
)
def test_evaluate_refuses(launch, tmp_path, capsys, arguments, message):
    write_beir(tmp_path / "set", ["rot", "blau"])
    assert launch("evaluate", "--model=model", "--output=r.json", *arguments) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("name", ["filter", "mine"])
def test_filter_and_mine_say_their_prompts(launch, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(teacher, "load_teacher", lambda *_: StandInTeacher())
    words = ("rot", "blau", "gelb", "weiss")
    with PairWriter(tmp_path / "pairs", {}) as writer:
        for word in words:
            writer.write(PairRow(f"{word} was", f"{word} das", (), "s", "de"))
    flags = ("--pairs=pairs", "--teacher=model", "--output=out", "--query_prompt=Frage: ")
    assert launch(name, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        'query: prefix "Frage: ", at most 512 tokens',
        'document: prefix "document", at most 512 tokens',
    ]
