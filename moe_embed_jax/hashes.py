"""Hashes that stand for contents: of JSON values and of files."""

import hashlib
import json
import os

from moe_embed_jax import storage

_HASHED_AT_ONCE = 1 << 20


def canonical_hash(value: dict) -> str:
    """SHA-256 of `value` as JSON with sorted keys and no spaces, hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with storage.path(path).open("rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
