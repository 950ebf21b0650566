import gzip
import json
from pathlib import Path

import pytest
from helpers import synthetic_wheels

from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.beir import load_beir
from moe_embed_jax.preparation import held_out_sets as retrieval_sets
from moe_embed_jax.preparation.builders import package_texts, statistics, wheels


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Texts and retrieval sets of the synthetic wheels."""
    folder = tmp_path_factory.mktemp("retrieval_sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval_sets, "MIN_QUERIES", 10)  # the synthetic sets are small
        for name, wheel in synthetic_wheels.write_wheels(folder / "wheels").items():
            patch.setitem(wheels.WHEELS, name, wheel)
        package_texts.prepare(folder, folder / "wheels", progress=False)
        retrieval_sets.prepare(folder, progress=False)
        yield folder


def read_lines(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read().splitlines()


def test_sets_hold_exactly_the_test_split(data_dir):
    wanted: dict[str, set] = {}
    for config in package_texts.CONFIGS:
        rows, _ = package_texts.open_split(data_dir, config, "test")
        for row in rows.read(range(len(rows))):
            name = f"{retrieval_sets.SET_OF_SOURCE[row.source]}/{row.language}"
            wanted.setdefault(name, set()).add((row.query, row.document))
    section = statistics.read_section(data_dir, "retrieval_sets")
    assert set(section["sets"]) | set(section["left_out"]) == set(wanted)
    assert {"api/en", "translations/de", "descriptions/ja"} <= set(section["sets"])
    for name, counts in section["sets"].items():
        folder = data_dir / "retrieval" / name
        queries = [json.loads(line) for line in read_lines(folder / "queries.jsonl.gz")]
        corpus = [json.loads(line) for line in read_lines(folder / "corpus.jsonl.gz")]
        header, *qrels = read_lines(folder / "qrels.tsv.gz")
        assert header == "query-id\tcorpus-id\tscore"
        assert all(set(document) == {"_id", "title", "text"} for document in corpus)
        query_text = {query["_id"]: query["text"] for query in queries}
        document_text = {document["_id"]: document["text"] for document in corpus}
        assert len(set(query_text.values())) == len(queries) == counts["queries"]
        assert len(set(document_text.values())) == len(corpus) == counts["documents"]
        found = {
            (query_text[query], document_text[document])
            for query, document, score in (line.split("\t") for line in qrels)
            if score == "1"
        }
        assert found == wanted[name]
        assert counts["relevant"] == len(qrels) == len(found)


def test_loader_of_the_evaluation_reads_them(data_dir):
    loaded = load_beir(data_dir / "retrieval" / "translations" / "de")
    assert len(loaded.queries) >= retrieval_sets.MIN_QUERIES
    assert set(loaded.qrels) == set(loaded.query_ids)


def test_too_many_queries_are_thinned_out_but_documents_stay():
    full = retrieval_sets.TestSet()
    for i in range(10):
        full.add(f"query {i}", f"document {i}")
        full.add(f"query {i}", "document 0")
    thinned = full.with_queries(4)
    assert thinned.queries == {"query 0": 0, "query 2": 1, "query 5": 2, "query 7": 3}
    assert thinned.documents == full.documents
    assert thinned.relevant == {(0, 0), (1, 2), (1, 0), (2, 5), (2, 0), (3, 7), (3, 0)}
    assert full.with_queries(10) is full


def test_small_sets_are_left_out_and_named(data_dir, capsys):
    section = retrieval_sets.prepare(data_dir, progress=False)
    assert section["left_out"] and all(n < 10 for n in section["left_out"].values())
    for name in section["left_out"]:
        assert not (data_dir / "retrieval" / name).exists()
    retrieval_sets.print_sets(section)
    out = " ".join(capsys.readouterr().out.split())
    assert "fewer than 10 queries, left out: " in out and next(iter(section["left_out"])) in out


def test_second_call_does_nothing(data_dir, monkeypatch):
    monkeypatch.setattr(retrieval_sets, "collect", None)
    section = retrieval_sets.prepare(data_dir, progress=False)
    assert section == statistics.read_section(data_dir, "retrieval_sets")


def test_bytes_are_the_same_again(data_dir):
    def content():
        return {p: p.read_bytes() for p in (data_dir / "retrieval").rglob("*.gz")}

    before = content()
    (data_dir / "retrieval" / "api" / "en" / "qrels.tsv.gz").unlink()  # so all are written again
    retrieval_sets.prepare(data_dir, progress=False)
    assert content() == before
    assert not list(data_dir.glob(".*"))


def test_interrupt_keeps_the_old_sets(data_dir, monkeypatch):
    before = sorted((data_dir / "retrieval").rglob("*"))
    write = retrieval_sets.write_beir

    def interrupted(folder, test_set):
        if folder.name == "fr":
            raise KeyboardInterrupt
        write(folder, test_set)

    monkeypatch.setattr(retrieval_sets, "write_beir", interrupted)
    monkeypatch.setattr(retrieval_sets, "_stored", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        retrieval_sets.prepare(data_dir, progress=False)
    assert sorted((data_dir / "retrieval").rglob("*")) == before
    assert not list(data_dir.glob(".*"))


def test_several_documents_of_a_query(tmp_path):
    test_set = retrieval_sets.TestSet()
    for query, document in (("q", "a"), ("q", "b"), ("r", "a"), ("q", "a")):
        test_set.add(query, document)
    retrieval_sets.write_beir(tmp_path / "set", test_set)
    qrels = read_lines(tmp_path / "set" / "qrels.tsv.gz")
    assert qrels[1:] == ["q0\td0\t1", "q0\td1\t1", "q1\td0\t1"]
    assert test_set.counts() == {"queries": 2, "documents": 2, "relevant": 3}


def test_unprepared_texts_are_an_error(tmp_path):
    with pytest.raises(UserError, match="not prepared"):
        retrieval_sets.prepare(tmp_path, progress=False)
