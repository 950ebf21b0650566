"""Pairs from API descriptions: the readable name of an operation or field -> its documentation.

AWS: `botocore/data/<service>/<date>/service-2.json[.gz]`, HTML documentation.
Google: `googleapiclient/discovery_cache/documents/<api>.<version>.json`, plain text.
Of several versions of a service only the newest is read. Fields of the same kind share their
documentation word for word across services, so each documentation text is used once, for the first
name in order: a query then has one right answer.
"""

import html
import re
import zipfile
from collections.abc import Iterator
from typing import Any

from moe_embed_jax.preparation.builders.text_pairs import (
    Pair,
    PairCollector,
    ParseReport,
    ProgressReport,
    clean_text,
    read_json_object,
)

_MIN_QUERY = 8
_MIN_DOCUMENTATION = 60  # below: "The ARN of the resource." and its likes, which tell nothing apart

_AWS_MEMBER = re.compile(r"botocore/data/([^/]+)/([^/]+)/service-2\.json(?:\.gz)?")
_GOOGLE_MEMBER = re.compile(r"googleapiclient/discovery_cache/documents/([^/]+)\.json")
_VERSION = re.compile(r"v(\d+)(?:[._](\d+))?(?:p(\d+))?(?:(alpha|eap|beta)(\d*))?")
_STAGES = {"alpha": 0, "eap": 0, "beta": 1, None: 2}

# Inline elements stand inside a sentence (`<code>x</code>.`): no space may appear in their place.
_INLINE_TAG = re.compile(r"</?(?:a|b|code|em|i|span|strong|sub|sup|tt|u)(?:\s[^>]*)?/?>", re.I)
_TAG = re.compile(r"<!--.*?-->|</?[a-zA-Z][^>]*>", re.S)
_WORD_BOUNDARY = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_.$\-]+")


def parse_aws(
    archive: zipfile.ZipFile, report: ParseReport, progress: ProgressReport = lambda *_: None
) -> list[Pair]:
    """Distinct pairs of source `aws_api`: operations, then members of shapes."""
    members = newest_aws(archive)
    collector = _DocumentationCollector("aws_api", report)
    for done, member in enumerate(members, 1):
        service = read_json_object(archive, member, report)
        title = _object(service, "metadata").get("serviceFullName") or member.split("/")[2]
        for name, operation in records(service, "operations", member, report):
            collector.add((title, name), operation, "documentation", member, f"operations.{name}")
        for shape_name, shape in records(service, "shapes", member, report):
            for name, field in records(shape, "members", member, report):
                place = f"shapes.{shape_name}.members.{name}"
                collector.add((title, shape_name, name), field, "documentation", member, place)
        progress("parse", done, len(members))
    return collector.pairs()


def parse_google(
    archive: zipfile.ZipFile, report: ParseReport, progress: ProgressReport = lambda *_: None
) -> list[Pair]:
    """Distinct pairs of source `google_api`: schemas and their fields, methods, parameters."""
    members = newest_google(archive)
    collector = _DocumentationCollector("google_api", report)
    for done, member in enumerate(members, 1):
        api = read_json_object(archive, member, report)
        title = api.get("title") or member.rsplit("/", 1)[1].split(".")[0]
        for name, schema in records(api, "schemas", member, report):
            for path, node in schema_nodes(schema, (name,), member, report):
                collector.add((title, *path), node, "description", member, ".".join(path))
        for path, node in resource_nodes(api, (), member, report):
            collector.add((title, *path), node, "description", member, ".".join(path))
        progress("parse", done, len(members))
    return collector.pairs()


def strip_html(text: str) -> str:
    """Text without tags and character references."""
    return html.unescape(_TAG.sub(" ", _INLINE_TAG.sub("", text)))


def words_of_identifier(name: str) -> str:
    """`getIamPolicy` -> `get Iam Policy`, `VPCId` -> `VPC Id`, `max_results` -> `max results`."""
    return clean_text(_WORD_BOUNDARY.sub(" ", name))


class _DocumentationCollector:
    def __init__(self, source: str, report: ParseReport):
        self._source = source
        self._report = report
        self._pairs = PairCollector(source, report, _MIN_QUERY, _MIN_DOCUMENTATION)
        self._used: set[str] = set()

    def add(self, names: tuple, record: dict, key: str, member: str, place: str) -> None:
        if key not in record:
            self._report.dropped[f"{self._source}_without_documentation"] += 1
            return
        documentation = record[key]
        if not isinstance(documentation, str):
            self._report.problem("not_text", member, place)
            return
        document = clean_text(strip_html(documentation))
        if not document:
            self._report.problem("empty_text", member, place)
            return
        if document in self._used:
            self._report.dropped[f"{self._source}_same_documentation"] += 1
            return
        title, *identifiers = names
        query = clean_text(" ".join([str(title), *map(words_of_identifier, identifiers)]))
        if self._pairs.add(query, document, "en", (query, document), member, place):
            self._used.add(document)

    def pairs(self) -> list[Pair]:
        return self._pairs.pairs()


def newest_aws(archive: zipfile.ZipFile) -> list[str]:
    newest: dict[str, tuple[str, str]] = {}
    for member in archive.namelist():
        if match := _AWS_MEMBER.fullmatch(member):
            service, date = match.groups()
            newest[service] = max(newest.get(service, ("", "")), (date, member))
    return [newest[service][1] for service in sorted(newest)]


def newest_google(archive: zipfile.ZipFile) -> list[str]:
    """`admin.directory_v1` is another API than `admin.reports_v1`, but newer than `directoryv0`."""
    newest: dict[tuple[str, str], tuple[tuple, str]] = {}
    for member in archive.namelist():
        if match := _GOOGLE_MEMBER.fullmatch(member):
            api, _, version = match[1].partition(".")
            number = _VERSION.search(version)
            part = version[: number.start()].rstrip("_") if number else version
            entry = (_version_order(number), member)
            newest[api, part] = max(newest.get((api, part), entry), entry)
    return [newest[key][1] for key in sorted(newest)]


def _version_order(number: re.Match | None) -> tuple[int, ...]:
    if number is None:
        return ()
    major, minor, point, stage, revision = number.groups()
    return (int(major), int(minor or 0), int(point or 0), _STAGES[stage], int(revision or 0))


def _object(node: dict, key: str) -> dict:
    value = node.get(key)
    return value if isinstance(value, dict) else {}


def records(
    node: dict, key: str, member: str, report: ParseReport
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The named records under `key`; what is not an object is noted as a problem."""
    found = node.get(key, {})
    if not isinstance(found, dict):
        report.problem("not_an_object", member, key)
        return
    for name, record in found.items():
        if isinstance(record, dict):
            yield name, record
        else:
            report.problem("not_an_object", member, f"{key}.{name}")


def schema_nodes(
    schema: dict, path: tuple[str, ...], member: str, report: ParseReport
) -> Iterator[tuple[tuple[str, ...], dict]]:
    """The schema and all fields nested in it; element types of arrays and maps add no name."""
    yield path, schema
    for name, field in records(schema, "properties", member, report):
        yield from schema_nodes(field, (*path, name), member, report)
    for key in ("items", "additionalProperties"):
        element = schema.get(key)
        if isinstance(element, dict) and element.get("properties"):
            yield from schema_nodes(element, path, member, report)


def resource_nodes(
    node: dict, path: tuple[str, ...], member: str, report: ParseReport
) -> Iterator[tuple[tuple[str, ...], dict]]:
    """All methods and their parameters of the resources under `node`."""
    for name, resource in records(node, "resources", member, report):
        for method_name, method in records(resource, "methods", member, report):
            method_path = (*path, name, method_name)
            yield method_path, method
            for parameter_name, parameter in records(method, "parameters", member, report):
                yield (*method_path, parameter_name), parameter
        yield from resource_nodes(resource, (*path, name), member, report)
