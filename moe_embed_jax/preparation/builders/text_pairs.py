"""Pairs of texts as the wheel parsers give them, and an account of everything they left out."""

import collections
import gzip
import json
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from moe_embed_jax.json_file import is_encodable

# progress(stage, done, total)
ProgressReport = Callable[[str, int, int], None]

_EXAMPLES_PER_PROBLEM = 20


class Pair(NamedTuple):
    """One (query, document) with what decides on which side of the hold-out it falls.

    `english` are the English source strings it was made from; `language` is the document's.
    """

    query: str
    document: str
    source: str
    language: str
    english: tuple[str, ...]


class ParseReport:
    """What a parser did not turn into a pair.

    `problems` are defects of the wheel, counted and (the first 20) named by member and place;
    `dropped` are ordinary exclusions by the cleaning rules, counted.
    """

    def __init__(self, wheel: str):
        self.wheel = wheel
        self.dropped: collections.Counter[str] = collections.Counter()
        self._problem_count: collections.Counter[str] = collections.Counter()
        self._problem_examples: dict[str, list[str]] = collections.defaultdict(list)

    def problem(self, kind: str, member: str, place: str = "") -> None:
        self._problem_count[kind] += 1
        if len(self._problem_examples[kind]) < _EXAMPLES_PER_PROBLEM:
            where = f"{self.wheel}: {member}" + (f": {place}" if place else "")
            self._problem_examples[kind].append(where)

    def as_dict(self) -> dict:
        problems = {
            kind: {"count": count, "first": self._problem_examples[kind]}
            for kind, count in sorted(self._problem_count.items())
        }
        return {"problems": problems, "dropped": dict(sorted(self.dropped.items()))}


class PairCollector:
    """Collects the distinct pairs of one source; of equal pairs the first stays.

    A later equal pair still adds its English strings to the first: the pair must not be in the test
    set while one of its origins is in the training set.
    """

    def __init__(self, source: str, report: ParseReport, min_query: int, min_document: int):
        self._source = source
        self._report = report
        self._min_query = min_query
        self._min_document = min_document
        self._pairs: dict[tuple[str, str], Pair] = {}

    def add(
        self,
        query: str,
        document: str,
        language: str,
        english: tuple[str, ...],
        member: str,
        place: str,
    ) -> bool:
        """Adds a pair of cleaned texts unless a rule excludes it; says whether it now is in."""
        if len(query) < self._min_query or len(document) < self._min_document:
            return self._drop("too_short")
        if query == document:
            return self._drop("query_is_document")
        if not (is_prose(query) and is_prose(document)):
            return self._drop("placeholder_only")
        if not (is_encodable(query) and is_encodable(document)):
            self._report.problem("invalid_unicode", member, place)
            return False
        known = self._pairs.get((query, document))
        if known:
            self._report.dropped[f"{self._source}_duplicate"] += 1
            english = tuple(dict.fromkeys(known.english + english))
            self._pairs[query, document] = known._replace(english=english)
        else:
            self._pairs[query, document] = Pair(query, document, self._source, language, english)
        return True

    def _drop(self, reason: str) -> bool:
        self._report.dropped[f"{self._source}_{reason}"] += 1
        return False

    def pairs(self) -> list[Pair]:
        return list(self._pairs.values())


def clean_text(text: str) -> str:
    """Stripped, every run of white space one space."""
    return " ".join(text.split())


def is_prose(text: str) -> bool:
    """False for translation key references (`[%key:...%]`) and texts that are all placeholders."""
    if "[%" in text:
        return False
    if "{" not in text:
        return any(map(str.isalpha, text))
    depth = 0
    for character in text:
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        elif depth <= 0 and character.isalpha():
            return True
    return False


def read_json_object(archive: zipfile.ZipFile, member: str, report: ParseReport) -> dict[str, Any]:
    """The JSON object in a member (.json or .json.gz); empty, and a problem noted, if it is bad."""
    try:
        raw = archive.read(member)
        if member.endswith(".gz"):
            raw = gzip.decompress(raw)
        content = json.loads(raw.decode("utf-8-sig"))
    except (zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile) as error:
        report.problem("damaged_member", member, str(error))
    except UnicodeDecodeError as error:
        report.problem("invalid_utf8", member, f"byte {error.start}")
    except (json.JSONDecodeError, RecursionError) as error:
        report.problem("invalid_json", member, str(error))
    else:
        if isinstance(content, dict):
            return content
        report.problem("not_an_object", member, type(content).__name__)
    return {}
