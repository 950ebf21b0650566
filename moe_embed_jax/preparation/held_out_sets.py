"""Retrieval test sets from the held-out texts, as BEIR folders.

    data_dir/retrieval/<set>/<language>/{corpus.jsonl.gz, queries.jsonl.gz, qrels.tsv.gz}

Sets: `translations` (English string -> its translation), `descriptions` (name -> description in the
same language), `api` (name of an operation or field -> its documentation). The candidates of a
query are all held-out documents of its set and language. Belongs to preparation.
"""

import dataclasses
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from moe_embed_jax import storage
from moe_embed_jax.checksums import write_checksums
from moe_embed_jax.new_folder import new_folder
from moe_embed_jax.preparation.builders import package_texts, statistics

FOLDER = "retrieval"
# Among few candidates nDCG@10 is high whatever the ranking: 10 documents in random order have 0.45.
MIN_QUERIES = 100
# More queries change a set's mean by less than its standard error; the documents all stay.
MAX_QUERIES = 2000
SET_OF_SOURCE = {
    "translations": "translations",
    "descriptions": "descriptions",
    "aws_api": "api",
    "google_api": "api",
}
_FILES = ("corpus.jsonl.gz", "queries.jsonl.gz", "qrels.tsv.gz")
_SECTION = "retrieval_sets"


@dataclasses.dataclass
class TestSet:
    """Distinct texts and which belong together; numbers are positions in the insertion order."""

    __test__ = False  # the name is for readers, not for pytest

    queries: dict[str, int] = dataclasses.field(default_factory=dict)
    documents: dict[str, int] = dataclasses.field(default_factory=dict)
    relevant: set[tuple[int, int]] = dataclasses.field(default_factory=set)

    def add(self, query: str, document: str) -> None:
        query_number = self.queries.setdefault(query, len(self.queries))
        document_number = self.documents.setdefault(document, len(self.documents))
        self.relevant.add((query_number, document_number))

    def with_queries(self, most: int) -> "TestSet":
        """The same documents asked by at most `most` queries, evenly spaced."""
        if len(self.queries) <= most:
            return self
        texts = list(self.queries)
        chosen = {i * len(texts) // most: new for new, i in enumerate(range(most))}
        return TestSet(
            queries={texts[old]: new for old, new in chosen.items()},
            documents=self.documents,
            relevant={(chosen[q], d) for q, d in self.relevant if q in chosen},
        )

    def counts(self) -> dict[str, int]:
        return {
            "queries": len(self.queries),
            "documents": len(self.documents),
            "relevant": len(self.relevant),
        }


def prepare(
    data_dir: str | Path,
    configs: Sequence[str] = package_texts.CONFIGS,
    progress: bool = True,
) -> dict:
    """Writes the retrieval sets of the test splits of `configs`, unless they are there already.

    Returns:
      What is also stored in retrieval/statistics.json and as section `retrieval_sets` of
      data_dir/statistics.json: "source", "sets" (name, as "translations/de", -> numbers of
      "queries", "documents" and "relevant"), "left_out" (name -> queries) and "min_queries" (100);
      sets with fewer queries are left out.

    Raises:
      UserError: the texts are not prepared, or damaged.
    """
    data_dir = storage.path(data_dir)
    source = package_texts.provenance(data_dir, configs)
    section = _stored(data_dir, source)
    if section is not None:
        return section
    with package_texts.preparation_lock(data_dir):
        section = _write_all(data_dir, source, collect(data_dir, configs), progress)
        statistics.store_section(data_dir, _SECTION, section)
    if progress:
        print_sets(section)
    return section


def collect(data_dir: str | Path, configs: Sequence[str]) -> dict[str, TestSet]:
    """{"translations/de": TestSet} of the test splits, sorted by name."""
    sets: dict[str, TestSet] = {}
    for config in configs:
        rows, groups = package_texts.open_split(data_dir, config, "test")
        for group, (start, stop) in groups.items():
            source, language = group.split("/")
            test_set = sets.setdefault(f"{SET_OF_SOURCE[source]}/{language}", TestSet())
            for row in rows.read(range(start, stop)):
                test_set.add(row.query, row.document)
    return {name: sets[name].with_queries(MAX_QUERIES) for name in sorted(sets)}


def write_beir(folder: Path, test_set: TestSet) -> None:
    """The three files of a BEIR folder; equal sets give equal bytes."""
    folder.mkdir(parents=True)
    corpus = ({"_id": f"d{n}", "title": "", "text": t} for t, n in test_set.documents.items())
    queries = ({"_id": f"q{n}", "text": t} for t, n in test_set.queries.items())
    qrels = (f"q{query}\td{document}\t1" for query, document in sorted(test_set.relevant))
    _write_gzip(folder / _FILES[0], (json.dumps(d, ensure_ascii=False) for d in corpus))
    _write_gzip(folder / _FILES[1], (json.dumps(q, ensure_ascii=False) for q in queries))
    _write_gzip(folder / _FILES[2], ["query-id\tcorpus-id\tscore", *qrels])


def print_sets(section: dict) -> None:
    """One line per set, smallest and largest language named; then what was left out."""
    console = Console()
    table = Table(title="Held-out retrieval sets")
    for heading in ("set", "languages", "queries", "documents", "queries per language"):
        table.add_column(heading, justify="left" if heading == "set" else "right")
    for name in dict.fromkeys(full_name.split("/")[0] for full_name in section["sets"]):
        entries = [e for full_name, e in section["sets"].items() if full_name.split("/")[0] == name]
        queries = [entry["queries"] for entry in entries]
        documents = sum(entry["documents"] for entry in entries)
        spread = f"{min(queries):,} to {max(queries):,}"
        table.add_row(name, str(len(entries)), f"{sum(queries):,}", f"{documents:,}", spread)
    console.print(table)
    if section["left_out"]:
        left_out = ", ".join(f"{name} ({n})" for name, n in section["left_out"].items())
        console.print(f"fewer than {section['min_queries']} queries, left out: {left_out}")


def _stored(data_dir: Path, source: dict) -> dict | None:
    folder = data_dir / FOLDER
    section = statistics.read_json(folder / statistics.FILE_NAME)
    if section.get("source") != source or section.get("limits") != [MIN_QUERIES, MAX_QUERIES]:
        return None
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.gz")}
    files = {f"{name}/{file}" for name in section["sets"] for file in _FILES}
    return section if files <= there else None


def _write_all(data_dir: Path, source: dict, sets: dict[str, TestSet], progress: bool) -> dict:
    kept = {name: s for name, s in sets.items() if len(s.queries) >= MIN_QUERIES}
    section = {
        "source": source,
        "min_queries": MIN_QUERIES,
        "limits": [MIN_QUERIES, MAX_QUERIES],
        "sets": {name: test_set.counts() for name, test_set in kept.items()},
        "left_out": {name: len(s.queries) for name, s in sets.items() if name not in kept},
    }
    steps: Iterable = track(
        kept.items(),
        description="retrieval sets",
        console=Console(stderr=True),
        disable=not progress,
    )
    with new_folder(data_dir / FOLDER, last=statistics.FILE_NAME, replace=True) as partial:
        for name, test_set in steps:
            write_beir(partial / name, test_set)
        write_checksums(partial)
        statistics.write_json(partial / statistics.FILE_NAME, section)
    return section


def _write_gzip(path: Path, lines: Iterable[str]) -> None:
    # No time and no file name in the header: the bytes depend on the lines only.
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as packed,
    ):
        packed.writelines(line.encode("utf-8") + b"\n" for line in lines)
