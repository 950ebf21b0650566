"""manifest.json of a prepared folder of pairs: what stands in it, and what stands for its rows.

{"format", "rows", "languages", "groups": [{"source", "language", "start", "stop", sums}],
 "shards": [{"file", "lengths", "rows", "bytes", "sha256", "lengths_sha256"}],
 "about": where the pairs come from, "content_hash",
 "metadata": {file of TFDS: its SHA-256}, "hash": of all the others}

A shard with rows that have scores says how many, as "scored"; "format" is then 2.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from moe_embed_jax.errors import UserError
from moe_embed_jax.hashes import canonical_hash
from moe_embed_jax.pairs.row import PairRow
from moe_embed_jax.safe_names import check_name, path_inside

FORMAT, SCORED_FORMAT = 1, 2
MANIFEST = "manifest.json"
NAME = "pairs"
SPLIT = "train"
PREFIX = f"{NAME}-{SPLIT}"
# Columns of the lengths index: characters of query and document, number of negatives.
LENGTHS = ("query_characters", "document_characters", "negatives")
SHARD_SUMS = ("sha256", "lengths_sha256")


def manifest_text(manifest: dict) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def sealed(manifest: dict, metadata: dict[str, str]) -> dict:
    """`manifest` with the hashes of TFDS's files and, last, its own."""
    manifest = manifest | {"metadata": metadata}
    return manifest | {"hash": canonical_hash(manifest)}


def content_hash(groups: list[dict], shards: list[dict]) -> str:
    """SHA-256 that stands for every row and its place."""
    ranges = [[g["source"], g["language"], g["start"], g["stop"]] for g in groups]
    files = [[shard["rows"], shard["sha256"]] for shard in shards]
    return canonical_hash({"format": format_of(shards), "groups": ranges, "shards": files})


def format_of(shards: list[dict]) -> int:
    """The format of a folder with these shards: earlier versions do not read scores."""
    return SCORED_FORMAT if any(shard.get("scored") for shard in shards) else FORMAT


def read_manifest(folder: Path) -> dict:
    """manifest.json of a prepared folder, checked against its own hash.

    Raises:
      UserError: missing, of another format, changed, or with a name that leads out of the folder;
        names the file.
    """
    path = folder / MANIFEST
    remedy = "prepare the pairs again"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: {folder} is not a prepared folder of pairs; "
            "make one with launch/prepare.py"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest.get("format") not in (FORMAT, SCORED_FORMAT):
            found = f"{manifest.get('format')!r:.40}"
            raise UserError(
                f"{path} has format {found}, this version reads {FORMAT} and {SCORED_FORMAT}: "
                f"{remedy}"
            )
        actual = content_hash(manifest["groups"], manifest["shards"])
        claimed = manifest["content_hash"]
        _check(manifest, folder)
        if "hash" in manifest:  # earlier versions wrote none
            whole = {key: value for key, value in manifest.items() if key != "hash"}
            actual, claimed = (actual, canonical_hash(whole)), (claimed, manifest["hash"])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a manifest of pairs ({error!r:.200}): {remedy}") from error
    if actual != claimed:
        raise UserError(f"{path} was changed after it was written: {remedy}")
    return manifest


def _check(manifest: dict, folder: Path) -> None:
    """Raises `UserError` or `ValueError` unless everything that readers take from it has its type
    and its range."""
    rows = 0
    for number, group in enumerate(manifest["groups"]):
        where = f"{folder / MANIFEST}: groups[{number}]"
        for key in ("source", "language"):
            check_name(group[key], f"{where}.{key}")
        start, stop = _count(group["start"]), _count(group["stop"])
        if start != rows or stop < start:
            raise ValueError(f"groups[{number}] has rows {start} to {stop}, after {rows}")
        rows = stop
    for name in manifest.get("metadata", {}):
        path_inside(folder, name, f"{folder / MANIFEST}: metadata")
    shard_rows = 0
    for number, shard in enumerate(manifest["shards"]):
        for key in ("file", "lengths"):
            path_inside(folder, shard[key], f"{folder / MANIFEST}: shards[{number}].{key}")
        for key in SHARD_SUMS:
            if not isinstance(shard[key], str):
                raise ValueError(f"shards[{number}].{key} is no text")
        shard_rows += _count(shard["rows"])
        _count(shard.get("scored", 0))
    if not rows == shard_rows == _count(manifest["rows"]):
        raise ValueError(
            f"groups have {rows} rows, shards {shard_rows}: {manifest['rows']} claimed"
        )
    if not isinstance(manifest["about"], dict):
        raise ValueError("about is no object")


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r:.40} is no number of rows")
    return value


def shard_name(index: int, shards: int) -> str:
    return f"{PREFIX}.array_record-{index:05d}-of-{shards:05d}"


def lengths_name(index: int, shards: int) -> str:
    return f"lengths-{index:05d}-of-{shards:05d}.npy"


def empty_group(source: str, language: str, start: int) -> dict:
    """The manifest's entry of a group that begins at row `start`."""
    sums = dict.fromkeys(LENGTHS, 0)
    return {"source": source, "language": language, "start": start, "stop": start, **sums}


def count_row(group: dict, row: PairRow) -> None:
    """Counts a row in the entry of its group."""
    group["stop"] += 1
    for name, value in zip(
        LENGTHS, (len(row.query), len(row.document), len(row.negatives)), strict=True
    ):
        group[name] += value


def make_manifest(shards: Iterable[dict], groups: Iterable[dict], about: dict) -> dict:
    """The content of manifest.json.

    Args:
      shards: entries of `ShardWriter.finish`, in the order of the rows.
      groups: source, language, start, stop and sums over the rows; they cover all rows in order.
      about: where the pairs come from; no part of the content hash, which stands for the rows.

    Raises `RuntimeError` if the groups and the shards do not hold the same rows.
    """
    shards, groups = list(shards), list(groups)
    rows = sum(shard["rows"] for shard in shards)
    stops = [0, *(group["stop"] for group in groups)]
    if [group["start"] for group in groups] != stops[:-1] or stops[-1] != rows:
        raise RuntimeError(f"the groups end at row {stops[-1]} of {rows}, or are not in order")
    names = [(shard_name(i, len(shards)), lengths_name(i, len(shards))) for i in range(len(shards))]
    entries = [
        {"file": name, "lengths": lengths, **shard}
        for (name, lengths), shard in zip(names, shards, strict=True)
    ]
    return {
        "format": format_of(entries),
        "rows": rows,
        "languages": sorted({group["language"] for group in groups}),
        "groups": groups,
        "shards": entries,
        "about": about,
        "content_hash": content_hash(groups, entries),
    }
