"""What a data configuration means: its canonical form, its folders, its difference to another.

Everything here is computed from the configuration, the table of pinned wheels or the manifest of a
folder of pairs, and the vocabulary file alone, without TensorFlow and without looking at the data.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from moe_embed_jax import storage
from moe_embed_jax.data.data_config import DataConfig, MaskedDataConfig
from moe_embed_jax.data.pinned_wheels import WHEELS
from moe_embed_jax.errors import UserError
from moe_embed_jax.hashes import canonical_hash
from moe_embed_jax.pairs.manifest import read_manifest
from moe_embed_jax.tokenizers.settings import effective_bytes

# Raise when the same pairs start to give other tokens (vocabulary recipe, tasks, record format).
PREPARATION_VERSION = 1
STATISTICS = "statistics.json"  # in a token store; those of earlier versions say nothing of cuts
CUT_TEXTS = {"query": "queries", "document": "documents", "negatives": "hard negatives"}
# The builder's own, repeated because its module belongs to preparation; a test holds them together.
BUILDER_VERSION = "1.0.0"
# Mixture -> task -> the builder config that stores its rows.
MIXTURES: dict[str, dict[str, str]] = {
    "package_texts": {
        "translations": "home_assistant",
        "descriptions": "home_assistant",
        "aws_api": "aws_api",
        "google_api": "google_api",
    }
}
# Documents for masked language modelling -> task -> the builder config that stores them.
DOCUMENTS: dict[str, dict[str, str]] = {
    "package_documents": {
        "interface_texts": "interface_texts",
        "aws_reference": "aws_reference",
        "google_reference": "google_reference",
    }
}
# What decides a token store, of the data of a run. A vocabulary is always given.
PAIR_KEYS = ("mixture", "query_length", "document_length", "rates", "pairs")
DOCUMENT_KEYS = ("documents", "texts")
_VOCABULARY_KEYS = {"train": "size", "file": "path"}


def source_checksums() -> dict[str, str]:
    """File name -> SHA-256 of everything the pairs are made from."""
    return {wheel.file_name: wheel.sha256 for wheel in WHEELS.values()}


def complete_config(config: Mapping) -> dict:
    """`config` with the defaults of `DataConfig`, or of `MaskedDataConfig` if it has the key
    `documents`, which stands for masked language modelling.

    The keys are `PAIR_KEYS` or `DOCUMENT_KEYS`, and `vocabulary`: `{"kind": "train", "size": ids}`
    or `{"kind": "file", "path": FILE}`, a SentencePiece model or a tokenizer.json.

    Raises:
      UserError: unknown key or a value of the wrong kind; names it.
    """
    cls, keys = (DataConfig, PAIR_KEYS)
    if "documents" in config:
        cls, keys = (MaskedDataConfig, DOCUMENT_KEYS)
    for key in config:
        if key not in (*keys, "vocabulary"):
            known = ", ".join(("vocabulary", *keys))
            raise UserError(f"data config: unknown key {key!r}; known: {known}")
    complete = {key: config.get(key, getattr(cls, key)) for key in keys}
    complete = _checked_documents(complete) if "documents" in complete else _checked_pairs(complete)
    return complete | {"vocabulary": _checked_vocabulary(config.get("vocabulary"))}


def _checked_pairs(complete: dict) -> dict:
    for key in ("query_length", "document_length"):
        _check_positive(key, complete[key])
    if (rates := complete["rates"]) is not None:
        try:
            complete["rates"] = {task: float(rate) for task, rate in rates.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"data config: rates={rates!r} must be null or task names with numbers"
            ) from error
    complete["pairs"] = _checked_path("pairs", complete["pairs"])
    if complete["pairs"]:
        check_rates(complete["rates"], pair_sources(complete["pairs"]), complete["pairs"])
    else:
        chosen_tasks(complete["mixture"], complete["rates"])
    return complete


def _checked_vocabulary(vocabulary) -> dict:
    kind = vocabulary.get("kind") if isinstance(vocabulary, Mapping) else None
    if kind not in _VOCABULARY_KEYS or set(vocabulary) != {"kind", _VOCABULARY_KEYS[kind]}:
        raise UserError(
            f'data config: vocabulary={vocabulary!r} must be {{"kind": "train", "size": N}} or '
            '{"kind": "file", "path": FILE}'
        )
    if kind == "train":
        _check_positive("vocabulary.size", vocabulary["size"])
    return dict(vocabulary)


def _checked_documents(complete: dict) -> dict:
    complete["texts"] = _checked_path("texts", complete["texts"])
    if not complete["texts"] and complete["documents"] not in DOCUMENTS:
        raise UserError(
            f"unknown documents {complete['documents']!r}; known: {', '.join(DOCUMENTS)}"
        )
    return complete


def _checked_path(key: str, value: object) -> str:
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"data config: {key}={value!r} must be the path of a folder")
    return str(value)


def _check_positive(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"data config: {key}={value!r} must be an integer of 1 or more")


def chosen_tasks(mixture: str, rates: Mapping[str, float] | None) -> dict[str, str]:
    """Task -> builder config of those tasks of `mixture` that `rates` names (None: all).

    Raises:
      UserError: unknown mixture or task, no task, or a rate that is not positive.
    """
    if mixture not in MIXTURES:
        raise UserError(f"unknown mixture {mixture!r}; known: {', '.join(MIXTURES)}")
    tasks = MIXTURES[mixture]
    check_rates(rates, list(tasks), mixture)
    return {task: config for task, config in tasks.items() if rates is None or task in rates}


def pair_sources(folder: str | os.PathLike) -> list[str]:
    """The sources of a prepared folder of pairs, in the order of its rows."""
    groups = read_manifest(storage.path(folder))["groups"]
    return list(dict.fromkeys(group["source"] for group in groups))


def check_rates(rates: Mapping[str, float] | None, tasks: list[str], name: str) -> None:
    """Raises `UserError` for an unknown task, no task at all, or a rate that is not positive."""
    if rates is None:
        return
    for task, rate in rates.items():
        if task not in tasks:
            raise UserError(f"rates: unknown task {task!r}; {name} has {', '.join(tasks)}")
        if not 0 < rate < float("inf"):
            raise UserError(f"rates: {task} has rate {rate}; leave it out to exclude it")
    if not rates:
        raise UserError(f"rates: name at least one task of {name}: {', '.join(tasks)}")


def vocabulary_path(config: Mapping, data_dir: str | os.PathLike) -> Path:
    """Where the vocabulary of `config` lies, or will lie once prepared: a SentencePiece model, or
    the tokenizer.json that the config names."""
    complete = complete_config(config)
    is_json = str(complete["vocabulary"].get("path", "")).endswith(".json")
    key = canonical_hash(_vocabulary_key(complete))
    name = "tokenizer.json" if is_json else "sentencepiece.model"
    return storage.path(data_dir) / "vocabulary" / key[:16] / name


def planned_store_path(config: Mapping, data_dir: str | os.PathLike) -> Path:
    """Where the token store of `config` lies, or will lie once prepared.

    Raises:
      UserError: bad config, or the file of a `{"kind": "file"}` vocabulary does not exist.
    """
    complete = complete_config(config)
    key = {**complete, "vocabulary": _vocabulary_key(complete), **_origin(complete)}
    del key[_unused(complete)]
    return storage.path(data_dir) / "tokens" / canonical_hash(key)[:16]


def _unused(complete: dict) -> str:
    """The key that says nothing: a folder takes the place of the default data, or is not there."""
    default, folder = ("documents", "texts") if "documents" in complete else ("mixture", "pairs")
    return default if complete[folder] else folder


def held_out_path(config: Mapping, data_dir: str | os.PathLike) -> Path:
    """Where the held-out documents of a `documents` config lie, or will lie once prepared."""
    complete = complete_config(config)
    name = "texts" if complete["texts"] else complete["documents"]
    return storage.path(data_dir) / "held_out" / f"{name}-{canonical_hash(_origin(complete))[:16]}"


def token_store_path(config: Mapping, data_dir: str | os.PathLike) -> Path | None:
    """The folder of the prepared token store of `config`, or None if there is none yet."""
    path = planned_store_path(config, data_dir)
    return path if storage.has_entry(path / "spec.json") else None


def _vocabulary_key(complete: dict) -> dict:
    vocabulary = complete["vocabulary"]
    if vocabulary["kind"] == "file":
        path = storage.path(vocabulary["path"])
        if not path.is_file():
            raise UserError(f"data config: vocabulary file {path} does not exist")
        content = effective_bytes(path) if path.suffix == ".json" else path.read_bytes()
        return {"kind": "file", "sha256": hashlib.sha256(content).hexdigest()}
    # Trained on all tasks of the mixture, so that runs with other rates share it.
    key = {**vocabulary, **_origin(complete)}
    default = "documents" if "documents" in complete else "mixture"
    return key if _unused(complete) == default else key | {default: complete[default]}


def _origin(complete: dict) -> dict:
    """What the texts are: the content of a folder of pairs, or the pinned wheels."""
    for key in ("pairs", "texts"):
        if complete.get(key):
            content = read_manifest(storage.path(complete[key]))["content_hash"]
            return {key: content, "versions": [PREPARATION_VERSION]}
    return {"sources": source_checksums(), "versions": [PREPARATION_VERSION, BUILDER_VERSION]}


def describe_spec_difference(old: Mapping, new: Mapping) -> str:
    """One line that names every key in which two `spec.json` differ, with the old and new value.

    Groups are summarised by number and rows, and checksums shortened. "" if the specs are equal.
    """
    before, after = _flatten(old), _flatten(new)
    parts = []
    for key in sorted({*before, *after} - {"hash"}):
        left, right = before.get(key, "absent"), after.get(key, "absent")
        if left != right:
            parts.append(f"{key}: {left} -> {right}")
    if old.get("groups") != new.get("groups"):
        parts.append("groups: " + _describe_groups(old.get("groups", []), new.get("groups", [])))
    return "; ".join(parts)


def _flatten(spec: Mapping, prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in spec.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        elif key != "groups" or prefix:
            text = value if isinstance(value, str) else json.dumps(value)
            is_checksum = len(text) == 64 and not set(text) - set("0123456789abcdef")
            flat[prefix + key] = text[:12] if is_checksum else text
    return flat


def _describe_groups(old: list[dict], new: list[dict]) -> str:
    def index(groups: list[dict]) -> dict[str, tuple[int, float]]:
        return {
            f"{group['task']}/{group['language']}": (
                group["stop"] - group["start"],
                group["rate"],
            )
            for group in groups
        }

    before, after = index(old), index(new)
    changed = [
        f"{name} {_describe_group(before.get(name))} -> {_describe_group(after.get(name))}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    if not changed:
        return "in another order"
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return (
        f"{len(old)} groups with {sum(rows for rows, _ in before.values())} rows -> "
        f"{len(new)} with {sum(rows for rows, _ in after.values())} "
        f"({', '.join(changed[:3])}{more})"
    )


def _describe_group(group: tuple[int, float] | None) -> str:
    return "absent" if group is None else f"{group[0]} rows at rate {group[1]:g}"
