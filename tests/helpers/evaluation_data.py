"""Tiny data in the real formats of evaluation sets, and vectors of a stand-in for a model."""

import gzip
import json
import lzma
from pathlib import Path

from helpers.stand_in_teacher import StandInTeacher
from moe_embed_jax.evaluation.text_vectors import TextVectors

PROMPTS = {"query": "q: ", "document": "d: ", "symmetric": "s: "}


def text_vectors(cache, encoder=None, widths=(None,), mesh=None) -> TextVectors:
    return TextVectors(encoder or StandInTeacher(), Path(cache), PROMPTS, mesh, widths)


def write(path: Path, text: str) -> Path:
    """Compressed as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(text.encode()))
    return path


def table(*rows, header=()) -> str:
    return "".join(
        "\t".join(map(str, row)) + "\n" for row in ([header] if header else []) + [*rows]
    )


def jsonl(records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_beir(folder: Path, documents, queries, qrels, gz=".gz") -> Path:
    """documents, queries: {id: text}; qrels: (query, document, grade)."""
    corpus = ({"_id": i, "title": "", "text": t} for i, t in documents.items())
    write(folder / f"corpus.jsonl{gz}", jsonl(corpus))
    write(folder / f"queries.jsonl{gz}", jsonl({"_id": i, "text": t} for i, t in queries.items()))
    write(folder / f"qrels.tsv{gz}", table(*qrels, header=("query-id", "corpus-id", "score")))
    return folder


def write_miracl(root: Path, language: str, shards, topics, qrels) -> Path:
    """shards: lists of (docid, title, text); topics: {id: query}; qrels: (query, docid, grade)."""
    base = root / f"miracl-v1.0-{language}"
    name = f"miracl-v1.0-{language}-dev.tsv"
    write(base / "topics" / f"topics.{name}", table(*topics.items()))
    rows = (f"{query}\tQ0\t{document}\t{grade}\n" for query, document, grade in qrels)
    write(base / "qrels" / f"qrels.{name}", "".join(rows))
    for number, shard in enumerate(shards):
        records = ({"docid": i, "title": title, "text": text} for i, title, text in shard)
        corpus = root / f"miracl-corpus-v1.0-{language}"
        write(corpus / f"docs-{number}.jsonl.gz", jsonl(records))
    return root
