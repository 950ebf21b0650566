"""Damage to files: bits, lengths, places, and values inside JSON, tables and tensors."""

import gzip
import json
import lzma
import pathlib
import random
import shutil
import struct
import zlib

import pyarrow as pa
import pyarrow.parquet as pq

WEIRD = (
    *(None, True, False, -1, 0, 1, 10**7, 10**30, -(10**30), 1.5, 1e308, -0.0),
    *(
        float("nan"),
        float("inf"),
        "",
        " ",
        "0",
        "x" * 5000,
        "\ud800",
        "\u0000",
        "../x",
        "/etc/hosts",
    ),
    *("a/b", ".", "..", "\u2028", "\ufeff", [], {}, [[]], [None], {"": {}}, ["a", 1], {"a": [1]}),
)
DEEP = "[" * 100_000
DEEP_OBJECT = '{"a":' * 100_000


def pick_file(rng: random.Random, folder: pathlib.Path, skip=()) -> pathlib.Path:
    """A file under `folder`; each kind (by its name without digits) is as likely as any other."""
    kinds: dict[str, list[pathlib.Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part in str(path.relative_to(folder)) for part in skip):
            kinds.setdefault("".join(c for c in path.name if not c.isdigit())[-24:], []).append(
                path
            )
    return rng.choice(kinds[rng.choice(sorted(kinds))])


def damage(rng: random.Random, folder: pathlib.Path, outside: pathlib.Path, skip=()) -> str:
    """Damages one file under `folder`; returns what was done."""
    path = pick_file(rng, folder, skip)
    name = path.relative_to(folder)
    operations = [flip, flip, truncate, empty, delete, become_folder, link_to_nothing, swap]
    operations += [zero, insert]
    if path.suffix in (".json", ".jsonl") or path.name.endswith("METADATA"):
        operations += [json_value] * 4 + [escape]
    operation = rng.choice(operations)
    return f"{name}: {operation.__name__}: {operation(rng, path, folder=folder, outside=outside)}"


def flip(rng, path, **_) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        path.write_bytes(b"\x01")
        return "a byte in an empty file"
    places = [rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 1, 8)))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bytes {places}"


def truncate(rng, path, **_) -> str:
    data = path.read_bytes()
    length = rng.randrange(max(len(data), 1))
    path.write_bytes(data[:length])
    return f"{len(data)} -> {length} bytes"


def empty(rng, path, **_) -> str:
    path.write_bytes(b"")
    return "no bytes"


def delete(rng, path, **_) -> str:
    path.unlink()
    return "gone"


def become_folder(rng, path, **_) -> str:
    path.unlink()
    path.mkdir()
    return "a folder in its place"


def link_to_nothing(rng, path, **_) -> str:
    path.unlink()
    path.symlink_to("nothing")
    return "a link to nothing in its place"


def swap(rng, path, folder, **_) -> str:
    other = pick_file(rng, folder)
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)
    return f"with {other.relative_to(folder)}"


def zero(rng, path, **_) -> str:
    data = bytearray(path.read_bytes())
    start = rng.randrange(max(len(data), 1))
    length = min(rng.choice((1, 16, 4096)), len(data) - start)
    data[start : start + length] = bytes(length)
    path.write_bytes(data)
    return f"{length} bytes from {start}"


def insert(rng, path, **_) -> str:
    data = path.read_bytes()
    start = rng.randrange(len(data) + 1)
    more = rng.choice((b"\n", b"\xff\xfe", b"\0", b"{", b'"', rng.randbytes(7), data[:100]))
    path.write_bytes(data[:start] + more + data[start:])
    return f"{more[:10]!r} at {start}"


def json_value(rng, path, **_) -> str:
    """Another value somewhere in a JSON file or in a line of it."""
    text = path.read_text(errors="replace")
    lines = text.splitlines(keepends=True) if path.suffix == ".jsonl" else [text]
    if not lines:
        return empty(rng, path)
    place = rng.randrange(len(lines))
    lines[place], what = change_json(rng, lines[place])
    path.write_text("".join(lines), errors="surrogatepass")
    return f"part {place}: {what}"


def escape(rng, path, folder, outside) -> str:
    """Moves a file that a JSON value names out of the folder and names it there.

    Only a file of the folder: the marker of an input names a file of the world, which other
    attempts read, too.
    """
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return flip(rng, path)
    places = [p for p in walk(value) if isinstance(p[0][p[1]], str)]
    rng.shuffle(places)
    for parent, key in places:
        named = path.parent / parent[key]
        if not parent[key] or len(parent[key]) >= 200 or "\0" in parent[key]:
            continue
        if named.is_file() and named.resolve().is_relative_to(folder.resolve()):
            outside.mkdir(exist_ok=True)
            target = outside / named.name
            shutil.move(named, target)
            up = "../" * len(path.parent.relative_to(folder.parent).parts) + f"{outside.name}/"
            parent[key] = rng.choice((str(target), up + named.name))
            path.write_text(json.dumps(value))
            return f"{key} -> {parent[key]}"
    return json_value(rng, path)


def change_json(rng, text: str) -> tuple[str, str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text[::-1], "reversed"
    end = "\n" if text.endswith("\n") else ""
    kind = rng.choice(("value", "value", "value", "delete", "rename", "whole", "deep", "twice"))
    places = walk(value)
    if not places or kind == "whole":
        other = rng.choice((*WEIRD, value and [value], {"a": value}))
        return _dump(other) + end, f"{other!r:.60}"
    parent, key = rng.choice(places)
    if kind == "delete":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
    elif kind == "deep":
        parent[key] = "@deep@"
        deep = rng.choice((DEEP, DEEP_OBJECT))
        return _dump(value).replace('"@deep@"', deep) + end, f"{key}: {deep[:6]}..."
    elif kind == "twice" and isinstance(parent, dict):
        return _dump(value)[:-1] + f', "{key}": {_dump(rng.choice(WEIRD))}}}' + end, f"{key} twice"
    else:
        old = parent[key]
        options = [w for w in WEIRD if type(w) is not type(old)] + list(WEIRD)
        if isinstance(old, int) and not isinstance(old, bool):
            options += [old + 1, -old, old * 1000, str(old), float(old)] * 4
        parent[key] = rng.choice(options)
        kind = f"{old!r:.30} -> {parent[key]!r:.60}"
    return _dump(value) + end, f"{key}: {kind}"


def _dump(value) -> str:
    return json.dumps(value, ensure_ascii=True)


def walk(value, limit: int = 3000) -> list:
    """(container, key) of every value inside a JSON value."""
    found, todo = [], [value] if isinstance(value, (dict, list)) else []
    while todo and len(found) < limit:
        parent = todo.pop()
        keys = parent.keys() if isinstance(parent, dict) else range(len(parent))
        for key in list(keys):
            found.append((parent, key))
            if isinstance(parent[key], (dict, list)):
                todo.append(parent[key])
    return found


# ---- Inputs of users: what a reader may meet -----------------------------------------------------


def fuzz(rng: random.Random, folder: pathlib.Path, outside: pathlib.Path, skip=()) -> str:
    """Changes one file of `folder` once to three times, inside its format where it has one."""
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        path = pick_file(rng, folder, skip)
        done.append(f"{path.relative_to(folder)}: {_fuzz_file(rng, path, folder, outside)}")
        if not any(p.is_file() for p in folder.rglob("*")):
            break
    return "; ".join(done)


def _fuzz_file(rng, path, folder, outside) -> str:
    roll = rng.random()
    if roll < 0.15:
        return damage_file(rng, path, folder)
    if path.suffix in (".gz", ".xz") and roll < 0.85:
        open_, pack = (
            (gzip.decompress, gzip.compress)
            if path.suffix == ".gz"
            else (
                lzma.decompress,
                lzma.compress,
            )
        )
        try:
            data = open_(path.read_bytes())
        except (OSError, EOFError, zlib.error, lzma.LZMAError):
            return damage_file(rng, path, folder)
        inner = path.with_suffix("")
        inner.write_bytes(data)
        said = _fuzz_plain(rng, inner, folder, outside)
        if inner.is_file():
            path.write_bytes(pack(inner.read_bytes()))
            inner.unlink()
        return said
    return _fuzz_plain(rng, path, folder, outside)


def _fuzz_plain(rng, path, folder, outside) -> str:
    suffix = path.suffix
    if suffix == ".jsonl" or (suffix == ".json" and rng.random() < 0.9):
        return json_value(rng, path)
    if suffix in (".tsv", ".csv", ".txt") and rng.random() < 0.7:
        return table_cell(rng, path)
    if suffix == ".safetensors" and rng.random() < 0.7:
        return tensor_header(rng, path)
    return damage_file(rng, path, folder)


def damage_file(rng, path, folder) -> str:
    operation = rng.choice(
        (flip, flip, truncate, empty, delete, become_folder, link_to_nothing, zero, insert)
    )
    return f"{operation.__name__}: {operation(rng, path, folder=folder)}"


CELLS = (
    *("", "\t", "nan", "-1", "1e999", "9" * 400, '"', '""', ",", ";", "\r"),
    *("\0", "\ufeff", "\u2028"),
)


def table_cell(rng, path) -> str:
    lines = path.read_text(errors="replace").splitlines(keepends=True) or [""]
    row = rng.randrange(len(lines))
    separator = "\t" if "\t" in lines[row] else ","
    cells = lines[row].rstrip("\n").split(separator)
    kind = rng.choice(("cell", "cell", "drop", "more", "twice", "long", "separator"))
    column = rng.randrange(len(cells))
    if kind == "drop":
        del cells[column]
    elif kind == "more":
        cells.insert(column, rng.choice(CELLS))
    elif kind == "twice":
        lines.insert(row, lines[row])
    elif kind == "long":
        cells[column] = "y" * 200_000
    elif kind == "separator":
        separator = rng.choice((";", " ", ",", "|"))
    else:
        cells[column] = rng.choice(CELLS)
    lines[row] = separator.join(cells) + "\n"
    path.write_text("".join(lines), errors="surrogatepass")
    return f"{kind} in line {row + 1}"


def tensor_header(rng, path) -> str:
    """Another value in the JSON header of a safetensors file."""
    data = path.read_bytes()
    if len(data) < 8:
        return flip(rng, path)
    (length,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.1:
        length = rng.choice((0, 1, length - 1, length + 1, 1 << 40, (1 << 64) - 1))
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        return f"header of {length} bytes"
    header, said = change_json(rng, data[8 : 8 + length].decode(errors="replace"))
    header = header.encode("utf-8", "replace")
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    return said


def retype(rng, path) -> str:
    """A Parquet or Arrow file with a column of another type, or of another name."""
    rows = 5
    column = rng.choice(("query", "document", "negatives", "other"))
    table = {name: [f"{name} {i}" for i in range(rows)] for name in ("query", "document")}
    values = {
        "int64": pa.array(range(rows)),
        "double": pa.array([float("nan")] * rows),
        "null": pa.nulls(rows),
        "bool": pa.array([True] * rows),
        "binary": pa.array([b"\xff\x00"] * rows, pa.binary()),
        "large_string": pa.array(["x"] * rows, pa.large_string()),
        "string_view": pa.array(["x"] * rows, pa.string_view()),
        "dictionary": pa.array(["x"] * rows).dictionary_encode(),
        "list": pa.array([["x", None]] * rows),
        "deep list": pa.array([[[["x"]]]] * rows),
        "struct": pa.array([{"a": "x"}] * rows),
        "map": pa.array([[("a", "b")]] * rows, pa.map_(pa.string(), pa.string())),
        "timestamp": pa.array([2**62] * rows, pa.timestamp("s")),
        "date": pa.array([2**31 - 1] * rows, pa.date32()),
        "duration": pa.array([2**62] * rows, pa.duration("s")),
        "decimal": pa.array([1] * rows, pa.decimal128(38, 10)),
        "fixed": pa.array([b"ab"] * rows, pa.binary(2)),
    }
    kind = rng.choice(sorted(values))
    if path.suffix == ".parquet" and kind in ("string_view", "duration", "timestamp"):
        kind = "large_string"  # Parquet has no such column
    written = pa.table({**table, column: values[kind]})
    if path.suffix == ".parquet":
        pq.write_table(written, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, written.schema) as writer:
            writer.write_table(written)
    return f"column {column} is {kind}"
