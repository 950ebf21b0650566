"""Counts of a preparation, from the markers of its pieces: what is where, and that nothing is lost.

`stages` defines the markers: of parts (input files) and of buckets (ranges of keys of a source).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from moe_embed_jax.errors import UserError


def bucket_counts(parts: Sequence[dict], sources: int, rows_per_shard: int) -> dict[int, int]:
    """source -> number of key ranges, so that each has about a shard's rows."""
    counts = {}
    for source in range(sources):
        pairs = sum(m["rows"] - m["bad"] for m in parts if m["source"] == source)
        if pairs:
            counts[source] = -(-pairs // rows_per_shard)
    if not counts:
        raise UserError("there is no good row in any source: nothing to prepare")
    return counts


def bucket_bytes(parts: Sequence[dict], buckets: Mapping[int, int]) -> dict[int, float]:
    """source -> compressed bytes of one of its buckets, on average."""
    return {
        source: sum(m["bytes"] for m in parts if m["source"] == source) / count
        for source, count in buckets.items()
    }


def rounds(
    pending: Iterable[tuple[int, int]], size: Mapping[int, float], most_bytes: float
) -> Iterator[dict[int, list[int]]]:
    """The pending (source, bucket) as {source: buckets}, as many at a time as may be shuffled."""
    wanted: dict[int, list[int]] = {}
    total = 0.0
    for source, bucket in pending:
        if wanted and total + size[source] > most_bytes:
            yield wanted
            wanted, total = {}, 0.0
        wanted.setdefault(source, []).append(bucket)
        total += size[source]
    if wanted:
        yield wanted


def empty_bucket(source: int, bucket: int) -> dict:
    """The marker of a range without rows."""
    return {
        "source": source,
        "bucket": bucket,
        "rows": 0,
        "removed": {"exact": {}, "normalised": {}},
        "languages": {},
    }


def check_duplicates(
    name: str, source: int, parts: Iterable[dict], buckets: Iterable[dict]
) -> None:
    """Raises `RuntimeError` unless rows in = rows out + duplicates, in every language."""
    own = [m for m in buckets if m["source"] == source]
    read = _totals(m["languages"] for m in parts if m["source"] == source)
    kept = _totals({k: v["rows"] for k, v in m["languages"].items()} for m in own)
    removed = _totals(counts for m in own for counts in m["removed"].values())
    for language in sorted({*read, *kept, *removed}):
        pairs, out = read.get(language, 0), kept.get(language, 0)
        duplicates = removed.get(language, 0)
        if pairs != out + duplicates:
            raise RuntimeError(
                f"source {name}, language {language}: {pairs} pairs were read, but {out} were "
                f"kept and {duplicates} are duplicates: rows were lost or doubled"
            )


def place_rows(
    names: Sequence[str], buckets: Collection[dict], sums: Sequence[str], rows_per_shard: int
) -> tuple[list[list[tuple[int, int, int, int]]], list[dict]]:
    """Which shard takes which rows: by source, language and bucket, every shard but the last full.

    Args:
      names: of the sources.
      buckets: markers, in the order of their keys.
      sums: what the groups sum over their rows, of the keys of a bucket's languages.

    Returns:
      For every shard (source, bucket, start, stop) of the rows it takes, and the groups of the
      manifest.
    """
    ranges: list[list[tuple[int, int, int, int]]] = []
    groups = []
    room = row = 0
    for source, name in enumerate(names):
        own = [m for m in buckets if m["source"] == source]
        starts = dict.fromkeys((m["bucket"] for m in own), 0)  # rows that are given away
        for language in sorted({code for m in own for code in m["languages"]}):
            group = {"source": name, "language": language, "start": row, "stop": row}
            group |= dict.fromkeys(sums, 0)
            for marker in own:
                entry = marker["languages"].get(language)
                if entry is None:
                    continue
                for key in sums:
                    group[key] += entry[key]
                left, bucket = entry["rows"], marker["bucket"]
                while left:
                    if not room:
                        ranges.append([])
                        room = rows_per_shard
                    taken = min(room, left)
                    ranges[-1].append((source, bucket, starts[bucket], starts[bucket] + taken))
                    starts[bucket] += taken
                    left, room, row = left - taken, room - taken, row + taken
            group["stop"] = row
            groups.append(group)
    return ranges, groups


def source_counts(
    name: str, source: int, parts: Iterable[dict], buckets: Iterable[dict]
) -> dict[str, int]:
    """The account of a source: its rows, and its negatives that were left out.

    Raises `RuntimeError` unless in = out + quarantine + duplicates.
    """
    read = [m for m in parts if m["source"] == source]
    own = [m for m in buckets if m["source"] == source]
    counts = {
        "in": sum(m["rows"] for m in read),
        "out": sum(entry["rows"] for m in own for entry in m["languages"].values()),
        "quarantine": sum(m["bad"] for m in read),
    }
    for kind in ("exact", "normalised"):
        counts[f"{kind}_duplicates"] = sum(n for m in own for n in m["removed"][kind].values())
    if counts["in"] != sum(value for key, value in counts.items() if key != "in"):
        raise RuntimeError(f"source {name}: rows were lost or doubled: {counts}")
    return counts | {"dropped_negatives": sum(m["dropped_negatives"] for m in read)}


def print_manifest(manifest: dict, output: str) -> None:
    """Tables of a finished preparation: counts per source, and per source and language."""
    console = Console()
    table = Table(title="Rows")
    table.add_column("source")
    columns = ("in", "out", "quarantine", "exact_duplicates", "normalised_duplicates")
    columns += ("dropped_negatives",)
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for name, counts in manifest["about"]["sources"].items():
        table.add_row(name, *(f"{counts[column]:,}" for column in columns))
    console.print(table)
    groups = manifest["groups"]
    unit = "tokens" if groups and "query_tokens" in groups[0] else "characters"
    table = Table(title="Pairs")
    for name in ("source", "language"):
        table.add_column(name)
    for name in ("pairs", f"query {unit}", f"document {unit}", "negatives"):
        table.add_column(name, justify="right")
    for group in groups:
        numbers = (
            group["stop"] - group["start"],
            group[f"query_{unit}"],
            group[f"document_{unit}"],
            group["negatives"],
        )
        table.add_row(group["source"], group["language"], *(f"{n:,}" for n in numbers))
    console.print(table)
    print(
        f"{output}: {manifest['rows']:,} pairs in {len(manifest['languages'])} languages, "
        f"{len(manifest['shards'])} shards, content {manifest['content_hash'][:16]}"
    )


def _totals(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for entry in counts:
        for key, value in entry.items():
            totals[key] = totals.get(key, 0) + value
    return totals
