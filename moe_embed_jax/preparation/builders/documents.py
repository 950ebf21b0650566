"""Whole documents out of the pinned wheels, for masked language modelling.

A document is a pair (title, text), so that what stores pairs stores documents. What belongs to one
component of Home Assistant, in whatever language, or to one API is held out together: their name is
the "English string" by which holdout.py decides.

    interface_texts    all strings of a component's translations file, one per line, per language
    aws_reference      an operation with its input and output, or another shape: what is said of it
    google_reference   a schema with its fields, or a resource with its methods and parameters
"""

import itertools
import zipfile
from collections.abc import Iterable

from moe_embed_jax.json_file import is_encodable
from moe_embed_jax.preparation.builders import api_documentation, home_assistant
from moe_embed_jax.preparation.builders.api_documentation import strip_html, words_of_identifier
from moe_embed_jax.preparation.builders.text_pairs import (
    Pair,
    ParseReport,
    ProgressReport,
    clean_text,
    is_prose,
    read_json_object,
)

_MIN_CHARACTERS = 200  # below: a label or two


def parse_home_assistant(
    archive: zipfile.ZipFile, report: ParseReport, progress: ProgressReport = lambda *_: None
) -> list[Pair]:
    """One document per component and language; a string that was left in English is left out."""
    components = home_assistant.members_by_component(archive)
    documents = _Documents("interface_texts", report)
    for done, (component, members) in enumerate(components.items(), 1):
        english = {}
        if "en" in members:
            english = home_assistant.strings_of(archive, members["en"], report)
        for language, member in members.items():
            strings = english
            if language != "en":
                found = home_assistant.strings_of(archive, member, report)
                strings = {key: text for key, text in found.items() if english.get(key) != text}
            lines = (text for text in strings.values() if is_prose(text))
            documents.add(words_of_identifier(component), lines, language, component, member)
        progress("parse", done, len(components))
    return documents.pairs


def parse_aws(
    archive: zipfile.ZipFile, report: ParseReport, progress: ProgressReport = lambda *_: None
) -> list[Pair]:
    """One document per operation and per shape; of equal paragraphs of all APIs the first stays."""
    members = api_documentation.newest_aws(archive)
    documents = _Documents("aws_reference", report)
    paragraphs = _Paragraphs("documentation")
    for done, member in enumerate(members, 1):
        service = read_json_object(archive, member, report)
        name = member.split("/")[2]
        metadata = service.get("metadata")
        title = metadata.get("serviceFullName") if isinstance(metadata, dict) else None
        title = str(title or name)
        shapes = dict(api_documentation.records(service, "shapes", member, report))

        def of_shape(key, shapes=shapes, member=member):
            shape = shapes.get(key, {})
            yield from paragraphs.of((), shape)
            for field, node in api_documentation.records(shape, "members", member, report):
                yield from paragraphs.of((field,), node)

        for key, operation in api_documentation.records(service, "operations", member, report):
            lines = [*paragraphs.of((), operation)]
            for side in ("input", "output"):
                target = operation.get(side)
                lines += of_shape(target.get("shape") if isinstance(target, dict) else None)
            documents.add(_heading(title, key), lines, "en", name, f"{member}: {key}")
        for key in shapes:
            documents.add(_heading(title, key), of_shape(key), "en", name, f"{member}: {key}")
        progress("parse", done, len(members))
    return documents.pairs


def parse_google(
    archive: zipfile.ZipFile, report: ParseReport, progress: ProgressReport = lambda *_: None
) -> list[Pair]:
    """One document per schema and per resource; of equal paragraphs of all APIs the first stays."""
    members = api_documentation.newest_google(archive)
    documents = _Documents("google_reference", report)
    paragraphs = _Paragraphs("description")
    for done, member in enumerate(members, 1):
        api = read_json_object(archive, member, report)
        name = member.rsplit("/", 1)[1].split(".")[0]
        title = str(api.get("title") or name)
        for key, schema in api_documentation.records(api, "schemas", member, report):
            nodes = api_documentation.schema_nodes(schema, (key,), member, report)
            lines = (line for path, node in nodes for line in paragraphs.of(path[1:], node))
            documents.add(_heading(title, key), lines, "en", name, f"{member}: {key}")
        nodes = api_documentation.resource_nodes(api, (), member, report)
        for key, group in itertools.groupby(nodes, key=lambda node: node[0][0]):
            lines = (line for path, node in group for line in paragraphs.of(path[1:], node))
            documents.add(_heading(title, key), lines, "en", name, f"{member}: {key}")
        progress("parse", done, len(members))
    return documents.pairs


def _heading(*names: str) -> str:
    return clean_text(" ".join([names[0], *map(words_of_identifier, names[1:])]))


class _Paragraphs:
    """Paragraphs of API descriptions, each text once."""

    def __init__(self, key: str):
        self._key = key
        self._used: set[str] = set()

    def of(self, path: tuple[str, ...], node: dict) -> Iterable[str]:
        """What a node says, after its name in words; nothing if it was said before."""
        text = node.get(self._key)
        if not isinstance(text, str):
            return
        text = clean_text(strip_html(text))
        if text and text not in self._used:
            self._used.add(text)
            name = " ".join(map(words_of_identifier, path))
            yield f"{name}: {text}" if name else text


class _Documents:
    def __init__(self, source: str, report: ParseReport):
        self._source = source
        self._report = report
        self.pairs: list[Pair] = []

    def add(
        self, title: str, lines: Iterable[str], language: str, component: str, member: str
    ) -> None:
        """Adds the document of these lines (each distinct one once), if it is long enough."""
        text = "\n".join(dict.fromkeys(lines))
        if len(text) < _MIN_CHARACTERS:
            self._report.dropped[f"{self._source}_too_short"] += 1
        elif not is_encodable(text):
            self._report.problem("invalid_unicode", member)
        else:
            key = f"{self._source}: {component}"
            self.pairs.append(Pair(title, text, self._source, language, (key,)))
