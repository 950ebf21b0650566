"""Loading BEIR-like folders: what is accepted, what is counted, what is refused and how."""

import gzip
import json

import pytest
from conftest import ROOT

from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.beir import RetrievalSet, load_beir, unique_names

SHARED = ROOT.parent / "shared" / "data"
CORPUS = [
    {"_id": "d1", "title": "Katze", "text": "ein Tier"},
    {"_id": "d2", "title": "", "text": "zwei\u2028Zeilen"},
    {"_id": "d3", "text": ""},
]
QUERIES = [{"_id": "q1", "text": "Tier?"}, {"_id": "q2", "text": "Wer?"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td3\t0\nq2\td2\t0\n"


def write_set(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS, qrels_file="qrels.tsv", gz=""):
    def lines(records):
        return "".join(
            r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) + "\n" for r in records
        )

    contents = {
        "corpus.jsonl": lines(corpus),
        "queries.jsonl": lines(queries),
        qrels_file: qrels,
    }
    for name, content in contents.items():
        path = folder / f"{name}{gz}"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode()
        path.write_bytes(gzip.compress(data) if gz else data)
    return folder


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("qrels_file", ["qrels.tsv", "qrels/test.tsv"])
def test_loads_plain_and_compressed(tmp_path, gz, qrels_file):
    loaded = load_beir(write_set(tmp_path / "animals", gz=gz, qrels_file=qrels_file))
    assert loaded.name == "animals"
    assert loaded.document_ids == ["d1", "d2", "d3"]
    assert loaded.documents == ["Katze ein Tier", "zwei\u2028Zeilen", ""]
    assert (loaded.query_ids, loaded.queries) == (["q1"], ["Tier?"])  # q2: nothing relevant
    assert loaded.qrels == {"q1": {"d1": 2, "d3": 0}}
    assert loaded.oddities() == "1 queries without a relevant document (left out)"


def test_header_is_optional(tmp_path):
    with_header = load_beir(write_set(tmp_path / "a"))
    without = load_beir(write_set(tmp_path / "b", qrels=QRELS.partition("\n")[2]))
    assert with_header.qrels == without.qrels


def test_counts_judgements_of_what_does_not_exist(tmp_path):
    loaded = load_beir(write_set(tmp_path, qrels=QRELS + "q1\tgone\t1\nnobody\td1\t1\n"))
    assert loaded.qrels == {"q1": {"d1": 2, "d3": 0, "gone": 1}}
    assert (loaded.unknown_documents, loaded.unknown_queries) == (1, 1)


def test_numeric_ids_byte_order_mark_and_line_ends(tmp_path):
    corpus = ["\ufeff" + json.dumps({"_id": 7, "text": "x"}) + "\r\n", "\r\n"]
    queries = [{"_id": 1, "text": "y"}]
    loaded = load_beir(write_set(tmp_path, corpus, queries, "1\t7\t1\r\n"))
    assert loaded.document_ids == ["7"] and loaded.qrels == {"1": {"7": 1}}


def test_repeated_document_that_nobody_judges_is_counted(tmp_path):
    corpus = [*CORPUS, {"_id": "x", "text": "old"}, {"_id": "x", "text": "new"}]
    loaded = load_beir(write_set(tmp_path, corpus))
    assert loaded.documents[-1] == "new" and loaded.repeated_documents == 1


def test_an_equal_repeated_row_is_no_ambiguity(tmp_path):
    corpus, queries = [*CORPUS, "\n", CORPUS[0]], [QUERIES[0], *QUERIES, "\n"]
    loaded, once = load_beir(write_set(tmp_path / "a", corpus, queries)), write_set(tmp_path / "b")
    assert loaded.repeated_documents == 1 and loaded.qrels == load_beir(once).qrels
    assert loaded.documents == load_beir(once).documents


def test_the_title_of_a_query_is_not_read(tmp_path):
    queries = [{"_id": "q1", "title": "Katze", "text": " Tier? "}]
    assert load_beir(write_set(tmp_path, queries=queries)).queries == ["Tier?"]


def test_numbers_as_ids(tmp_path):
    corpus = [{"_id": 1, "text": "a"}, {"_id": "2", "text": "b"}]
    loaded = load_beir(write_set(tmp_path, corpus, [{"_id": 7, "text": "q"}], "7\t1\t1\n7\t2\t0\n"))
    assert loaded.document_ids == ["1", "2"] and loaded.qrels == {"7": {"1": 1, "2": 0}}


D4 = {"_id": "d4", "text": "t"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": [*CORPUS, '{"_id": "d4", \n']}, r"corpus.jsonl:4: bad JSON at column 15: "),
        ({"corpus": [*CORPUS, '["d4"]\n']}, r"corpus.jsonl:4: expected a JSON object"),
        ({"corpus": [*CORPUS, {"text": "t"}]}, r"corpus.jsonl:4: field '_id' is missing"),
        ({"corpus": [{"_id": "", "text": "t"}]}, r"corpus.jsonl:1: field '_id' is empty"),
        ({"corpus": [{"_id": None, "text": ""}]}, r"corpus.jsonl:1: field '_id' must be a string"),
        ({"corpus": [{"_id": "d4"}]}, r"corpus.jsonl:1: field 'text' is missing \(fields: _id\)"),
        ({"corpus": [{**D4, "title": 3}]}, r"corpus.jsonl:1: field 'title' must be a string"),
        (
            {"corpus": [*CORPUS, {**CORPUS[0], "text": "x"}]},
            r"corpus.jsonl:4: id 'd1' repeats with another text, and it is judged: keep one",
        ),
        ({"corpus": []}, r"corpus.jsonl: empty file"),
        (
            {"queries": [*QUERIES, {"_id": "q1", "text": "Was?"}]},
            r"queries.jsonl:3: field '_id' repeats 'q1' with another text: keep one",
        ),
        ({"queries": []}, r"queries.jsonl: empty file"),
        ({"qrels": ""}, r"qrels.tsv: empty file"),
        ({"qrels": "q1\td1\n"}, r"qrels.tsv:1: expected 3 fields separated by tabs .* got 2"),
        ({"qrels": "q1 d1 1\n"}, r"qrels.tsv:1: expected 3 fields separated by tabs .* got 1"),
        (
            {"corpus": ['{"_id": "d\\ud800", "text": ""}\n']},
            r"field '_id' 'd\\ud800' has half of a surro",
        ),
        ({"corpus": [{"_id": "d\x001", "text": ""}]}, r"field '_id' 'd\\x001' has the control ch"),
        (
            {"queries": [{"_id": "q\t1", "text": ""}]},
            r"queries.jsonl:1: field '_id' 'q\\t1' has th",
        ),
        ({"queries": [{"_id": " q1", "text": ""}]}, r"field '_id' ' q1' has white space at an end"),
        ({"queries": [{"_id": 1.5, "text": ""}]}, r"must be a string or a whole number, got 1.5"),
        ({"qrels": QRELS + " q1\td1\t1\n"}, r"qrels.tsv:5: field 'query-id' ' q1' has white space"),
        ({"qrels": QRELS + "q1\t\t1\n"}, r"qrels.tsv:5: field 'corpus-id' is empty"),
        ({"qrels": QRELS + "q1\td2\t3000000000\n"}, r"field 'score' must be from -2147483647 to"),
        ({"qrels": f"q1\td2\t{'1' * 5000}\n"}, r"qrels.tsv:1: field 'score' must be an integer"),
        ({"qrels": QRELS + "q1\td2\t1_0\n"}, r"qrels.tsv:5: field 'score' must be an integer"),
        ({"qrels": "q1\td1\tyes\n"}, r"qrels.tsv:1: field 'score' must be an integer, got 'yes'"),
        ({"qrels": QRELS + "q2\td2\t0.5\n"}, r"qrels.tsv:5: field 'score' must be an integer"),
        ({"qrels": QRELS + "q1\td1\t1\n"}, r"qrels.tsv:5: query 'q1' and document 'd1' were judg"),
        ({"qrels": "q2\td2\t0\n"}, r"qrels.tsv: no query of queries.jsonl has a relevant"),
    ],
)
def test_refuses(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        load_beir(write_set(tmp_path, **change))
    assert "\n" not in str(caught.value)


def test_refuses_invalid_utf8(tmp_path):
    write_set(tmp_path)
    (tmp_path / "queries.jsonl").write_bytes(b'{"_id": "q1", "text": "ok"}\n{"_id": "\xff"}\n')
    with pytest.raises(UserError, match=r"queries.jsonl:2: invalid UTF-8 at byte 10"):
        load_beir(tmp_path)


def test_refuses_damaged_gz(tmp_path):
    write_set(tmp_path, gz=".gz")
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"corpus.jsonl.gz:\d+: damaged .gz file"):
        load_beir(tmp_path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(UserError, match=r"corpus.jsonl.gz:1: damaged .gz file"):
        load_beir(tmp_path)


def test_refuses_what_is_no_folder(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="file: is not a folder"):
        load_beir(file)
    with pytest.raises(UserError, match="gone: no such folder"):
        load_beir(tmp_path / "gone")
    with pytest.raises(UserError, match=r"no corpus.jsonl, neither plain nor .gz"):
        load_beir(tmp_path)


def test_a_set_without_queries_is_refused():
    with pytest.raises(ValueError, match="retrieval set 'x' has 0 queries and 1 documents"):
        RetrievalSet("x", [], [], ["d"], ["text"], {})


def test_unique_names():
    assert unique_names(["/data/xquad/de"]) == ["de"]
    assert unique_names(["a/xquad/de", "b/xquad/de/", "b/xquad/en"]) == [
        "a/xquad/de",
        "b/xquad/de",
        "en",
    ]
    with pytest.raises(UserError, match="named twice"):
        unique_names(["a/de", "./a/de"])
    with pytest.raises(UserError, match="no folder"):
        unique_names([])


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not next to this checkout")
@pytest.mark.parametrize(
    ("name", "queries", "documents"),
    [
        ("cranfield", 225, 1400),
        ("cacm", 52, 3203),
        ("xquad/zh", 1190, 240),
        ("xquad/ar", 1190, 240),
    ],
)
def test_public_sets(name, queries, documents):
    loaded = load_beir(SHARED / name)
    assert (len(loaded.queries), len(loaded.documents)) == (queries, documents)
