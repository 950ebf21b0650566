"""JSON that others wrote: whatever is wrong with it is one line that names the file and the key."""

import json
import pathlib

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError

MOST_BYTES = 16 << 20  # of a configuration


def parse_object(content: bytes, name) -> dict:
    """The JSON object in `content`. Raises `UserError` for anything else; `name` is the file."""
    value = parse(content, name)
    if not isinstance(value, dict):
        raise UserError(f"{name} must be a JSON object, not a {type(value).__name__}")
    return value


def parse(content: bytes, name):
    """The JSON value in `content`, UTF-8. Raises `UserError`; `name` is the file."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise UserError(f"{name} is not usable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}") from None


def read_bytes(path: pathlib.Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a file. Raises `UserError`: larger than `most_bytes`, or not readable."""
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise UserError(f"{path} has {size:,} bytes; at most {most_bytes:,} are read")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_object(path: pathlib.Path) -> dict:
    """The JSON object in a file. Raises `UserError`."""
    return parse_object(read_bytes(path), path)


def read_optional(path: pathlib.Path) -> dict:
    """`read_object`; {} if there is no such file."""
    return read_object(path) if storage.has_entry(path) else {}


def printable(words: str, most: int = 60) -> str:
    """`words` of a file for a message: one line, not longer than `most` characters."""
    return "".join(c if c.isprintable() else "?" for c in words[:most])


def is_encodable(text: str) -> bool:
    """False if the text holds half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def whole(config: dict, key: str, where, limit: int, least: int = 1, default: int | None = None):
    """The whole number at `key`, between `least` and `limit`; `default` if the key is absent.

    Raises `UserError` that names the key and the bounds.
    """
    value = config.get(key, default)
    if value is None:
        raise UserError(f"{where}: key {key} is missing")
    if type(value) is not int or not least <= value <= limit:
        raise UserError(
            f"{where}: {key}={value!r:.40} must be a whole number from {least:,} to {limit:,}"
        )
    return value


def real(config: dict, key: str, where, default: float) -> float:
    """The number above 0 and below 1e15 at `key`; `default` if the key is absent."""
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1e15:
        raise UserError(f"{where}: {key}={value!r:.40} must be a number above 0 and below 1e15")
    return float(value)


def flag(config: dict, key: str, where, default: bool = False) -> bool:
    """True or false at `key`; `default` if the key is absent or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{where}: {key}={value!r:.40} must be true or false")
    return default if value is None else value


def text(config: dict, key: str, where, default: str | None = None) -> str | None:
    """The string at `key`; `default` if the key is absent or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {key}={value!r:.40} must be a string")
    if value is not None and not is_encodable(value):
        raise UserError(
            f"{where}: {key}={value!r:.40} has half of a surrogate pair, which no text holds"
        )
    return default if value is None else value
