"""What a preparation says at its end: counts per source, and per source and language."""

from rich.console import Console
from rich.table import Table


def print_manifest(manifest: dict, output: str, console: Console | None = None) -> None:
    console = console or Console()
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
