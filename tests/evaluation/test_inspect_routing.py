"""launch/inspect_routing.py on published checkpoints, and the labelled texts that it reads."""

import importlib.util
import json
import lzma
import pathlib
import shutil
import sys

import pytest
from conftest import ROOT, SHARED
from helpers import synthetic_data
from helpers.labelled_model import labelled, write_model

from moe_embed_jax import launching
from moe_embed_jax.embedder import Embedder
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.expert_use import inspect_routing
from moe_embed_jax.evaluation.labelled_texts import LabelledText, read_labelled, read_sib200
from moe_embed_jax.tokenizers.vocabulary import train_vocabulary

FIXTURE = SHARED / "fixtures" / "nomic_moe_tiny"
SIB200 = SHARED / "data" / "sib200_flores"


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("published") / "model", data_dir)


def write_sib200(folder: pathlib.Path, languages=("aa", "bb", "cc"), count: int = 9):
    folder.mkdir()
    for language in languages:
        rows = ["index_id\tsplit\tcategory\ttext"]
        for i, text in enumerate(synthetic_data.documents(language, count, seed=5)):
            rows.append(f"{i}\ttrain\ttopic/{i % 3}\t{text[:60]}")
        content = lzma.compress(("\n".join(rows) + "\n").encode())
        (folder / f"{language}_Latn.tsv.xz").write_bytes(content)
    return folder


@pytest.fixture
def launch(monkeypatch, tmp_path, folder):
    """launch("--flag=value", ...) -> exit status of launch/inspect_routing.py, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    path = ROOT / "launch" / "inspect_routing.py"
    spec = importlib.util.spec_from_file_location("launch_inspect_routing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments, model=folder):
        flags = [f"--model={model}", "--output=out", "--shuffles=5", *arguments]
        monkeypatch.setattr(sys, "argv", [str(path), *flags])
        return launching.run(module.main)

    return run


def test_the_command_on_tables_of_sib200(launch, tmp_path, folder, capsys):
    write_sib200(tmp_path / "sib")
    assert launch("--sib200=sib", "--languages=cc_Latn,aa_Latn", "--sentences=6") == 0
    printed = capsys.readouterr().out
    assert "I(expert; language)" in printed and "out: routing.json, routing.md," in printed
    found = json.loads((tmp_path / "out/routing.json").read_text())
    texts = read_sib200(tmp_path / "sib", ["aa_Latn", "cc_Latn"], 6)
    expected = inspect_routing(Embedder.load(folder), texts, shuffles=5)
    assert found["language"]["groups"]["cc_Latn"]["texts"] == 6
    assert list(found["topic"]["groups"]) == ["topic/0", "topic/1", "topic/2"]
    for label in ("language", "topic"):
        for one, other in zip(
            found[label]["information"], expected[label]["information"], strict=True
        ):
            assert one["bits"] == pytest.approx(other["bits"], abs=1e-6)
    for name in ("by_language.png", "by_topic.png", "by_layer.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out/routing.md").read_text()
    bits = found["language"]["information"][0]["bits"]
    assert f"| 1 | all | {bits:.4f} |" in page and "| cc_Latn | 6 |" in page


def test_the_command_on_json_lines(launch, tmp_path, capsys):
    rows = [{"text": t.text, "language": t.language} for t in labelled(5)]
    for name, part in (("a.jsonl", rows[:4]), ("b.jsonl", rows[4:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    assert launch("--texts=a.jsonl,b.jsonl", "--prompt=none") == 0
    found = json.loads((tmp_path / "out/routing.json").read_text())
    assert found["texts"] == 10 and found["prefix"] == "" and "topic" not in found
    assert not (tmp_path / "out/by_topic.png").exists()

    # Repeated, as after a kill at the very end; and with other texts.
    assert launch("--texts=a.jsonl,b.jsonl", "--prompt=none") == 0
    assert "done before: out" in capsys.readouterr().out
    (tmp_path / "b.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    assert launch("--texts=a.jsonl,b.jsonl", "--prompt=none") == 2
    assert "out exists already, made by another command" in capsys.readouterr().err


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="needs the shared fixture nomic_moe_tiny")
def test_the_command_on_the_published_layout(launch, tmp_path):
    """It comes without a tokenizer: one that fits its 320 rows is put beside it."""
    model = tmp_path / "model"
    shutil.copytree(FIXTURE, model)
    texts = write_sib200(tmp_path / "sib")
    sentences = [text.text for text in read_sib200(texts)]
    train_vocabulary(sentences, model / "sentencepiece.model", 160)
    assert launch("--sib200=sib", model=model) == 0
    found = json.loads((tmp_path / "out/routing.json").read_text())
    assert (found["experts"], found["experts_per_token"], found["moe_layers"]) == (4, 2, [1, 3])
    assert sum(group["tokens"] for group in found["topic"]["groups"].values()) == found["tokens"]


@pytest.mark.skipif(not SIB200.is_dir(), reason="needs the shared data sib200_flores")
def test_the_real_tables_are_parallel():
    texts = read_sib200(SIB200, ["eng_Latn", "zho_Hans"])
    assert len(texts) == 2008 and len({text.topic for text in texts}) == 7
    assert [t.id for t in texts[:1004]] == [t.id for t in texts[1004:]]
    assert [t.topic for t in texts[:1004]] == [t.topic for t in texts[1004:]]


def test_labels_of_json_lines(tmp_path):
    rows = [
        {"text": "a", "language": "de", "topic": 3, "id": 7},
        {"text": "b", "language": None, "topic": ""},
        {"text": "c", "language": "\ud800", "topic": None},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_labelled([tmp_path / "t.jsonl"]) == [
        LabelledText("a", "de", "3", "7"),
        LabelledText("b", None, None, None),
        LabelledText("c", "\ufffd", None, None),  # reports are UTF-8
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "t.jsonl:2: bad JSON at column 2"),
        ('"text"', """t.jsonl:2: expected an object with "text", got 'text'"""),
        ('{"language": "de"}', "t.jsonl:2: field 'text' is missing"),
        ('{"text": "a", "language": ["de"]}', "t.jsonl:2: field 'language' must be a string"),
        ('{"text": "a", "topic": true}', "t.jsonl:2: field 'topic' must be a string, got True"),
    ],
)
def test_bad_lines(launch, tmp_path, capsys, line, message):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "language": "en"}\n' + line + "\n")
    assert launch("--texts=t.jsonl") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"index_id\ttext\n0\ta\n", "de.tsv:1: the header has no column category"),
        (b"index_id\tcategory\ttext\n0\tx\ta\n1\tx\n", "de.tsv:3: 2 columns, the header has 3"),
        (b"index_id\tcategory\ttext\n", "de.tsv: there is no text in this file"),
        (b"", "de.tsv: there is no text in this file"),
    ],
)
def test_broken_tables(tmp_path, content, message):
    (tmp_path / "de.tsv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_sib200(tmp_path)


def test_damaged_xz(tmp_path):
    path = write_sib200(tmp_path / "sib") / "aa_Latn.tsv.xz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"aa_Latn\.tsv\.xz:\d+: damaged \.xz file"):
        read_sib200(tmp_path / "sib")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --texts or --sib200"),
        (["--texts=a.jsonl", "--sib200=sib"], "give either --texts or --sib200"),
        (["--texts=gone.jsonl"], "gone.jsonl: cannot be read: No such file"),
        (["--texts=a.jsonl"], "a.jsonl: there is no text in this file"),
        (["--texts=a.jsonl", "--sentences=3"], "--sentences belongs to --sib200"),
        (["--sib200=gone"], "gone: no such folder"),
        (["--sib200=empty"], "empty holds no SIB-200 tables"),
        (["--sib200=sib", "--languages=aa_Cyrl"], "no language aa_Cyrl: did you mean aa_Latn?"),
        (["--sib200=sib", "--languages=zz"], "no language zz: it has aa_Latn, bb_Latn, cc_Latn (3"),
        (["--sib200=sib", "--languages=aa_Latn"], "all 9 texts are of language 'aa_Latn'"),
        (["--sib200=sib", "--sentences=0"], "--sentences=0 must be at least 1"),
        (["--sib200=sib", "--sentences=1"], "all 3 texts are of topic 'topic/0'"),
        (["--sib200=sib", "--shuffles=0"], "shuffles=0 must be at least 1"),
        (["--sib200=sib", "--prompt=both"], "prompt='both': choose one of"),
        (["--sib200=sib", "--output=sib"], "sib exists already: name a new folder"),
        (["--sib200=sib", "--model=empty"], "empty is not a model folder"),
    ],
)
def test_bad_flags(launch, tmp_path, capsys, arguments, message):
    write_sib200(tmp_path / "sib")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jsonl").touch()
    assert launch(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
