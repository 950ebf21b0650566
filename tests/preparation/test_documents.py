"""Whole documents: parsers, hold-out by component, and the token store of documents."""

import gzip
import json
import lzma

import numpy as np
import pytest
from helpers import synthetic_wheels
from helpers.synthetic_wheels import sentence
from test_package_texts import parse, repin

from moe_embed_jax.data.data_spec import complete_config, held_out_path, token_store_path
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.errors import UserError
from moe_embed_jax.pairs.row import PairRow
from moe_embed_jax.preparation import document_store
from moe_embed_jax.preparation import tokenize as prepare
from moe_embed_jax.preparation.builders import documents, package_texts, wheels
from moe_embed_jax.preparation.pair_writer import PairWriter
from moe_embed_jax.tokenizers.vocabulary import Vocabulary

CONFIG = {"documents": "package_documents", "vocabulary": {"kind": "train", "size": 300}}


def long_aws(services: int = 6) -> dict[str, bytes]:
    """Services whose operations have an input and an output, one of them used twice."""
    files = {}
    for service in range(services):
        shapes = {
            name: {"members": {f"maxItems{n}": {"documentation": said(service, name, n)}}}
            for n, name in enumerate(("ListRequest", "ListResponse", "Alone"))
        }
        shapes["Alone"]["documentation"] = sentence(f"alone {service}", 30)
        operations = {
            f"List{n}": {
                "documentation": f"<p>{sentence(f'list {service} {n}', 30)}</p>",
                "input": {"shape": "ListRequest"},
                "output": {"shape": "ListResponse"},
            }
            for n in range(2)
        }
        content = {
            "metadata": {"serviceFullName": f"Long Service {service}"},
            "operations": operations,
            "shapes": shapes,
        }
        name = f"botocore/data/long{service}/2020-01-01/service-2.json"
        files[name] = json.dumps(content).encode()
    return files


def said(service: int, shape: str, number: int) -> str:
    return sentence(f"{service} {shape} {number}", 25)


def test_a_component_is_a_document_per_language(tmp_path):
    pairs, report = parse(
        documents.parse_home_assistant, synthetic_wheels.home_assistant_files(4), tmp_path
    )
    assert {p.language for p in pairs} == {"en", *synthetic_wheels.LANGUAGES}
    german = next(p for p in pairs if p.language == "de" and p.query == "c002")
    assert german.english == ("interface_texts: c002",)
    lines = german.document.split("\n")
    assert lines[0] == "de title 2" and f"de {sentence('2.4')}" in lines
    assert len(lines) == len(set(lines)) == 1 + 2 * 5 + 1
    text = german.document
    for gone in ("untranslated", "This English text", "[%key", "{placeholder", "short"):
        assert gone not in text
    english = next(p for p in pairs if p.language == "en" and p.query == "c002").document
    assert "This English text is in every language" in english and "short" in english
    assert not report["problems"]


def test_an_operation_comes_with_its_input_and_output(tmp_path):
    pairs, report = parse(documents.parse_aws, long_aws(1), tmp_path)
    found = {p.query: p.document for p in pairs}
    assert list(found) == [
        "Long Service 0 List0",
        "Long Service 0 List1",
        "Long Service 0 Alone",
    ]
    first = found["Long Service 0 List0"].split("\n")
    assert first[0] == sentence("list 0 0", 30)
    assert first[1:] == [
        f"max Items0: {said(0, 'ListRequest', 0)}",
        f"max Items1: {said(0, 'ListResponse', 1)}",
    ]
    # What was said is not said again.
    assert found["Long Service 0 List1"] == sentence("list 0 1", 30)
    assert found["Long Service 0 Alone"].startswith(sentence("alone 0", 30))
    assert report["dropped"]["aws_reference_too_short"] == 2  # the shapes used above


def test_a_schema_and_a_resource_are_documents(tmp_path):
    pairs, _ = parse(documents.parse_google, synthetic_wheels.google_files(2), tmp_path)
    assert [p.query for p in pairs[:2]] == ["Synthetic 0 API Thing List", "Synthetic 0 API things"]
    lines = pairs[0].document.split("\n")
    assert lines[0] == f"v2 {sentence('schema 0', 12)}"
    assert lines[1] == f"field0: v2 {sentence('field 0 0', 12)}"
    assert f"list page Size: {sentence('parameter 0', 12)}" in pairs[1].document
    assert pairs[0].english == ("google_reference: synthetic0",)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.delenv(wheels.WHEELS_DIR_VARIABLE, raising=False)
    repin(monkeypatch, tmp_path / "wheels", botocore=long_aws())
    data_dir = tmp_path / "data"
    prepare.prepare(CONFIG, data_dir, tmp_path / "wheels")
    return data_dir


def held_out(folder) -> dict[str, list[dict]]:
    return {
        path.name.split(".")[0]: [json.loads(line) for line in gzip.open(path, "rt")]
        for path in folder.glob("*.jsonl.gz")
    }


def test_the_store_has_every_document_and_held_out_components_in_no_language(prepared, capsys):
    store = TokenStore.open(token_store_path(CONFIG, prepared))
    vocabulary = Vocabulary.load(next(prepared.glob("vocabulary/*/sentencepiece.model")))
    expected, language_of = [], []
    components = {"train": set(), "test": set()}
    for config in sorted(package_texts.DOCUMENT_CONFIGS):  # as seqio orders its tasks
        for split in package_texts.SPLITS:
            rows, groups = package_texts.open_split(prepared, config, split)
            for name, (start, stop) in groups.items():
                for row in rows.read(range(start, stop)):
                    components[split].add((name.split("/")[0], row.query.split(" List")[0]))
                    if split == "train":
                        expected.append(f"{row.query}\n{row.document}")
                        language_of.append(row.language)
    of_home = {
        s: {c for n, c in found if n == "interface_texts"} for s, found in components.items()
    }
    assert of_home["test"] and not of_home["train"] & of_home["test"]
    assert len(store) == len(expected) and store.lengths.shape == (len(store), 1)
    for row, (ids,) in enumerate(store.read(range(len(store)))):
        np.testing.assert_array_equal(ids, vocabulary.encode(expected[row]))
    for group in store.groups:
        assert set(language_of[group["start"] : group["stop"]]) == {group["language"]}
    texts = held_out(held_out_path(CONFIG, prepared))
    assert set(texts) == {"en", "de", "fr", "ja"}  # ta has three components
    trained = set(expected)
    assert all(entry["text"] not in trained for found in texts.values() for entry in found)
    # A second call finds it all.
    prepare.prepare(CONFIG, prepared)
    assert "prepared before" in capsys.readouterr().out


def test_a_prepared_folder_holds_out_by_content(tmp_path):
    with PairWriter(tmp_path / "pairs", {}) as writer:
        for i in range(400):
            query = "" if i % 2 else f"title {i}"
            writer.write(PairRow(query, sentence(str(i), 12), (), "pages", "xx"))
    config = {**CONFIG, "texts": str(tmp_path / "pairs")}
    folder = prepare.prepare(config, tmp_path / "data")
    store = TokenStore.open(folder)
    texts = held_out(held_out_path(config, tmp_path / "data"))["xx"]
    assert 1 <= len(texts) <= 25 and len(store) + len(texts) == 400
    vocabulary = Vocabulary.load(next(tmp_path.glob("data/vocabulary/*/*.model")))
    found = {ids.tobytes() for (ids,) in store.read(range(len(store)))}
    for i in range(400):
        text = sentence(str(i), 12) if i % 2 else f"title {i}\n{sentence(str(i), 12)}"
        is_held_out = text in {entry["text"] for entry in texts}
        assert (np.array(vocabulary.encode(text), np.int32).tobytes() in found) != is_held_out


def test_plain_text_becomes_documents(tmp_path):
    """The layout of CC100, through launch/prepare.py's pipeline, duplicates removed."""
    pytest.importorskip("apache_beam", reason="needs Apache Beam (pip install -e .[beam])")
    from moe_embed_jax.preparation.beam import pipeline

    for language, opener, name in (("xx", lzma.open, "xx.txt.xz"), ("yy", open, "yy.txt")):
        with opener(tmp_path / name, "wt") as file:
            for i in range(60):
                text = "\n".join(sentence(f"{language} {i % 50} {n}", 6) for n in range(3))
                file.write(f"{text}\n\n")
    sources = tmp_path / "sources.json"
    path = {"xx": str(tmp_path / "xx.txt.xz"), "yy": str(tmp_path / "yy.txt")}
    sources.write_text(json.dumps({"name": "crawl", "format": "texts", "path": path}))
    manifest = pipeline.prepare(pipeline.Options(str(sources), str(tmp_path / "folder")))
    assert manifest["rows"] == 100
    vocabulary = {"kind": "train", "size": 80}
    config = {**CONFIG, "texts": str(tmp_path / "folder"), "vocabulary": vocabulary}
    store = TokenStore.open(prepare.prepare(config, tmp_path / "data"))
    found = held_out(held_out_path(config, tmp_path / "data"))
    assert len(store) + sum(map(len, found.values())) == 100
    vocabulary = Vocabulary.load(next(tmp_path.glob("data/vocabulary/*/*.model")))
    decoded = {vocabulary.decode(ids) for (ids,) in store.read(range(len(store)))}
    expected = {
        " ".join(sentence(f"{language} {i} {n}", 6) for n in range(3))
        for language in ("xx", "yy")
        for i in range(50)
    }
    assert decoded < expected
    assert [group["language"] for group in store.groups] == ["xx", "yy"]


def test_bad_document_configs_are_refused():
    with pytest.raises(UserError, match="unknown documents 'cc100'"):
        complete_config({"documents": "cc100"})
    with pytest.raises(UserError, match="unknown key 'rates'"):
        complete_config({**CONFIG, "rates": None})
    with pytest.raises(UserError, match="texts=3 must be the path"):
        complete_config({**CONFIG, "texts": 3})


def test_a_language_is_no_path(tmp_path):
    with (
        pytest.raises(UserError, match=r"held-out document of s is '\.\./de': a name"),
        document_store._HeldOut(tmp_path / "held_out") as held_out,
    ):
        held_out.add("s", "../de", "a text")
    assert not list(tmp_path.iterdir())
