"""Where SentencePiece keeps a combining mark apart from what stands before it.

For the normaliser of an exported tokenizer.json (`tokenizer_files`): NFC composes more than a
SentencePiece model does, which goes through a text once and replaces the longest match of its
table: "ế" from "ê" and an acute accent, but not "ệ" from "ê" and a dot below, and it never changes
the order of marks (Arabic and Hebrew vowel signs). A `BOUNDARY` between two characters keeps NFC
from it.
"""

import collections
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

BOUNDARY = "\ufdd0"  # never a character, so neither texts nor tables of replacements have it

# What can follow a character within its cluster, Korean apart: marks and two joiners.
_FOLLOWERS = r"\p{M}\u200C\u200D"

# What transformers.js 4.3 removes or makes a space of, whatever a model's table says.
_JS_CHANGES = re.compile(
    "[\x01-\x08\x0b\x0e-\x1f\x7f\x8f\x9f\t\n\x0c\r\xa0\u1680\u2000-\u200f\u2028\u2029\u202f\u205f"
    "\u2581\u3000\ufeff\ufffd]"
)
_PLANES_ENDS = [(plane << 16) + 0xFFFE for plane in range(1, 17)]


def boundary_pattern(normalize: Callable[[str], str]) -> str:
    """A regular expression for the empty places where `BOUNDARY` belongs.

    Args:
      normalize: the SentencePiece model's replacements without its treatment of spaces.

    Returns:
      The pattern: some 10,000 characters, in the syntax common to Oniguruma and JavaScript.
    """
    # second -> the characters with which the model composes it / NFC does and the model does not.
    together, apart = collections.defaultdict(set), collections.defaultdict(set)
    for whole, first, second in _canonical_pairs():
        composed = normalize(first + second) == normalize(whole)
        if not unicodedata.combining(second):  # Korean; Indic vowels in two parts
            if not composed:
                apart[second].add(first)
            continue
        if composed:
            together[second].add(first)
        full = unicodedata.normalize("NFD", whole)
        if len(full) > 2 and normalize(full) == normalize(whole):
            for mark, next_mark in itertools.pairwise(full[1:]):
                together[next_mark].add(mark)
    marks = {c for c in _characters() if unicodedata.combining(c)}
    for mark in marks:  # the grave and acute accents that were Vietnamese only
        same = unicodedata.normalize("NFD", mark)
        if same != mark:
            together[mark] |= {
                c for c in together[same] if normalize(c + mark) == normalize(c + same)
            }
    changed = [c for c in _characters() if normalize(c) != c == unicodedata.normalize("NFC", c)]
    places = [
        f"(?={_char_class(seconds)})" + (f"(?<!{_char_class(firsts)})" if firsts else "")
        for firsts, seconds in _by_firsts({mark: together[mark] for mark in marks})
    ]
    places += [
        f"(?={_char_class(seconds)})(?<={_char_class(firsts)})"
        for firsts, seconds in _by_firsts(apart)
    ]
    # `tokenizers` would replace such a character together with what follows it.
    places.append(f"(?<={_char_class(changed)})")
    # Not at the beginning of a text: there `tokenizers` 0.22 and 0.23 fail when NFC follows.
    return f"(?={_char_class(apart, _FOLLOWERS)})(?<=.)(?:{'|'.join(places)})"


def hidden_characters(normalize: Callable[[str], str]) -> dict[str, str]:
    """{character: what stands for it}: what the model keeps, and transformers.js replaces.

    That library does not read a model's table: it removes control characters, makes spaces of
    others, and applies NFKC. The stand-ins are no characters, so no text has them.
    """
    others = (chr(i) for i in [*range(0xFDD1, 0xFDF0), *_PLANES_ENDS])
    kept = (
        c
        for c in _characters()
        if (_JS_CHANGES.match(c) or unicodedata.normalize("NFKC", c) != c) and normalize(c) == c
        if c != "\uff5e"  # kept there, too
    )
    return dict(zip(kept, others, strict=False))


def _canonical_pairs() -> Iterator[tuple[str, str, str]]:
    """(whole, first, second) for every character that is canonically equivalent to two others."""
    for whole in _characters():
        codes = unicodedata.decomposition(whole).split()
        if len(codes) == 2 and not codes[0].startswith("<"):
            yield whole, *(chr(int(code, 16)) for code in codes)
        elif "\uac00" <= whole <= "\ud7a3":  # Korean syllables decompose by rule, Unicode 3.12
            syllable, trailing = divmod(ord(whole) - 0xAC00, 28)
            if trailing:
                yield whole, chr(0xAC00 + 28 * syllable), chr(0x11A7 + trailing)
            else:
                leading, vowel = divmod(syllable, 21)
                yield whole, chr(0x1100 + leading), chr(0x1161 + vowel)


def _characters() -> Iterator[str]:
    """The basic multilingual plane; beyond it are scripts that no model here has pieces for."""
    return (chr(i) for i in range(0x10000) if not 0xD800 <= i < 0xE000)


def _by_firsts(firsts_of: dict[str, set[str]]) -> list[tuple[frozenset[str], set[str]]]:
    """Seconds with the same firsts taken together, in a fixed order."""
    groups = collections.defaultdict(set)
    for second, firsts in sorted(firsts_of.items()):
        groups[frozenset(firsts)].add(second)
    return list(groups.items())


def _char_class(characters: Iterable[str], further: str = "") -> str:
    """ "[...]" with ranges, the characters as \\uXXXX; `further` is already in that syntax."""
    parts = []
    codes = sorted(map(ord, characters))
    # Consecutive codes have the same difference to their place in the list.
    for _, run in itertools.groupby(enumerate(codes), lambda pair: pair[1] - pair[0]):
        run = [code for _, code in run]
        parts.append(f"\\u{run[0]:04X}" + (f"-\\u{run[-1]:04X}" if len(run) > 1 else ""))
    return f"[{further}{''.join(parts)}]"
