"""Retrieval over shards on disk: equal to the search in memory, never whole, never twice."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.evaluation_data import PROMPTS, text_vectors, write, write_beir, write_miracl
from helpers.stand_in_teacher import StandInTeacher

from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation import streamed_retrieval
from moe_embed_jax.evaluation.beir import load_beir
from moe_embed_jax.evaluation.miracl import Miracl
from moe_embed_jax.evaluation.retrieval import evaluate_retrieval
from moe_embed_jax.evaluation.streamed_retrieval import Retrieval
from moe_embed_jax.evaluation.text_vectors import StoredRows, cut
from moe_embed_jax.search import vectors as vectors_module

MIRACL = Miracl(
    topics="miracl-v1.0-{subset}/topics/topics.miracl-v1.0-{subset}-dev.tsv",
    qrels="miracl-v1.0-{subset}/qrels/qrels.miracl-v1.0-{subset}-dev.tsv",
    corpus="miracl-corpus-v1.0-{subset}/docs-*.jsonl.gz",
)
WORDS = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"]


def text(seed: int, count: int = 4) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def write_swahili(root: Path, shard_sizes=(30, 1, 40)) -> Path:
    """`docs-0` and so on; passage n of all is n#0, query n asks for passages 3n and 3n + 1."""
    passages = [(f"{n}#0", f"Titel{n % 7}", text(n)) for n in range(sum(shard_sizes))]
    ends = np.cumsum(shard_sizes)
    shards = [passages[end - size : end] for end, size in zip(ends, shard_sizes, strict=True)]
    topics = {str(n): text(3 * n, 3) for n in range(20)}
    qrels = [(n, f"{3 * n}#0", 1) for n in range(20)] + [(n, f"{3 * n + 1}#0", 1) for n in range(9)]
    return write_miracl(root, "sw", shards, topics, [*qrels, (3, "0#0", 0), (5, "gone#1", 1)])


def beir_of(root: Path, folder: Path) -> Path:
    """The same data as one BEIR folder."""
    documents = {}
    for path in sorted((root / "miracl-corpus-v1.0-sw").iterdir()):
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            record = json.loads(line)
            documents[record["docid"]] = f"{record['title']} {record['text']}"
    base = root / "miracl-v1.0-sw"
    topics = next((base / "topics").iterdir()).read_text().splitlines()
    qrels = [line.split() for line in next((base / "qrels").iterdir()).read_text().splitlines()]
    queries = dict(line.split("\t") for line in topics)
    return write_beir(folder, documents, queries, [(q, d, g) for q, _, d, g in qrels])


@pytest.mark.parametrize("width", [None, 16])
def test_shards_score_like_one_set_in_memory(tmp_path, width):
    root = write_swahili(tmp_path / "data")
    folder = beir_of(root, tmp_path / "beir/sw")
    vectors = text_vectors(tmp_path / "v", widths=[width])
    (streamed,) = MIRACL.evaluate(root, vectors, "MIRACL")
    (one_shard,) = Retrieval("beir/{subset}", languages=None).evaluate(tmp_path, vectors, "BEIR")
    encoder = StandInTeacher()
    encoders = (lambda t, p=PROMPTS[s]: cut(encoder.encode(t, p), width) for s in PROMPTS)
    queries, documents, _ = encoders
    expected = evaluate_retrieval(queries, documents, load_beir(folder))
    assert 0.2 < expected["ndcg_at_10"] < 0.99
    assert streamed.scores[width] == one_shard.scores[width] == expected
    assert (streamed.name, streamed.languages) == ("sw", ("sw",))


def test_nothing_is_embedded_twice_and_a_killed_run_continues_with_the_shard(tmp_path):
    root = write_swahili(tmp_path / "data")

    class Killed(StandInTeacher):
        def encode(self, texts, prompt=None):
            if len(texts) == 40:  # the last shard
                raise RuntimeError("killed")
            return super().encode(texts, prompt)

    killed, second, third = Killed(), StandInTeacher(), StandInTeacher()
    with pytest.raises(RuntimeError, match="killed"):
        list(MIRACL.evaluate(root, text_vectors(tmp_path / "v", killed), "MIRACL"))
    assert killed.texts == 31
    list(MIRACL.evaluate(root, text_vectors(tmp_path / "v", second), "MIRACL"))
    assert second.texts == 40 + 20
    list(MIRACL.evaluate(root, text_vectors(tmp_path / "v", third, widths=[None, 8]), "MIRACL"))
    assert third.texts == 0
    other = StandInTeacher("other weights")
    list(MIRACL.evaluate(root, text_vectors(tmp_path / "v", other), "MIRACL"))
    assert other.texts == 71 + 20


def test_only_chunks_are_in_memory(tmp_path, monkeypatch):
    """Texts reach the encoder, and vectors the search, a few at a time."""
    monkeypatch.setattr(vectors_module, "CHUNK", 10)
    root = write_swahili(tmp_path / "data")
    read, sizes, slices = [], [], []
    records = streamed_retrieval.read_records

    def counted(path, id_field):
        for record in records(path, id_field):
            read.append(path.name)
            yield record

    class Watching(StandInTeacher):
        def encode(self, texts, prompt=None):
            if texts and prompt == "d: ":
                of_scans = 71  # all shards are read once before
                assert len(read) - of_scans == self.texts + len(texts)
                sizes.append(len(texts))
            return super().encode(texts, prompt) if prompt == "d: " else np.eye(64)[: len(texts)]

    getitem = StoredRows.__getitem__

    def watched(self, rows):
        slices.append(rows.stop - rows.start)
        return getitem(self, rows)

    monkeypatch.setattr(streamed_retrieval, "read_records", counted)
    monkeypatch.setattr(StoredRows, "__getitem__", watched)
    monkeypatch.setattr("moe_embed_jax.search.cpu.BLOCK", 16)
    list(MIRACL.evaluate(root, text_vectors(tmp_path / "v", Watching()), "MIRACL"))
    assert sizes == [10, 10, 10, 1, 10, 10, 10, 10]
    assert max(slices) < 71 and len(slices) > 1


def test_stored_rows_are_one_array(tmp_path):
    vectors = text_vectors(tmp_path)
    parts = [[text(n) for n in range(count)] for count in (3, 1, 5)]
    stores = [
        vectors.stream(lambda p=p: p, "document", vectors_module.hash_texts(p), "") for p in parts
    ]
    whole = np.concatenate([store[:] for store in stores])
    rows = StoredRows(stores, None)
    assert rows.shape == (9, 64)
    for part in (slice(0, 9), slice(2, 4), slice(3, 4), slice(4, 20), slice(0, 2)):
        np.testing.assert_array_equal(rows[part], whole[part])
    narrow = StoredRows(stores, 8)[slice(1, 7)]
    np.testing.assert_allclose(np.linalg.norm(narrow, axis=1), 1, rtol=1e-6)


def test_of_a_repeated_id_the_last_document_stays(tmp_path):
    documents = {f"d{n}": text(n) for n in range(12)} | {"d1": text(3)}  # which would be first
    folder = write_beir(tmp_path / "set", documents, {"q": text(3)}, [("q", "d3", 1)])
    with gzip.open(folder / "corpus.jsonl.gz", "at") as file:
        file.write(f'{{"_id": "d7", "text": "anders"}}\n{{"_id": "x", "text": "{text(3)}"}}\n')
        file.write('{"_id": "x", "text": "ganz anders"}\n{"_id": "d1", "text": "eins"}\n')
    encoder = StandInTeacher()
    (found,) = Retrieval("set").evaluate(tmp_path, text_vectors(tmp_path / "v"), "set")
    expected = evaluate_retrieval(encoder.encode, encoder.encode, load_beir(folder))
    assert found.scores[None] == expected and expected["documents"] == 13
    assert expected["mrr_at_10"] == 1.0
    with gzip.open(folder / "corpus.jsonl.gz", "at") as file:
        file.write(json.dumps({"_id": "d3", "text": text(3)}) + "\n")
    (found,) = Retrieval("set").evaluate(tmp_path, text_vectors(tmp_path / "v"), "set")
    assert (
        found.scores[None]
        == expected
        == evaluate_retrieval(encoder.encode, encoder.encode, load_beir(folder))
    )  # equal texts are no ambiguity
    with gzip.open(folder / "corpus.jsonl.gz", "at") as file:
        file.write('{"_id": "d3", "text": "t"}\n')
    with pytest.raises(UserError, match=r"corpus.jsonl.gz:18: id 'd3' repeats with another"):
        list(Retrieval("set").evaluate(tmp_path, text_vectors(tmp_path / "v"), "set"))


def test_too_many_repeated_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(streamed_retrieval, "MOST_REPEATED", 1)
    folder = write_beir(tmp_path / "set", {"d": "a"}, {"q": "a"}, [("q", "d", 1)])
    write(
        folder / "corpus.jsonl.gz", '{"_id": "d", "text": "a"}\n' + '{"_id": 1, "text": ""}\n' * 3
    )
    with pytest.raises(UserError, match="2 documents have an id that comes again"):
        list(Retrieval("set").evaluate(tmp_path, text_vectors(tmp_path / "v"), "set"))


def test_the_split_of_the_judgements(tmp_path):
    folder = write_beir(tmp_path / "set", {"d": "a"}, {"q": "a", "r": "b"}, [("q", "d", 1)])
    (folder / "qrels.tsv.gz").unlink()
    write(folder / "qrels/dev.tsv", "query-id\tcorpus-id\tscore\nr\td\t1\n")
    write(folder / "qrels/test.tsv", "query-id\tcorpus-id\tscore\nq\td\t1\nr\td\t1\n")
    for split, queries in {"dev": 1, "test": 2}.items():
        task = Retrieval("set", split=split)
        assert task.files(tmp_path)[-1].name == f"{split}.tsv"
        (found,) = task.evaluate(tmp_path, text_vectors(tmp_path / "v"), "set")
        assert found.scores[None]["queries"] == queries


TOPICS = "miracl-v1.0-sw/topics/topics.miracl-v1.0-sw-dev.tsv"
QRELS = "miracl-v1.0-sw/qrels/qrels.miracl-v1.0-sw-dev.tsv"
SHARD = "miracl-corpus-v1.0-sw/docs-1.jsonl.gz"


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        (
            TOPICS,
            "0\tfrage\n1 ohne\n",
            r"dev.tsv:2: expected 2 fields .*\(query id, query\), got 1",
        ),
        (TOPICS, "0\tfrage\n0\tandere\n", r"topics.miracl-v1.0-sw-dev.tsv:2: query id '0' repeats"),
        (TOPICS, "", r"topics.miracl-v1.0-sw-dev.tsv: empty file"),
        (QRELS, "0 Q0 1#0\n", r"qrels.miracl-v1.0-sw-dev.tsv:1: expected 4 fields \(query, Q0"),
        (QRELS, "0 Q0 1#0 ja\n", r"sw-dev.tsv:1: field 'score' must be an integer, got 'ja'"),
        (QRELS, "0 Q0 1#0 1\n0 Q0 1#0 0\n", r"sw-dev.tsv:2: query '0' and document '1#0' were jud"),
        (QRELS, "0 Q0 1#0 --1\n", r"sw-dev.tsv:1: field 'score' must be an integer, got '--1'"),
        (QRELS, "0 Q0 1#0 9999999999\n", r"dev.tsv:1: field 'score' must be from -2147483647"),
        (QRELS, "0 Q0 1#0 0\n", r"no query of topics.miracl-v1.0-sw-dev.tsv has a relevant"),
        (SHARD, '{"docid": "x"}\n', r"docs-1.jsonl.gz:1: field 'text' is missing"),
        (SHARD, '{"_id": "x", "text": ""}\n', r"docs-1.jsonl.gz:1: field 'docid' is missing"),
        (SHARD, "{\n", r"docs-1.jsonl.gz:1: bad JSON at column 2"),
        (SHARD, "", r"docs-1.jsonl.gz: empty file"),
    ],
)
def test_miracl_refuses(tmp_path, path, content, message):
    root = write_swahili(tmp_path)
    write(root / path, content)
    encoder = StandInTeacher()
    with pytest.raises(UserError, match=message):
        list(MIRACL.evaluate(root, text_vectors(tmp_path / "v", encoder), "MIRACL"))
    assert encoder.texts == 0


def test_a_damaged_shard_names_its_line(tmp_path):
    root = write_swahili(tmp_path)
    shard = root / SHARD.replace("docs-1", "docs-2")
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"docs-2.jsonl.gz:\d+: damaged .gz file"):
        list(MIRACL.evaluate(root, text_vectors(tmp_path / "v"), "MIRACL"))


def test_missing_files_are_named_before_anything_is_done(tmp_path):
    root = write_swahili(tmp_path)
    assert [p.name for p in MIRACL.files(root)][2:] == [f"docs-{n}.jsonl.gz" for n in range(3)]
    (root / QRELS).unlink()
    with pytest.raises(UserError, match=rf"{QRELS}: no such file"):
        MIRACL.files(root)
    write(root / QRELS, "")
    for shard in (root / "miracl-corpus-v1.0-sw").iterdir():
        shard.unlink()
    with pytest.raises(UserError, match=r"docs-\*.jsonl.gz: no file has such a name"):
        MIRACL.files(root)
    with pytest.raises(UserError, match="nothing there has such a name"):
        MIRACL.files(tmp_path / "elsewhere")


def test_shards_are_in_the_order_of_their_numbers(tmp_path):
    write_swahili(tmp_path, shard_sizes=(1,) * 12)
    names = [path.name for path in MIRACL.files(tmp_path)][2:]
    assert names == [f"docs-{n}.jsonl.gz" for n in range(12)]
