"""Statistics of prepared texts: computed once, stored beside the data, shown as tables."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_embed_jax import json_file, storage
from moe_embed_jax.checksums import take_own, with_own
from moe_embed_jax.errors import UserError
from moe_embed_jax.preparation.builders.text_pairs import Pair

FILE_NAME = "statistics.json"
_QUANTILES = (5, 25, 50, 75, 95, 100)


def describe_pairs(train: Sequence[Pair], test: Sequence[Pair]) -> dict[str, dict]:
    """By source: pairs and languages per split, characters per text at some quantiles (percent)."""
    description = {}
    for source in sorted({pair.source for pair in (*train, *test)}):
        splits = {
            name: [pair for pair in pairs if pair.source == source]
            for name, pairs in (("train", train), ("test", test))
        }
        pairs = [pair for split in splits.values() for pair in split]
        description[source] = {
            "pairs": {name: len(split) for name, split in splits.items()},
            "languages": {
                name: len({pair.language for pair in split}) for name, split in splits.items()
            },
            "query_characters": _quantiles([len(pair.query) for pair in pairs]),
            "document_characters": _quantiles([len(pair.document) for pair in pairs]),
        }
    return description


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    values = np.percentile(lengths, _QUANTILES, method="nearest")
    return {str(q): int(value) for q, value in zip(_QUANTILES, values, strict=True)}


def read_section(data_dir: str | Path, name: str) -> dict | None:
    """One section of data_dir/statistics.json; None if there is none."""
    return read_json(storage.path(data_dir) / FILE_NAME).get(name)


def store_section(data_dir: str | Path, name: str, section: dict) -> None:
    """Sets one section of data_dir/statistics.json and keeps the others."""
    path = storage.path(data_dir) / FILE_NAME
    write_json(path, {**read_json(path), name: section})


def read_json(path: Path) -> dict:
    """The JSON object in a file of ours or of TFDS; empty if the file is missing.

    Raises `UserError` for a damaged file. TFDS writes no checksum, nor did earlier versions.
    """
    try:
        content = json_file.read_optional(path)
    except UserError as error:
        raise UserError(f"{error}; delete it and run again") from None
    if take_own(content) is False:
        raise UserError(f"{path} is damaged (its CRC-32 differs); delete it and run again")
    return content


def write_json(path: Path, content: dict) -> None:
    """Atomic: a reader sees the old file or the new one."""
    storage.write(path, json.dumps(with_own(content), ensure_ascii=False, indent=1) + "\n")


def print_package_texts(section: dict) -> None:
    """Tables of the section that `package_texts.prepare` returns."""
    console = Console()
    table = Table(title="Prepared text pairs")
    table.add_column("source")
    for heading in ("train", "test", "languages", "English strings", "held out"):
        table.add_column(heading, justify="right")
    lengths = Table(
        title="Characters per text: quantiles " + " / ".join(map(str, _QUANTILES)) + " %"
    )
    for heading in ("source", "query", "document"):
        lengths.add_column(heading)
    for source, entry in section["sources"].items():
        held_out = entry["held_out"]
        table.add_row(
            source,
            f"{entry['pairs']['train']:,}",
            f"{entry['pairs']['test']:,}",
            f"{entry['languages']['train']}",
            f"{held_out['english_strings']:,}",
            f"{held_out['english_strings_share']:.1%}",
        )
        lengths.add_row(
            source,
            " / ".join(str(n) for n in entry["query_characters"].values()),
            " / ".join(str(n) for n in entry["document_characters"].values()),
        )
    pairs = section["pairs"]
    table.add_row("all", f"{pairs['train']:,}", f"{pairs['test']:,}", f"{section['languages']}")
    console.print(table)
    console.print(lengths)
    for config, entry in section["configs"].items():
        for kind, problem in entry["problems"].items():
            console.print(
                f"{config}: {problem['count']:,} x {kind}, first: {problem['first'][0]}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
