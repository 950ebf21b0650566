"""manifest.json of a prepared folder of pairs: what stands in it, and what stands for its rows.

{"format", "rows", "languages", "groups": [{"source", "language", "start", "stop", sums}],
 "shards": [{"file", "lengths", "rows", "bytes", "sha256", "lengths_sha256"}],
 "about": where the pairs come from, "content_hash"}
"""

import json
from pathlib import Path

from moe_embed_jax.data.hashes import canonical_hash
from moe_embed_jax.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"


def manifest_text(manifest: dict) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def content_hash(groups: list[dict], shards: list[dict]) -> str:
    """SHA-256 that stands for every row and its place."""
    ranges = [[g["source"], g["language"], g["start"], g["stop"]] for g in groups]
    files = [[shard["rows"], shard["sha256"]] for shard in shards]
    return canonical_hash({"format": FORMAT, "groups": ranges, "shards": files})


def read_manifest(folder: Path) -> dict:
    """manifest.json of a prepared folder, checked against its own hash.

    Raises:
      UserError: missing, of another format, or changed; names the file.
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
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {manifest.get('format')}, this version reads {FORMAT}: {remedy}"
            )
        actual = content_hash(manifest["groups"], manifest["shards"])
        claimed = manifest["content_hash"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a manifest of pairs ({error!r}): {remedy}") from error
    if actual != claimed:
        raise UserError(f"{path} was changed after it was written: {remedy}")
    return manifest
