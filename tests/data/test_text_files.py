"""JSON lines, one JSON array, blank lines and lines without end, in every reader of texts."""

import gzip
import json
import random
import resource

import pytest

from moe_embed_jax.data import bounded_lines
from moe_embed_jax.data.text_files import read_json, read_texts
from moe_embed_jax.errors import UserError

VALUES = [12345, "é\u2028𝄞" * 30, True, None, -1.5e10, {"a": [1, {"b": "x" * 99}]}, "", [], "]"]


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_piece_by_piece(tmp_path, monkeypatch, block, indent):
    """Wherever the pieces end: in a number, a text, a character."""
    monkeypatch.setattr(bounded_lines, "_BLOCK", block)
    rows = random.Random(1).choices(VALUES, k=60)
    path = tmp_path / "a.json"
    for is_ascii in (True, False):
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=is_ascii), encoding="utf-8")
        found = list(read_json(path))
        assert [value for _, value in found] == rows
        lines = path.read_text(encoding="utf-8").split("\n")
        for where, value in found:  # the line on which it begins
            start = lines[int(where.rpartition(":")[2]) - 1]
            assert json.dumps(value, ensure_ascii=is_ascii)[:1] in start
    path.write_text("[ ] ")
    assert list(read_json(path)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1,2", "a.json:1: bad JSON: expected ',' of an array, got the end of the file"),
        ("[1,\n,2]", "a.json:2: bad JSON in an element of the array: Expecting value"),
        ("[1]\nx", "a.json:2: something follows the end of the array"),
        ('["a]', "a.json:1: bad JSON in an element of the array: Unterminated string"),
        ("[1 2]", "a.json:1: bad JSON: expected ',' of an array, got '2'"),
        (f"[{'[' * 100_000}", "a.json:1: bad JSON in an element of the array: maximum recursion"),
        (f"[{'9' * 5000}]", "a.json:1: bad JSON in an element of the array: Exceeds the limit"),
    ],
)
def test_a_broken_array(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError) as caught:
        list(read_json(tmp_path / "a.json"))
    assert message in str(caught.value)


def test_blank_lines(tmp_path):
    """Those at the end are nothing; before another line one text would be missing."""
    path = tmp_path / "a.jsonl"
    path.write_text('"a"\n"b"\n\n \t\n')
    assert list(read_texts(path)) == ["a", "b"]
    path.write_text('"a"\n\n"b"\n')
    assert [value for _, value in read_json(path)] == ["a", "b"]
    with pytest.raises(UserError, match=r"a.jsonl:2: empty line, expected a JSON value"):
        list(read_texts(path))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.json.gz"])
def test_a_line_without_end_takes_no_memory(tmp_path, monkeypatch, name):
    """300 KB of .gz are 300 MB of one line; a line of the bound itself is read."""
    monkeypatch.setenv("MOE_EMBED_MAX_LINE_MB", "8")
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        file.write(b'["' if ".json.gz" in name else b'"')
        for _ in range(300):
            file.write(b"a" * (1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r":1: .* longer than 8 MiB: split it, or set MOE_EMBED"):
        list(read_texts(tmp_path / name))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
    text = "a" * ((8 << 20) - 3)
    (tmp_path / "b.jsonl").write_text(f'"{text}"\n')
    assert list(read_texts(tmp_path / "b.jsonl")) == [text]
