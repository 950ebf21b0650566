"""Hold-out by source string: no English string occurs both in training and in the test set.

Held out by pair, a test query would be known from training: one English string comes with up to 59
translations, and one name with several descriptions. So strings that occur in the same pair are
kept together: the connected components of strings are divided, and pairs follow their strings.
"""

import hashlib
from collections.abc import Iterable, Sequence

from moe_embed_jax.preparation.builders.text_pairs import Pair

HELD_OUT_SHARE = 0.10
LARGEST_COMPONENT_SHARE = 0.005
# In a small corpus every component is "large" by share; this many strings are always movable.
_LARGEST_COMPONENT_MINIMUM = 8


def connected_components(groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Strings that share a group, directly or through others; each component sorted."""
    parent: dict[str, str] = {}

    def root_of(string: str) -> str:
        root = parent.setdefault(string, string)
        while parent[root] != root:
            root = parent[root]
        while parent[string] != root:
            parent[string], string = root, parent[string]
        return root

    for group in groups:
        first = root_of(group[0])
        for other in group[1:]:
            parent[root_of(other)] = first = root_of(first)
    components: dict[str, list[str]] = {}
    for string in parent:
        components.setdefault(root_of(string), []).append(string)
    return [sorted(component) for component in components.values()]


def choose_held_out(groups: Iterable[Sequence[str]]) -> frozenset[str]:
    """The strings of the test side: whole components, until `HELD_OUT_SHARE` of all strings is
    reached.

    Components are taken in the order of the sha256 of their smallest string, so the choice depends
    on the strings only, not on the order of `groups`. A component with more than
    `LARGEST_COMPONENT_SHARE` of all strings always trains: alone it would fill the test set with
    one family of strings.
    """
    components = connected_components(groups)
    total = sum(map(len, components))
    largest = max(LARGEST_COMPONENT_SHARE * total, _LARGEST_COMPONENT_MINIMUM)
    held_out: set[str] = set()
    for component in sorted(components, key=lambda c: (_order(c[0]), c[0])):
        if len(held_out) >= HELD_OUT_SHARE * total:
            break
        if len(component) <= largest:
            held_out.update(component)
    return frozenset(held_out)


def _order(string: str) -> bytes:
    return hashlib.sha256(string.encode("utf-8", "surrogatepass")).digest()


def split_pairs(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair], dict[str, dict]]:
    """(train, test, shares by source); every pair is in exactly one of the two lists.

    All sources given in one call share one decision per string.
    """
    held_out = choose_held_out(pair.english for pair in pairs)
    train = [pair for pair in pairs if pair.english[0] not in held_out]
    test = [pair for pair in pairs if pair.english[0] in held_out]
    return train, test, _shares(train, test)


def _shares(train: Sequence[Pair], test: Sequence[Pair]) -> dict[str, dict]:
    shares = {}
    for source in sorted({pair.source for pair in (*train, *test)}):
        train_pairs = [pair for pair in train if pair.source == source]
        test_pairs = [pair for pair in test if pair.source == source]
        train_strings = len({string for pair in train_pairs for string in pair.english})
        test_strings = len({string for pair in test_pairs for string in pair.english})
        shares[source] = {
            "english_strings": train_strings + test_strings,
            "english_strings_held_out": test_strings,
            "english_strings_share": test_strings / (train_strings + test_strings),
            "pairs_held_out": len(test_pairs),
            "pairs_share": len(test_pairs) / (len(train_pairs) + len(test_pairs)),
        }
    return shares
