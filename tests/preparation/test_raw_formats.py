"""The formats of raw sources, and what is said about rows that are no pairs. No Beam pipeline."""

import gzip
import json
import lzma

import pytest
from helpers import raw_sources
from helpers.raw_sources import read, texts

pytest.importorskip("apache_beam", reason="needs Apache Beam (pip install -e .[beam])")

from moe_embed_jax.errors import UserError
from moe_embed_jax.preparation.beam.sources import read_sources


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz", "a.ndjson"])
def test_pairs(tmp_path, name):
    rows = [
        {"query": " eine Frage ", "document": "Antwort\n\u2028mehr"},
        {"query": "q", "document": "d"},
    ]
    path = raw_sources.jsonl(tmp_path / name, rows)
    good, bad = read(tmp_path, format="pairs", path=path, language="de")
    assert not bad
    assert texts(good) == [("eine Frage", "Antwort\n\u2028mehr", [], "de"), ("q", "d", [], "de")]
    assert [row.line for row in good] == [1, 2]


def test_own_field_names_and_a_language_field(tmp_path):
    rows = [{"title": "q", "body": "d", "lang": "pt-BR"}, {"title": "q", "body": "d", "lang": "?"}]
    path = raw_sources.jsonl(tmp_path / "a.jsonl", rows)
    fields = {"query": "title", "document": "body"}
    good, bad = read(tmp_path, format="pairs", path=path, language_field="lang", fields=fields)
    assert texts(good) == [("q", "d", [], "pt-BR")]
    assert (bad[0].line, bad[0].field) == (2, "lang")


def test_triplets(tmp_path):
    rows = [
        {"query": "q", "document": "d", "negatives": ["n1", "n2"]},
        {"query": "q", "document": "d", "negatives": "n3"},
        {"query": "q", "document": "d", "negatives": []},
        {"query": "q", "document": "d", "negatives": ["n", 3]},
        {"query": "q", "document": "d", "negatives": ["n", " "]},
        {"query": "q", "document": "d"},
    ]
    path = raw_sources.jsonl(tmp_path / "a.jsonl", rows)
    good, bad = read(tmp_path, format="triplets", path=path, language="en")
    assert [list(row.texts.negatives) for row in good] == [["n1", "n2"], ["n3"], []]
    places = [(row.line, row.field) for row in bad]
    assert places == [(4, "negatives[1]"), (5, "negatives[1]"), (6, "negatives")]


def test_mc4(tmp_path):
    rows = [
        {"text": "Überschrift\nErster Absatz.\nZweiter.", "url": "u"},
        {"text": "one line only"},
        {"text": "\n\nfirst\n\n"},
    ]
    path = raw_sources.jsonl(tmp_path / "c4-de.tfrecord-00000.json.gz", rows)
    good, bad = read(tmp_path, format="mc4", path={"de": str(path)})
    assert texts(good) == [("Überschrift", "Erster Absatz.\nZweiter.", [], "de")]
    assert [(row.line, row.field) for row in bad] == [(2, "text"), (3, "text")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_null_is_nothing(tmp_path, kind):
    passages = [{"title": None, "text": "p"}, {"title": "t", "text": "p2"}]
    rows = [
        {"query": "q", "positive_passages": passages, "negative_passages": None, "negatives": None},
        {
            "query": "q",
            "positive_passages": [passages[0], None],
            "negative_passages": [None, {"title": None, "text": "n"}],
            "negatives": ["n", None],
        },
    ]
    path = getattr(raw_sources, kind)(tmp_path / f"a.{kind}", rows)
    good, bad = read(tmp_path, format="miracl", path=path, language="en")
    assert not bad
    assert texts(good) == [("q", "p", [], "en"), ("q", "t p2", [], "en"), ("q", "p", ["n"], "en")]
    fields = {"document": "query"}
    good, bad = read(tmp_path, format="triplets", path=path, language="en", fields=fields)
    assert not bad and [row.texts.negatives for row in good] == [(), ("n",)]


def test_negatives_that_teach_nothing_are_left_out(tmp_path):
    """Equal to the query, to a positive or to each other, as duplicates are equal."""
    negatives = ["Good", "  ANSWER one", "ＱＵＥＳＴＩＯＮ", "good ", "answer TWO", "fine"]
    row = {"query": "question", "pos": ["answer one", "answer two"], "neg": negatives}
    path = raw_sources.jsonl(tmp_path / "a.jsonl", [row])
    good, _ = read(tmp_path, format="flagembedding", path=path, language="en")
    assert [row.texts.negatives for row in good] == [("Good", "fine")] * 2
    assert [row.dropped for row in good] == [4, 4]


def test_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\n{"query": "q", "document": "d"}\n \t\r\n{"query": "p", "document": "d"}\n\n'
    )
    good, bad = read(tmp_path, format="pairs", path=path, language="en")
    assert not bad and [row.line for row in good] == [2, 4]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("indent", [None, 1])
def test_one_json_array(tmp_path, name, indent):
    rows = [*raw_sources.pairs(3, "\u2028ä"), 7, {"query": "q"}]
    content = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    raw_sources.jsonl(tmp_path / name, [b" \n", content])
    good, bad = read(tmp_path, format="pairs", path=tmp_path / name, language="de")
    assert [row.texts.query for row in good] == [row["query"] for row in rows[:3]]
    assert [row.line for row in good] == ([3, 3, 3] if indent is None else [4, 8, 12])
    assert "must be a JSON object, is int" in bad[0].problem and bad[1].field == "document"
    raw_sources.jsonl(tmp_path / name, [content.replace(b"7", b"{")])
    good, bad = read(tmp_path, format="pairs", path=tmp_path / name, language="de")
    assert len(good) == 3 and "bad JSON in an element of the array" in bad[0].problem


def test_a_line_that_is_too_long_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_EMBED_MAX_LINE_MB", "1")
    rows = [{"query": "q", "document": text} for text in ("d", "d" * (1 << 20), "e")]
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        write = raw_sources.parquet if name == "a.parquet" else raw_sources.jsonl
        good, bad = read(tmp_path, format="pairs", path=write(tmp_path / name, rows), language="en")
        assert [row.line for row in good] == [1, 3]
        assert (
            bad[0].line == 2 and "longer than 1 MiB: split it, or set MOE_EMBED" in bad[0].problem
        )
    monkeypatch.setenv("MOE_EMBED_MAX_LINE_MB", "0")
    with pytest.raises(UserError, match="MOE_EMBED_MAX_LINE_MB='0' must be from 1 to"):
        read(tmp_path, format="pairs", path=tmp_path / "a.jsonl", language="en")


def test_ccnews(tmp_path):
    rows = [
        {"title": "News", "text": "A story", "maintext": "Another"},
        {"title": None, "text": "x"},
    ]
    path = raw_sources.jsonl(tmp_path / "a.jsonl", rows)
    good, bad = read(tmp_path, format="ccnews", path=path, language="en")
    assert texts(good) == [("News", "A story", [], "en")]
    assert "must be a string, got None" in bad[0].problem
    own = {"document": "maintext"}
    good, _ = read(tmp_path, format="ccnews", path=path, language="en", fields=own)
    assert texts(good) == [("News", "Another", [], "en")]


def test_miracl(tmp_path):
    broken = {**raw_sources.MIRACL, "positive_passages": [{"title": "no text"}]}
    path = raw_sources.jsonl(tmp_path / "train.jsonl.gz", [raw_sources.MIRACL, broken])
    good, bad = read(tmp_path, format="miracl", path=path, language="de")
    assert texts(good) == [
        ("wer war das", "Er war es", ["Ein Auto fährt"], "de"),
        ("wer war das", "oder sie", ["Ein Auto fährt"], "de"),
    ]
    assert [row.line for row in good] == [1, 1]
    assert (bad[0].line, bad[0].field) == (2, "positive_passages[0].text")


def test_beir(tmp_path):
    folder = raw_sources.beir(tmp_path / "set")
    good, bad = read(tmp_path, format="beir", path=folder, language="en")
    assert texts(good) == [
        ("question 0", "text 0", ["title 1 text 1"], "en"),
        ("question 1", "title 2 text 2", [], "en"),
    ]
    (row,) = bad
    assert (row.file, row.line, row.field) == (str(folder / "qrels/train.tsv"), 5, "corpus-id")
    assert "'d9' is not in" in row.problem
    with open(folder / "corpus.jsonl", "ab") as file:
        file.write(b"{broken\n")
    _, bad = read(tmp_path, format="beir", path=folder, language="en")
    assert (bad[0].file, bad[0].line) == (str(folder / "corpus.jsonl"), 5)
    with open(folder / "qrels/train.tsv", "ab") as file:
        file.write(b"\nq0\td0\tone\nq 1\td\x001\t1\nq1\td2\xff\t1\nq1\td2\n")
    _, bad = read(tmp_path, format="beir", path=folder, language="en")
    assert [(row.line, row.field) for row in bad[:4]] == [
        (7, "score"),
        (8, "corpus-id"),
        (9, ""),
        (10, ""),
    ]
    _, bad = read(tmp_path, format="beir", path=folder, language="en", qrels="dev")
    assert "no qrels file" in bad[0].problem


def test_beir_ids(tmp_path):
    """Numbers are ids; an equal repeat says nothing new, another one is ambiguous; no header."""
    corpus = [{"_id": i, "title": None, "text": f"text {i}"} for i in (1, 2, 3)]
    corpus += [corpus[0], {"_id": 2, "text": "another"}, {"_id": "x ", "text": "y"}]
    raw_sources.jsonl(tmp_path / "s/corpus.jsonl", [*corpus, b""])
    questions = [{"_id": 7, "title": "not read", "text": "question"}] * 2
    raw_sources.jsonl(tmp_path / "s/queries.jsonl", questions)
    (tmp_path / "s/qrels.tsv").write_text("7\t1\t1\n7\t2\t1\n7\t3\t0\n\n")
    good, bad = read(tmp_path, format="beir", path=tmp_path / "s", language="en")
    assert texts(good) == [("question", "text 1", ["text 3"], "en")]
    assert [(row.line, row.field, row.problem) for row in bad] == [
        (5, "_id", "repeats '2' of line 2 with another text"),
        (6, "_id", "'x ' has white space at an end: remove it"),
        (2, "corpus-id", f"'2' has several texts in {tmp_path}/s/corpus.jsonl"),
    ]
    (tmp_path / "s/qrels.tsv").write_text("7\t1\tyes\n7\t1\t1\n")
    _, bad = read(tmp_path, format="beir", path=tmp_path / "s", language="en")
    assert "the first line is a judgement" in bad[-1].problem


BAD_LINES = [
    (b'{"query": "q", "document"', "", "bad JSON"),
    (b'["q", "d"]', "", "must be a JSON object, is list"),
    (b'{"query": "\xff\xfe", "document": "d"}', "", "bad UTF-8 at byte 12"),
    (b'{"query": 7, "document": "d"}', "query", "must be a string, got 7"),
    (b'{"query": "q"}', "document", "is missing (fields: query)"),
    (b'{"query": "q", "document": "  "}', "document", "is empty"),
    (b'{"query": ' + b"[" * 100_000, "", "bad JSON"),
]


@pytest.mark.parametrize(("line", "field", "problem"), BAD_LINES)
def test_bad_lines_are_named(tmp_path, line, field, problem):
    good_row = {"query": "q", "document": "d"}
    path = raw_sources.jsonl(tmp_path / "a.jsonl", [good_row, line, good_row])
    good, bad = read(tmp_path, format="pairs", path=path, language="en")
    assert [row.line for row in good] == [1, 3]
    (row,) = bad
    assert (row.file, row.line, row.field) == (str(path), 2, field)
    assert problem in row.problem


def test_lone_surrogates_are_replaced(tmp_path):
    path = raw_sources.jsonl(tmp_path / "a.jsonl", ['{"query": "a\\ud83d", "document": "d"}'])
    good, bad = read(tmp_path, format="pairs", path=path, language="en")
    assert not bad and good[0].texts.query == "a\ufffd"


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"query": "q", "document": "d"}\r\n{"query": "p", "document": "d"}'
    )
    good, bad = read(tmp_path, format="pairs", path=path, language="en")
    assert not bad and [row.texts.query for row in good] == ["q", "p"]


@pytest.mark.parametrize("damage", ["cut", "changed", "no gzip"])
def test_damaged_gzip(tmp_path, damage):
    rows = raw_sources.pairs(500)
    path = raw_sources.jsonl(tmp_path / "a.jsonl.gz", rows)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "changed":
        data[-6] ^= 0xFF  # the check sum
    else:
        data = bytearray(json.dumps(rows[0]).encode())
    path.write_bytes(data)
    good, bad = read(tmp_path, format="pairs", path=path, language="en")
    assert "damaged or cut short" in bad[-1].problem
    assert bad[-1].line >= len(good) + 1
    assert len(good) < 500 or damage == "changed"
    assert [row.texts.query for row in good] == [row["query"] for row in rows[: len(good)]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "name='a/b' must be of letters, digits and _"),
        ({"name": ["s"]}, r"name=\['s'\] must be of letters"),
        ({"format": ["pairs"]}, r"format=\['pairs'\]; choose one of"),
        ({"format": {}}, r"format=\{\}; choose one of"),
        ({"qrels": "../x"}, r"source 1 \(s\): qrels is '../x': a name that becomes a file's"),
        ({"qrels": 7}, "qrels=7 must be a string"),
        ({"path": "a\0b"}, r"path='a\\x00b' must be a path"),
        ({"path": [["a"]]}, r"path=\['a'\] must be a path"),
        ({"path": "\ud800/*"}, "no data file matches"),
        ({"path": "a[z-a"}, "no data file matches"),
        ({"language": "../de"}, "language '../de' is not a code"),
        ({"format": "csv"}, "format='csv'; choose one of pairs, triplets"),
        ({"language": None}, "language=None must be a string"),
        ({"language": ""}, "give its language by exactly one of"),
        ({"language_field": "lang"}, "give its language by exactly one of"),
        ({"language": "English, mostly"}, "is not a code"),
        ({"fields": {"negative": "n"}}, "fields has 'negative'; format pairs has query, document"),
        ({"path": "nowhere/*.jsonl"}, "no data file matches nowhere"),
        ({"path": []}, "names no file"),
        ({"max_bad_share": 3}, "must be from 0 to 1"),
        ({"languages": "en"}, "unknown key 'languages'"),
    ],
)
def test_mistakes_in_the_sources_file(tmp_path, change, message):
    path = raw_sources.jsonl(tmp_path / "a.jsonl", raw_sources.pairs(1))
    entry = {"format": "pairs", "path": str(path), "language": "en", **change}
    with pytest.raises(UserError, match=message):
        read(tmp_path, **entry)


def test_unreadable_sources_files(tmp_path):
    path = tmp_path / "sources.json"
    with pytest.raises(UserError, match="cannot be read"):
        read_sources(str(path))
    path.write_text("[{")
    with pytest.raises(UserError, match="is not JSON"):
        read_sources(str(path))
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not JSON"):
        read_sources(str(path))
    path.write_bytes(b'[{"name": "\xff"}]')
    with pytest.raises(UserError, match="is not JSON"):
        read_sources(str(path))
    path.write_text("[]")
    with pytest.raises(UserError, match="no source in it"):
        read_sources(str(path))
    entry = {"name": "a", "format": "pairs", "path": "x", "language": "en"}
    path.write_text(json.dumps([entry, entry]))
    with pytest.raises(UserError, match="two sources are named 'a'"):
        read_sources(str(path))


def test_concatenated_gzip_members_are_one_file(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = [json.dumps(row).encode() + b"\n" for row in raw_sources.pairs(2)]
    path.write_bytes(b"".join(gzip.compress(line) for line in lines))
    good, bad = read(tmp_path, format="pairs", path=path, language="en")
    assert len(good) == 2 and not bad


# ---- Texts alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_texts(tmp_path, kind):
    rows = [{"text": " ein Text\nmit Zeilen "}, {"text": "noch einer"}, {"text": " "}]
    path = getattr(raw_sources, kind)(tmp_path / f"a.{kind}", rows)
    good, bad = read(tmp_path, format="texts", path=path, language="de")
    assert texts(good) == [("", "ein Text\nmit Zeilen", [], "de"), ("", "noch einer", [], "de")]
    assert (bad[0].line, bad[0].field, bad[0].problem) == (3, "text", "is empty")


OPENERS = {"a.txt": open, "a.txt.gz": gzip.open, "a.txt.xz": lzma.open}


@pytest.mark.parametrize("name", OPENERS)
def test_plain_text_is_cut_at_blank_lines(tmp_path, name):
    """The layout of CC100."""
    content = "\n erste Zeile\nzweite\n\n \t\nnächstes\r\nmehr\n\nohne Ende".encode()
    with OPENERS[name](tmp_path / name, "wb") as file:
        file.write(content + b"\n\n\xff kaputt\n\nletztes")
    good, bad = read(tmp_path, format="texts", path=tmp_path / name, language="de")
    assert [(row.line, row.texts.document) for row in good] == [
        (2, "erste Zeile\nzweite"),
        (6, "nächstes\nmehr"),
        (9, "ohne Ende"),
        (13, "letztes"),
    ]
    assert (bad[0].line, bad[0].problem) == (11, "bad UTF-8 at byte 1 of the document")


def test_a_text_without_a_blank_line_is_cut(tmp_path):
    line = "wort " * 1000
    (tmp_path / "a.txt").write_text(f"{line}\n" * 500)
    good, _ = read(tmp_path, format="texts", path=tmp_path / "a.txt", language="de")
    assert [row.line for row in good] == [1, 211, 421]
    assert sum(row.texts.document.count("\n") + 1 for row in good) == 500


def test_a_damaged_xz_file_is_named(tmp_path):
    content = lzma.compress(b"one two\n\nthree four\n" * 5000)
    (tmp_path / "a.txt.xz").write_bytes(content[:-40])
    good, bad = read(tmp_path, format="texts", path=tmp_path / "a.txt.xz", language="de")
    assert "the .xz file is damaged or cut short here" in bad[-1].problem
    assert len(bad) == 1 and all(row.texts.document for row in good)
