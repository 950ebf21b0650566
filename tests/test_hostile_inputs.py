"""Every reader of texts, judgements and descriptions on damaged small files: a result, or one line.

The files are valid ones with seeded damage: bytes that are changed, cut, doubled or put in, and
values of JSON that are replaced. For longer: `python tests/test_hostile_inputs.py SECONDS [SEED]`.
"""

import gzip
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_embed_jax.data.text_files import read_texts
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation import bitext, probe, similarity
from moe_embed_jax.evaluation.beir import load_beir
from moe_embed_jax.evaluation.labelled_texts import read_labelled, read_sib200
from moe_embed_jax.evaluation.miracl import load_topics
from moe_embed_jax.evaluation.pseudo_perplexity import load_documents
from moe_embed_jax.evaluation.retrieval import score_run
from moe_embed_jax.evaluation.streamed_retrieval import scan
from moe_embed_jax.pairs.manifest import MANIFEST, content_hash, read_manifest

ROUNDS = 40  # of every reader in the suite
BYTES = (
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\n",
        b"\r\n",
        b"\n\n",
        b"\t",
        b" ",
        b'"',
        b"\\",
        b"{",
        b"[",
    ),
    *(
        b"]",
        b"}",
        b",",
        b"null",
        b"NaN",
        b"-1",
        b"1e999",
        b"9" * 5000,
        b"\\ud800",
        b"../",
        b"_",
        b"\x85",
    ),
    *(b"[" * 3000, b'{"a":' * 2000, "\u2028".encode(), b"\xf0\x9f\x98"),
)
VALUES = (
    *(
        None,
        True,
        0,
        -1,
        10**30,
        1.5,
        float("nan"),
        "",
        " ",
        "\0",
        "\ud800",
        "../..",
        "/etc",
        "a\tb",
    ),
    *("a\nb", [], {}, [[]], [None], {"a": 1}, "x" * 300, ["a", 3], 2**63),
)


def jsonl(*rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def table(*rows) -> bytes:
    return "".join("\t".join(row) + "\n" for row in rows).encode()


CORPUS = jsonl({"_id": "d1", "title": "t", "text": "eins"}, {"_id": 2, "text": "zwei"})
QUERIES = jsonl({"_id": "q1", "text": "eins?"}, {"_id": "q2", "text": "zwei?"})
QRELS = table(("query-id", "corpus-id", "score"), ("q1", "d1", "1"), ("q2", "2", "2"))
TEXTS = jsonl("ein Text", {"title": "t", "text": "noch einer"}, {"text": "ö"})
LABELLED = jsonl({"text": "a", "language": "de", "topic": "x", "id": 3}, {"text": "b"})
SIB = table(("index_id", "category", "text"), ("0", "a", "eins"), ("1", "b", "zwei"))
PROBE = table(("split", "category", "text"), ("train", "a", "eins"), ("test", "b", "zwei"))
RECORDS = jsonl({"lang": "de", "id": "1", "text": "a"}, {"lang": "en", "id": "1", "text": "b"})
SCORES = table(("score", "sentence1", "sentence2"), ("1.5", "a", "b"), ("2", "c", "d"))
GROUPS = [{"source": "s", "language": "de", "start": 0, "stop": 3, "negatives": 1}]
SHARD = {"file": "a", "lengths": "b", "rows": 3, "bytes": 9, "sha256": "0", "lengths_sha256": "1"}


def manifest(groups=GROUPS, shards=(SHARD,)) -> bytes:
    content = {"format": 1, "rows": 3, "languages": ["de"], "about": {}}
    content |= {"groups": list(groups), "shards": list(shards)}
    return json.dumps(content | {"content_hash": content_hash(list(groups), list(shards))}).encode()


def all_of(rows) -> list:
    return list(rows)


def score(folder: Path) -> None:
    """Whatever is read can be scored: trec_eval does not survive every id and grade."""
    found = load_beir(folder)
    count = len(found.documents)
    score_run(found, np.tile(np.arange(count), (len(found.queries), 1)))


# name -> (files, what reads the folder that they are in)
READERS: dict[str, tuple[dict[str, bytes], Callable[[Path], object]]] = {
    "texts": ({"a.jsonl": TEXTS}, lambda f: all_of(read_texts(f / "a.jsonl"))),
    "gzip": ({"a.jsonl.gz": gzip.compress(TEXTS)}, lambda f: all_of(read_texts(f / "a.jsonl.gz"))),
    "array": (
        {"a.json": json.dumps(["a", {"text": "b"}, {"title": "t", "text": "c"}]).encode()},
        lambda f: all_of(read_texts(f / "a.json")),
    ),
    "plain": ({"a.txt": b"eins\nzwei\n"}, lambda f: all_of(read_texts(f / "a.txt"))),
    "beir": ({"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels.tsv": QRELS}, score),
    "streamed": ({"corpus.jsonl": CORPUS}, lambda f: scan(f / "corpus.jsonl", "_id")),
    "miracl": (
        {"topics.tsv": table(("0", "frage"), ("1", "mehr")), "qrels": b"0 Q0 1#0 1\n1 Q0 2#0 0\n"},
        lambda f: load_topics(f / "topics.tsv", f / "qrels"),
    ),
    "similarity": ({"a.tsv": SCORES}, lambda f: similarity.read_pairs([f / "a.tsv"])),
    "probe": ({"a.tsv": PROBE}, lambda f: probe.read_labelled(f / "a.tsv")),
    "bitext records": (
        {"a.jsonl": RECORDS},
        lambda f: all_of(
            bitext.aligned(bitext.read_records_by_id(f / "a.jsonl", "text"), "en", None, f)
        ),
    ),
    "bitext table": (
        {"a.tsv": table(("lang", "sentence", "en"), ("de", "a", "b"))},
        lambda f: all_of(bitext.read_pairs_table(f / "a.tsv", "en", None)),
    ),
    "bitext columns": (
        {"en-es.tsv": table(("a", "b"), ("c", "d"))},
        lambda f: bitext.read_columns(f / "en-es.tsv", "en-es"),
    ),
    "bitext aligned": (
        {"a.tsv": table(("index_id", "text"), ("0", "b"))},
        lambda f: all_of(bitext.read_aligned(f / "a.tsv")),
    ),
    "labelled": ({"a.jsonl": LABELLED}, lambda f: read_labelled([f / "a.jsonl"])),
    "sib200": ({"deu_Latn.tsv": SIB}, read_sib200),
    "held-out documents": (
        {"de.jsonl.gz": gzip.compress(jsonl({"source": "s", "text": "ein Text"}))},
        load_documents,
    ),
    "held-out lines": ({"de.jsonl": jsonl({"source": "s", "text": "ein Text"})}, lambda f: gz(f)),
    "manifest": ({MANIFEST: manifest()}, lambda f: manifest_of(f)),
}


def gz(folder: Path):
    content = (folder / "de.jsonl").read_bytes()
    (folder / "de.jsonl.gz").write_bytes(gzip.compress(content))
    return load_documents(folder)


def manifest_of(folder: Path):
    """With the right hash, so that what it says is looked at."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        content["content_hash"] = content_hash(content["groups"], content["shards"])
        (folder / MANIFEST).write_text(json.dumps(content))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return read_manifest(folder)


RAW = {
    "pairs": {"query": "q", "document": "d", "lang": "de"},
    "triplets": {"query": "q", "document": "d", "negatives": ["n", "m"], "lang": "de"},
    "flagembedding": {"query": "q", "pos": ["a", "b"], "neg": ["n"], "lang": "de"},
    "texts": {"text": "t", "lang": "de"},
    "mc4": {"text": "eins\nzwei", "lang": "de"},
    "ccnews": {"title": "t", "text": "u", "lang": "de"},
    "miracl": {
        "query": "q",
        "positive_passages": [{"title": "t", "text": "p"}],
        "negative_passages": [{"title": None, "text": "n"}],
        "lang": "de",
    },
}


def source(layout: str, path: str) -> bytes:
    entry = {"name": "s", "format": layout, "path": path, "qrels": "train", "max_bad_share": 0.5}
    if layout != "beir":
        entry |= {"language_field": "lang", "fields": {}}
    return json.dumps([entry if layout != "beir" else entry | {"language": "de"}]).encode()


for layout, row in RAW.items():
    files = {"sources.json": source(layout, "FOLDER/a.jsonl"), "a.jsonl": jsonl(row, row)}
    READERS[f"raw {layout}"] = (files, lambda f: raw_rows(f))
READERS["raw array"] = (
    {
        "sources.json": source("pairs", "FOLDER/a.json"),
        "a.json": json.dumps([RAW["pairs"]]).encode(),
    },
    lambda f: raw_rows(f),
)
for file, pack in {"a.txt": bytes, "a.txt.gz": gzip.compress}.items():
    READERS[f"raw {file}"] = (
        {
            "sources.json": source("texts", f"FOLDER/{file}").replace(
                b"language_field", b"language"
            ),
            file: pack(b"eins\nzwei\n\ndrei\n"),
        },
        lambda f: raw_rows(f),
    )
READERS["raw beir"] = (
    {
        "sources.json": source("beir", "FOLDER"),
        **{"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels/train.tsv": QRELS},
    },
    lambda f: raw_rows(f),
)


def raw_rows(folder: Path) -> list:
    pytest.importorskip("apache_beam", reason="needs Apache Beam (pip install -e .[beam])")
    from moe_embed_jax.preparation.beam.input_files import read_part
    from moe_embed_jax.preparation.beam.read import Good
    from moe_embed_jax.preparation.beam.sources import find_parts, read_sources

    path = folder / "sources.json"
    path.write_bytes(path.read_bytes().replace(b"FOLDER", str(folder).encode()))
    sources = read_sources(str(path))
    rows = [row for part in find_parts(sources) for row in read_part(sources[part.source], part)]
    for row in rows:  # a pair is text that can be kept
        if isinstance(row, Good):
            "".join([row.texts.query, row.texts.document, *row.texts.negatives]).encode()
            assert row.texts.document and all(row.texts.negatives)
    return rows


def damaged(content: bytes, generator: random.Random) -> bytes:
    if content[:1] in b'{["' and generator.random() < 0.4:
        lines = content.split(b"\n")
        place = generator.randrange(len(lines))
        try:
            lines[place] = json.dumps(_replaced(json.loads(lines[place]), generator)).encode()
        except (ValueError, RecursionError):
            return content
        return b"\n".join(lines)
    for _ in range(generator.randint(1, 3)):
        start = generator.randrange(len(content) + 1)
        stop = generator.choice((start, start + 1, start + generator.randrange(20)))
        new = generator.choice(
            (b"", generator.choice(BYTES), generator.randbytes(1), content[:start])
        )
        content = content[:start] + new + content[stop:]
    return content[: generator.randrange(len(content) + 1)] if generator.random() < 0.1 else content


def _replaced(value, generator: random.Random):
    """The same with one of its values another one, or a key lost."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice(list(value))
        if generator.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _replaced(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.9:
        place = generator.randrange(len(value))
        return [*value[:place], _replaced(value[place], generator), *value[place + 1 :]]
    return generator.choice(VALUES)


def attack(name: str, folder: Path, seed: int) -> str:
    """Reads the files of a reader, one of them damaged; what was said ("" for a result)."""
    files, read = READERS[name]
    generator = random.Random(f"{name} {seed}")
    victim = generator.choice(list(files))
    for file, content in files.items():
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(damaged(content, generator) if file == victim else content)
    try:
        read(folder)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", READERS)
def test_damage_is_a_result_or_one_line(name, tmp_path):
    said = set()
    for seed in range(ROUNDS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        message = attack(name, folder, seed)
        assert "\n" not in message, f"seed {seed}: {message}"
        assert len(message) < 1500, f"seed {seed}: {message}"
        said.add(message.replace(str(folder), ""))
    assert len(said) > 3  # the damage does something


def main(seconds: float, seed: int) -> None:
    end, tries, faults = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        for name in READERS:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    message = attack(name, Path(folder), seed)
                    assert "\n" not in message and len(message) < 1500, message
                except Exception as error:
                    faults += 1
                    print(f"{name}, seed {seed}: {type(error).__name__}: {error!s:.300}")
            tries += 1
        seed += 1
    print(f"{tries} tries, {faults} faults; the next seed is {seed}")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
