"""Pairs from Home Assistant's translation files: the same nested keys in every language.

`homeassistant/components/<component>/translations/<language>.json`
"""

import re
import zipfile
from collections.abc import Iterator

from moe_embed_jax.preparation.builders.text_pairs import (
    Pair,
    PairCollector,
    ParseReport,
    ProgressReport,
    clean_text,
    read_json_object,
)

_MEMBER = re.compile(r"homeassistant/components/([^/]+)/translations/([^/]+)\.json")
_DESCRIPTION = "/description"
_NAMES_OF_A_DESCRIPTION = ("/name", "/title")
# British English differs from English by a letter here and there: as a document it would put a
# near copy of a held-out English string into training.
_LEFT_OUT_LANGUAGES = frozenset({"en-GB"})
_MIN_ENGLISH = 20  # below: labels such as "Cancel", which say little about meaning
_MIN_DESCRIPTION = 25  # below: mostly "Select a device" and the like
_MIN_QUERY, _MIN_DOCUMENT = 8, 12


def parse(
    archive: zipfile.ZipFile, report: ParseReport, progress: ProgressReport = lambda *_: None
) -> list[Pair]:
    """Distinct pairs: `translations` (en -> xx) and `descriptions` (name -> description in xx)."""
    components = members_by_component(archive)
    total = sum(map(len, components.values()))
    done = 0
    translations = PairCollector("translations", report, _MIN_ENGLISH, _MIN_DOCUMENT)
    descriptions = PairCollector("descriptions", report, _MIN_QUERY, _MIN_DESCRIPTION)
    for component, members in components.items():
        if "en" not in members:
            report.problem("no_english_file", f"homeassistant/components/{component}")
        else:
            english = strings_of(archive, members["en"], report)
            for language, member in members.items():
                strings = english if language == "en" else strings_of(archive, member, report)
                if language != "en":
                    _add_translations(translations, english, strings, language, member, report)
                _add_descriptions(descriptions, english, strings, language, member, report)
        done += len(members)
        progress("parse", done, total)
    return _with_english_look_alikes(translations.pairs() + descriptions.pairs())


def members_by_component(archive: zipfile.ZipFile) -> dict[str, dict[str, str]]:
    """component -> language -> member, both sorted."""
    components: dict[str, dict[str, str]] = {}
    for member in sorted(archive.namelist()):
        match = _MEMBER.fullmatch(member)
        if match and match[2] not in _LEFT_OUT_LANGUAGES:
            components.setdefault(match[1], {})[match[2]] = member
    return components


def strings_of(archive: zipfile.ZipFile, member: str, report: ParseReport) -> dict[str, str]:
    """Key path -> cleaned text."""
    return dict(_walk(read_json_object(archive, member, report), "", member, report))


def _walk(node: dict, path: str, member: str, report: ParseReport) -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        place = f"{path}/{key}"
        if isinstance(value, str):
            if text := clean_text(value):
                yield place, text
            else:
                report.problem("empty_text", member, place)
        elif isinstance(value, dict):
            yield from _walk(value, place, member, report)
        else:
            report.problem("not_text", member, place)


def _add_translations(collector, english, strings, language, member, report) -> None:
    for key, text in strings.items():
        source = english.get(key)
        if source is None:
            report.dropped["translations_no_english_key"] += 1
        elif source == text:
            report.dropped["translations_untranslated"] += 1
        else:
            collector.add(source, text, language, (source,), member, key)


def _add_descriptions(collector, english, strings, language, member, report) -> None:
    for key, text in strings.items():
        if not key.endswith(_DESCRIPTION):
            continue
        english_text = english.get(key)
        if english_text is None:
            report.dropped["descriptions_no_english_key"] += 1
            continue
        if language != "en" and english_text == text:
            report.dropped["descriptions_untranslated"] += 1
            continue
        for suffix in _NAMES_OF_A_DESCRIPTION:
            name_key = key.removesuffix(_DESCRIPTION) + suffix
            name = strings.get(name_key)
            if name is None:
                continue
            origins = (english_text, english[name_key]) if name_key in english else (english_text,)
            if collector.add(name, text, language, origins, member, key):
                break


def _with_english_look_alikes(pairs: list[Pair]) -> list[Pair]:
    """Counts a text in another language that is, word for word, an English string as that string.

    Names such as "Home Assistant Cloud" stay as they are in many languages; without this, one could
    be a document in training and a source string in the test set.
    """
    all_english = {string for pair in pairs for string in pair.english}
    return [
        pair._replace(english=tuple(dict.fromkeys(pair.english + look_alikes)))
        if (
            look_alikes := tuple(
                text for text in (pair.query, pair.document) if text in all_english
            )
        )
        else pair
        for pair in pairs
    ]
