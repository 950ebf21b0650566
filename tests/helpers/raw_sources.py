"""Small raw sources in every format that launch/prepare.py reads."""

import gzip
import json
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq


def jsonl(path: pathlib.Path, rows) -> pathlib.Path:
    """Rows are dicts, or raw lines as bytes or str; gzip by the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        if not isinstance(row, bytes):
            row = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)).encode()
        lines.append(row + b"\n")
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.write(b"".join(lines))
    return path


def parquet(path: pathlib.Path, rows) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def arrow(path: pathlib.Path, rows) -> pathlib.Path:
    """As `datasets.save_to_disk` writes: an Arrow stream and two descriptions beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("dataset_info.json", "state.json"):
        (path.parent / name).write_text("{}")
    return path


def pairs(count: int, tag: str = "a", **more) -> list[dict]:
    return [
        {"query": f"query {tag} {i}", "document": f"document {tag} {i} of some length", **more}
        for i in range(count)
    ]


def beir(folder: pathlib.Path, split: str = "train") -> pathlib.Path:
    """Two queries, four documents; one judgement of 0, one of an unknown document."""
    jsonl(
        folder / "corpus.jsonl",
        [
            {"_id": f"d{i}", "title": f"title {i}" if i else "", "text": f"text {i}"}
            for i in range(4)
        ],
    )
    jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"question {i}"} for i in range(3)])
    (folder / "qrels").mkdir()
    (folder / "qrels" / f"{split}.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\td1\t0\nq1\td2\t2\nq1\td9\t1\n"
    )
    return folder


MIRACL = {
    "query_id": "1",
    "query": "wer war das",
    "positive_passages": [
        {"docid": "1#0", "title": "Er", "text": "war es"},
        {"docid": "1#1", "title": "", "text": "oder sie"},
    ],
    "negative_passages": [{"docid": "2#0", "title": "Ein Auto", "text": "fährt"}],
}


def write_sources(path: pathlib.Path, *sources: dict) -> pathlib.Path:
    entries = [
        {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in s.items()} for s in sources
    ]
    path.write_text(json.dumps(entries))
    return path


def read(tmp_path, **source):
    """(good, bad) rows of one source; needs Apache Beam."""
    from moe_embed_jax.preparation.beam.input_files import read_part
    from moe_embed_jax.preparation.beam.read import Bad, Good
    from moe_embed_jax.preparation.beam.sources import find_parts, read_sources

    path = write_sources(tmp_path / "sources.json", {"name": "s", **source})
    sources = read_sources(path)
    rows = [row for part in find_parts(sources) for row in read_part(sources[0], part)]
    return [r for r in rows if isinstance(r, Good)], [r for r in rows if isinstance(r, Bad)]


def texts(good):
    return [(*row.texts[:2], list(row.texts.negatives), row.language) for row in good]


ROWS_PER_SHARD = 64


def prepare(sources, output, **options) -> dict:
    """The manifest of a preparation in this process; a `sources` file as of `write_sources`."""
    from moe_embed_jax.preparation.beam import pipeline

    options = {"rows_per_shard": ROWS_PER_SHARD, **options}
    return pipeline.prepare(pipeline.Options(str(sources), str(output), **options))
