"""Texts that say of which language and topic they are: JSON lines, or the tables of SIB-200."""

import dataclasses
import pathlib
from collections.abc import Iterable

from moe_embed_jax import storage
from moe_embed_jax.data.text_files import read_json, read_lines, string_field
from moe_embed_jax.errors import UserError
from moe_embed_jax.tokenizers.vocabulary import clean_text

SIB200_COLUMNS = ("index_id", "category", "text")
SIB200_ENDINGS = (".tsv", ".tsv.gz", ".tsv.xz")
MOST_LISTED = 8  # languages in a complaint


@dataclasses.dataclass(frozen=True)
class LabelledText:
    """`language`, `topic`: None if the source does not say. Texts with the same `id` say the same,
    in several languages; None: this one says what no other does."""

    text: str
    language: str | None
    topic: str | None
    id: str | None


def read_labelled(paths: Iterable[str | pathlib.Path]) -> list[LabelledText]:
    """The lines of JSON files: objects of "text" and any of "language", "topic" and "id".

    Raises `UserError` (`file:line: ...`) for a line that is none, and for a file without lines.
    """
    texts = []
    for path in paths:
        before = len(texts)
        for where, record in read_json(path):
            if not isinstance(record, dict):
                raise UserError(f'{where}: expected an object with "text", got {record!r:.40}')
            labels = [_label(record, field, where) for field in ("language", "topic", "id")]
            texts.append(LabelledText(string_field(record, "text", where), *labels))
        if len(texts) == before:
            raise UserError(f"{path}: there is no text in this file")
    return texts


def _label(record: dict, field: str, where: str) -> str | None:
    """A number is a name too; what is missing, null or empty says nothing."""
    value = record.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: field '{field}' must be a string, got {value!r:.40}")
    return clean_text(value) if value else None


def read_sib200(
    folder: str | pathlib.Path, languages: Iterable[str] = (), sentences: int | None = None
) -> list[LabelledText]:
    """Sentences of SIB-200 (arXiv 2309.07445), the same in every language.

    Args:
      folder: of files LANGUAGE.tsv, .tsv.gz or .tsv.xz with a header that names the columns
        index_id, category and text (others are not read).
      languages: names as in the files' names, deu_Latn; none: all that are there.
      sentences: the first ones of every language; None: all.

    Raises `UserError` for a folder without such files, a language that is not among them, and
    (`file:line: ...`) for a table that is broken.
    """
    folder = storage.path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found: dict[str, pathlib.Path] = {}
    for path in sorted(folder.iterdir()):
        ending = next((end for end in SIB200_ENDINGS if path.name.endswith(end)), None)
        if ending:
            found.setdefault(path.name.removesuffix(ending), path)
    if not found:
        raise UserError(f"{folder} holds no SIB-200 tables (LANGUAGE.tsv, .tsv.gz or .tsv.xz)")
    languages = list(dict.fromkeys(languages)) or list(found)
    if unknown := [language for language in languages if language not in found]:
        raise UserError(f"{folder} has no language {', '.join(unknown)}: {_like(unknown, found)}")
    texts = []
    for language in languages:
        texts += _read_table(found[language], language, sentences)
    return texts


def _like(unknown: list[str], found) -> str:
    """The languages that may have been meant: those which start alike, else the first ones."""
    starts = tuple(name[:2] for name in unknown)
    alike = [name for name in found if name.startswith(starts)]
    if alike:
        return f"did you mean {', '.join(alike[:MOST_LISTED])}?"
    some = ", ".join(list(found)[:MOST_LISTED])
    return f"it has {some}{', ...' if len(found) > MOST_LISTED else ''} ({len(found)} in all)"


def _read_table(path: pathlib.Path, language: str, sentences: int | None) -> list[LabelledText]:
    texts: list[LabelledText] = []
    places: list[int] = []
    columns = 0
    for number, line in read_lines(path):
        fields = line.split("\t")
        if number == 1:
            columns = len(fields)
            if missing := [name for name in SIB200_COLUMNS if name not in fields]:
                raise UserError(
                    f"{path}:1: the header has no column {', '.join(missing)} "
                    f"(columns: {', '.join(fields)[:80]})"
                )
            places = [fields.index(name) for name in SIB200_COLUMNS]
            continue
        if len(texts) == sentences:
            break
        if len(fields) != columns:
            raise UserError(f"{path}:{number}: {len(fields)} columns, the header has {columns}")
        index, topic, text = (fields[place] for place in places)
        texts.append(LabelledText(text, language, topic or None, index or None))
    if not texts:
        raise UserError(f"{path}: there is no text in this file")
    return texts
