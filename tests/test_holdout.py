import os
import random

import pytest

from moe_embed_jax.data.builders import api_documentation, holdout, home_assistant, wheels
from moe_embed_jax.data.builders.text_pairs import Pair, ParseReport


def synthetic_pairs(count: int = 2000, seed: int = 0) -> list[Pair]:
    """Translations in many languages and descriptions that tie two English strings together."""
    chooser = random.Random(seed)
    pairs = []
    for n in range(count):
        english = f"english {n}"
        for language in chooser.sample(["de", "fr", "ja", "ru", "zh"], 3):
            pairs.append(Pair(english, f"{language} {n}", "translations", language, (english,)))
        if n % 3 == 0:
            name = f"name {n % 300}"  # one name has several descriptions
            pairs.append(Pair(name, english, "descriptions", "en", (english, name)))
    return pairs


def english_strings(pairs) -> set[str]:
    return {string for pair in pairs for string in pair.english}


def test_connected_components():
    groups = [("a", "b"), ("c",), ("d", "e"), ("b", "f"), ("e", "d")]
    assert sorted(holdout.connected_components(groups)) == [["a", "b", "f"], ["c"], ["d", "e"]]
    assert holdout.connected_components([]) == []


def test_long_chain_is_one_component():
    chain = [(str(n), str(n + 1)) for n in range(50_000)]
    random.Random(1).shuffle(chain)
    assert len(holdout.connected_components(chain)) == 1


def test_no_english_string_on_both_sides():
    pairs = synthetic_pairs()
    train, test, _ = holdout.split_pairs(pairs)
    assert len(train) + len(test) == len(pairs)
    assert test and not english_strings(train) & english_strings(test)
    # Also for the sources together: a source string here may be a description there.
    texts_of_train = {text for pair in train for text in (pair.query, pair.document)}
    assert not texts_of_train & english_strings(test)


def test_about_a_tenth_is_held_out():
    _, test, shares = holdout.split_pairs(synthetic_pairs())
    assert 0.08 < shares["translations"]["english_strings_share"] < 0.12
    assert 0.07 < shares["translations"]["pairs_share"] < 0.13
    assert shares["translations"]["pairs_held_out"] == sum(p.source == "translations" for p in test)


def test_choice_depends_on_the_strings_only():
    pairs = synthetic_pairs()
    expected = set(holdout.split_pairs(pairs)[1])
    for seed in range(3):
        shuffled = random.Random(seed).sample(pairs, len(pairs))
        shuffled = [p._replace(english=p.english[::-1]) for p in shuffled]
        back = {p._replace(english=p.english[::-1]) for p in holdout.split_pairs(shuffled)[1]}
        assert back == expected


def test_a_large_component_trains():
    family = [("hub", f"spoke {n}") for n in range(100)]
    for seed in range(20):  # whatever the order of the hashes
        others = [(f"{seed} lone {n}",) for n in range(2000)]
        held_out = holdout.choose_held_out(family + others)
        assert "hub" not in held_out
        assert 0.10 <= len(held_out) / 2101 < 0.11


def test_whole_components_are_held_out():
    groups = [(f"a{n}", f"b{n}", f"c{n}") for n in range(500)]
    held_out = holdout.choose_held_out(groups)
    assert all(len(held_out & set(group)) in (0, 3) for group in groups)
    assert len(held_out) == 150


def test_nothing_in_nothing_out():
    assert holdout.choose_held_out([]) == frozenset()
    assert holdout.split_pairs([]) == ([], [], {})


@pytest.mark.slow
def test_real_wheels_share_no_english_string():
    folder = os.environ.get(wheels.WHEELS_DIR_VARIABLE)
    if not folder:
        pytest.skip(f"needs the pinned wheels: set {wheels.WHEELS_DIR_VARIABLE} to their folder")
    found = wheels.fetch(list(wheels.WHEELS), folder, folder, progress=False)
    parsers = {
        "homeassistant": home_assistant.parse,
        "botocore": api_documentation.parse_aws,
        "google-api-python-client": api_documentation.parse_google,
    }
    counts: dict[str, int] = {}
    all_train, all_test = set(), set()
    for name, parse in parsers.items():
        with wheels.open_wheel(found[name]) as archive:
            train, test, shares = holdout.split_pairs(parse(archive, ParseReport(name)))
        for source, share in shares.items():
            assert 0.095 < share["english_strings_share"] < 0.105, source
            counts[source] = sum(pair.source == source for pair in (*train, *test))
        all_train |= english_strings(train)
        all_test |= english_strings(test)
    assert not all_train & all_test
    targets = {
        "translations": 269_202,
        "descriptions": 52_116,
        "aws_api": 108_148,
        "google_api": 67_492,
    }
    for source, target in targets.items():
        assert abs(counts[source] / target - 1) < 0.06, (source, counts[source])
