"""Ids and judgements of retrieval sets, as evaluation and preparation both read them.

All functions raise `ValueError`, whose message says what is wrong with the value alone.
"""

import re

from moe_embed_jax.json_file import is_encodable

MOST_GRADE = 2**31 - 1  # trec_eval, which computes the metrics, counts a larger one as nothing
_GRADE = re.compile(r"[+-]?[0-9]{1,10}")
# An id is a line's part in many files, and a C string in trec_eval.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def id_of(value) -> str:
    """The id that a JSON value is: a text, or a whole number, which a table cannot tell from it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"must be a string or a whole number, got {value!r:.40}")
    check_id(value)
    return value


def check_id(text: str) -> None:
    """Refuses what not every file or program that an id goes through can hold."""
    if not text:
        raise ValueError("is empty")
    if text != text.strip():
        raise ValueError(f"{text!r:.60} has white space at an end: remove it")
    if found := _CONTROL.search(text):
        raise ValueError(f"{text!r:.60} has the control character {found[0]!r}: remove it")
    if not is_encodable(text):
        raise ValueError(f"{text!r:.60} has half of a surrogate pair: UTF-8 cannot hold it")


def grade_of(text: str) -> int:
    if not _GRADE.fullmatch(text):
        raise ValueError(f"must be an integer, got {text!r:.40}")
    grade = int(text)
    if abs(grade) > MOST_GRADE:
        raise ValueError(f"must be from {-MOST_GRADE} to {MOST_GRADE}, got {grade}")
    return grade


def is_number(text: str) -> bool:
    """Whether `grade_of` takes it, or it is only too large: a header's word is none."""
    return bool(_GRADE.fullmatch(text))
