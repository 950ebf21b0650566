"""What is to be prepared: the sources of a --sources file and the input files they name.

A sources file is JSON: a list of objects, or one object. Keys of a source:

    name         of the source (letters, digits and _): the task name in training
    format       pairs, triplets, texts, mc4, ccnews, miracl, scored, beir ..., see `formats`
    path         a file, a folder (every data file under it), a glob, a list of those, or an object
                 {"de": path, "fr": path} that gives the language of each; any file system of Beam
    language     of all rows: a code such as "en"
    language_field   or: the field of a row that holds its language
    fields       {"query": "title", ...}: other names than the format's own
    qrels        beir only: name of the judgements in qrels/ ("train")
    count, relative  scored and scored_tables only: how many negatives (10), and that they score
                 below `relative` (0.95) times the answer's score, or null, see `scored.choose`
    max_bad_share    for this source, in place of the flag --max_bad_share
"""

import concurrent.futures
import dataclasses
import importlib.util
import json
import re
from pathlib import Path

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.preparation.beam.formats import LAYOUTS
from moe_embed_jax.safe_names import check_name

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".ndjson", ".ndjson.gz")
COLUMNAR = (".parquet", ".arrow", ".feather")
PLAIN = (".txt", ".txt.gz", ".txt.xz")
LANGUAGE = re.compile(r"[A-Za-z0-9]{1,8}([-_][A-Za-z0-9]{1,8})*")
FOLDERS = ("beir", "scored_tables")  # formats of several files that belong together
SCORED = ("scored", "scored_tables")
_LOOKS_AT_ONCE = 16  # at objects of a bucket
_NAME = re.compile(r"[A-Za-z0-9_]{1,100}")
_HELD_OUT = re.compile(r"(^|[/_.-])(test|validation|valid|dev)([/_.-]|$)")


@dataclasses.dataclass(frozen=True)
class Source:
    """A source as the file describes it; `paths` are (language or "", path)."""

    name: str
    format: str
    paths: tuple[tuple[str, str], ...]
    language: str = ""
    language_field: str = ""
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    qrels: str = "train"
    max_bad_share: float | None = None
    count: int = 10
    relative: float | None = 0.95

    def as_dict(self) -> dict:
        """What decides the pairs, as manifests keep it."""
        values = dataclasses.asdict(self)
        if self.format not in SCORED:
            del values["count"], values["relative"]
        return values


@dataclasses.dataclass(frozen=True)
class Part:
    """One input file (for BEIR: folder), the unit of parallel reading."""

    source: int
    path: str
    language: str  # fixed for the file; "": from the row
    size: int


def read_sources(path: str) -> list[Source]:
    """The sources of a file.

    Raises:
      UserError: names the file, the source and the key.
    """
    try:
        content = json.loads(storage.path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--sources={path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--sources={path} is not JSON: {error}") from None
    entries = content if isinstance(content, list) else [content]
    sources = [_source(entry, f"{path}: source {i}") for i, entry in enumerate(entries, start=1)]
    if not sources:
        raise UserError(f"{path}: no source in it")
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two sources are named {name!r}; give each its own name")
    return sources


def _source(entry, where: str) -> Source:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be an object with name, format and path, got {entry!r:.60}")
    known = [field.name for field in dataclasses.fields(Source) if field.name != "paths"]
    for key in entry:
        if key not in (*known, "path"):
            raise UserError(f"{where}: unknown key {key!r:.60}; known: path, {', '.join(known)}")
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"{where}: name={name!r:.60} must be of letters, digits and _")
    where = f"{where} ({name})"
    layout = entry.get("format")
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise UserError(f"{where}: format={layout!r:.60}; choose one of {', '.join(LAYOUTS)}")
    fields = entry.get("fields", {})
    if not isinstance(fields, dict) or not all(isinstance(v, str) for v in fields.values()):
        raise UserError(f"{where}: fields={fields!r:.60} must give field names as strings")
    for role in fields:
        if role not in LAYOUTS[layout].fields:
            roles = ", ".join(LAYOUTS[layout].fields) or "none"
            raise UserError(f"{where}: fields has {role!r:.60}; format {layout} has {roles}")
    paths = _paths(entry.get("path"), where)
    texts = {key: entry.get(key, "") for key in ("language", "language_field")}
    texts["qrels"] = entry.get("qrels", "train")
    for key, value in texts.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: {key}={value!r:.60} must be a string")
    check_name(texts["qrels"], f"{where}: qrels")
    given = [bool(texts["language"]), bool(texts["language_field"]), bool(paths[0][0])]
    if sum(given) != 1:
        raise UserError(
            f"{where}: give its language by exactly one of language (a code), language_field, or "
            "path as an object of languages"
        )
    for code in filter(None, (texts["language"], *(language for language, _ in paths))):
        if not LANGUAGE.fullmatch(code):
            raise UserError(f"{where}: language {code!r:.60} is not a code such as en or zh-Hant")
    scored = {key: entry[key] for key in ("count", "relative") if key in entry}
    if scored and layout not in SCORED:
        raise UserError(f"{where}: {min(scored)} is a key of the formats {' and '.join(SCORED)}")
    count, relative = scored.get("count", 10), scored.get("relative")
    if type(count) is not int or count < 1:
        raise UserError(f"{where}: count={count!r:.60} must be an integer of 1 or more")
    if relative is not None and not (type(relative) in (int, float) and relative > 0):
        raise UserError(f"{where}: relative={relative!r:.60} must be a number above 0, or null")
    share = entry.get("max_bad_share")
    if share is not None and not (
        isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1
    ):
        raise UserError(f"{where}: max_bad_share={share!r} must be from 0 to 1")
    more = {"max_bad_share": share, **texts, **scored}
    return Source(name, layout, paths, fields=dict(fields), **more)


def _paths(value, where: str) -> tuple[tuple[str, str], ...]:
    by_language = value if isinstance(value, dict) else {"": value}
    found = []
    for language, paths in by_language.items():
        for path in paths if isinstance(paths, list) else [paths]:
            if not isinstance(path, str) or not path or min(path) < " ":
                raise UserError(f"{where}: path={path!r:.60} must be a path, a list, or an object")
            found.append((language, path))
    if not found or (isinstance(value, dict) and "" in value):
        raise UserError(f"{where}: path={value!r:.60} names no file, or a language without a code")
    return tuple(found)


def find_parts(sources: list[Source]) -> list[Part]:
    """The input files of all sources, in the order of sources, paths and names.

    Raises:
      UserError: a path matches nothing, a file of an unknown kind, a file named twice.
    """
    parts = []
    for index, source in enumerate(sources):
        seen = set()
        for language, path in source.paths:
            if source.format in FOLDERS:
                found = [(path.rstrip("/"), _folder_size(path, source))]
            else:
                found = _match(path, source)
            for name, size in found:
                if name in seen:
                    raise UserError(f"source {source.name}: {name} is matched by two of its paths")
                seen.add(name)
                parts.append(Part(index, name, language or source.language, size))
    return parts


def _match(path: str, source: Source) -> list[tuple[str, int]]:
    files = list_files(path)
    if not files:  # a folder
        known = (*SUFFIXES, *COLUMNAR, *PLAIN)
        files = [(n, s) for n, s in list_files(f"{path.rstrip('/')}/**") if n.endswith(known)]
        files = [(n, s) for n, s in files if not re.search(r"(dataset_info|state)\.json$", n)]
        held_out = [n for n, _ in files if _HELD_OUT.search(n[len(path.rstrip("/")) :])]
        if held_out and len(held_out) < len(files):
            raise UserError(
                f"source {source.name}: {path} holds training and held-out files "
                f"({held_out[0]}); name the ones to take with a glob"
            )
    if not files:
        raise UserError(f"source {source.name}: no data file matches {path:.300}")
    for name, _ in files:
        if not name.endswith((*SUFFIXES, *COLUMNAR, *PLAIN)):
            raise UserError(
                f"source {source.name}: {name} is of no kind that can be read: "
                f"{', '.join((*SUFFIXES, *COLUMNAR, *PLAIN))}"
            )
    return sorted(files)


def in_bucket(path: str) -> Path | None:
    """A path in a bucket that is read through `storage`; None: through Beam, which can read buckets
    with the extra apache-beam[gcp], as workers of Dataflow have it."""
    if not storage.is_remote(path) or importlib.util.find_spec("google_auth_httplib2"):
        return None
    return storage.path(path)


def _list_bucket(pattern: str) -> list[tuple[str, int]]:
    bucket, _, inside = pattern.removeprefix(storage.SCHEME).partition("/")
    paths = list(storage.path(f"{storage.SCHEME}{bucket}").glob(inside))
    with concurrent.futures.ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        infos = pool.map(lambda path: path.info(), paths)
        found = zip(paths, infos, strict=True)
        return [(str(path), info["size"]) for path, info in found if info["type"] == "file"]


def list_files(pattern: str) -> list[tuple[str, int]]:
    if in_bucket(pattern):
        try:
            return _list_bucket(pattern)
        except OSError as error:
            raise UserError(
                f"path {pattern!r:.200} cannot be looked up: {error.strerror}"
            ) from None
    # Here, so that a mistake in a sources file is reported before Beam is imported.
    from apache_beam.io.filesystem import BeamIOError
    from apache_beam.io.filesystems import FileSystems

    try:
        (result,) = FileSystems.match([pattern])
    except (ValueError, OSError, re.error, BeamIOError) as error:
        raise UserError(f"path {pattern!r:.200} cannot be looked up: {error!s:.200}") from None
    is_local = "://" not in pattern
    return [
        (entry.path, entry.size_in_bytes)
        for entry in result.metadata_list
        if not (is_local and storage.path(entry.path).is_dir())
    ]


def _folder_size(path: str, source: Source) -> int:
    files = list_files(f"{path.rstrip('/')}/**")
    if not files:
        raise UserError(f"source {source.name}: {path:.300} is no folder with files in it")
    return sum(size for _, size in files)
