"""Preparation from fake builders to a token store, without network or the real wheels."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers.memory_records import MemoryRecords

from moe_embed_jax.data import data_spec
from moe_embed_jax.data.data_config import DataConfig, VocabularyConfig
from moe_embed_jax.data.data_spec import (
    complete_config,
    planned_store_path,
    token_store_path,
    vocabulary_path,
)
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.errors import UserError
from moe_embed_jax.preparation import tokenize as prepare
from moe_embed_jax.tokenizers.vocabulary import (
    DOCUMENT_PREFIX,
    QUERY_PREFIX,
    Vocabulary,
    content_ids,
    train_vocabulary,
)

CONFIG = {
    "vocabulary": {"kind": "train", "size": 300},
    "query_length": 10,
    "document_length": 20,
}


FEW = {**CONFIG, "rates": {"translations": 1}}  # one task: most of the time is tf.data's start-up


def sentences(seed: int, count: int) -> list[str]:
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghilmnoprstu", k=4)) for _ in range(150)]
    return [" ".join(generator.choices(words, k=generator.randint(1, 30))) for _ in range(count)]


def pair(query: str, document: str, language: str) -> dict:
    return {"query": query, "document": document, "source": "-", "language": language}


@pytest.fixture
def builders(monkeypatch):
    """Fake builders; returns the data, a record of the calls, and can be changed by a test."""
    home = [pair(q, d, "de") for q, d in zip(sentences(1, 40), sentences(2, 40), strict=True)]
    home += [pair(q, d, "ja") for q, d in zip(sentences(3, 9), sentences(4, 9), strict=True)]
    home += [pair(q, d, "de") for q, d in zip(sentences(5, 6), sentences(6, 6), strict=True)]
    api = [pair(q, d, "en") for q, d in zip(sentences(7, 2500), sentences(8, 2500), strict=True)]
    data = {
        "home_assistant": (
            home,
            {"translations/de": (0, 40), "translations/ja": (40, 49), "descriptions/de": (49, 55)},
        ),
        "aws_api": (api, {"aws_api/en": (0, 2500)}),
        "google_api": (api[:20], {"google_api/en": (0, 20)}),
        "calls": [],
    }

    def prepare_pairs(data_dir, wheels_dir=None, **_):
        data["calls"].append(wheels_dir)
        return {"pairs": 1}

    def open_split(data_dir, config, split):
        rows, groups = data[config] if split == "train" else ([], {})
        return MemoryRecords(rows), groups

    def prepare_sets(data_dir, **_):
        data["calls"].append("sets")
        (data_dir / "retrieval").mkdir(parents=True, exist_ok=True)
        (data_dir / "retrieval" / "statistics.json").write_text("{}")

    monkeypatch.setattr(prepare.retrieval_sets, "prepare", prepare_sets)
    monkeypatch.setattr(prepare.package_texts, "prepare", prepare_pairs)
    monkeypatch.setattr(prepare.package_texts, "open_split", open_split)
    return data


def rows_of(builders) -> list[dict]:
    """All rows, in the order in which the tasks are stored."""
    home, api = builders["home_assistant"][0], builders["aws_api"][0]
    return api + home[49:] + api[:20] + home[:49]


def test_store_holds_every_pair(builders, tmp_path, capsys):
    folder = prepare.prepare(CONFIG, tmp_path, wheels_dir="w")
    assert builders["calls"] == ["w", "sets"]
    assert folder == planned_store_path(CONFIG, tmp_path) == token_store_path(CONFIG, tmp_path)
    store = TokenStore.open(folder)
    vocabulary = Vocabulary.load(vocabulary_path(CONFIG, tmp_path))
    assert vocabulary.size == 300
    assert store.spec["vocabulary"] == {"sha256": vocabulary.content_hash, "size": 300}
    assert store.spec["prefixes"] == [QUERY_PREFIX, DOCUMENT_PREFIX]
    assert set(store.spec["source_checksums"]) == set(data_spec.source_checksums())
    names = [(g["task"], g["language"], g["stop"] - g["start"]) for g in store.groups]
    assert names == [
        ("aws_api", "en", 2500),
        ("descriptions", "de", 6),
        ("google_api", "en", 20),
        ("translations", "de", 40),
        ("translations", "ja", 9),
    ]
    assert store.groups[0]["rate"] == 2500 / 2575 and store.groups[4]["rate"] == 49 / 2575
    rows = rows_of(builders)
    assert len(store) == len(rows)
    found = store.read(np.arange(len(rows)))
    for row, (query, document), length, ids in zip(
        rows, found, store.lengths, store.content_ids, strict=True
    ):
        expected = vocabulary.encode_text(QUERY_PREFIX + row["query"], 10)
        np.testing.assert_array_equal(query, expected)
        expected = vocabulary.encode_text(DOCUMENT_PREFIX + row["document"], 20)
        np.testing.assert_array_equal(document, expected)
        assert length.tolist() == [len(query), len(document)]
        np.testing.assert_array_equal(ids[0], content_ids([row["query"]])[0])
        np.testing.assert_array_equal(ids[1], content_ids([row["document"]])[0])
    assert store.lengths.max(axis=0).tolist() == [10, 20]
    statistics = json.loads((tmp_path / "statistics.json").read_text())["tokens"]
    cut = dict.fromkeys(("query", "document"), (0, 0))
    for row in rows:
        for name, prefix, limit in (("query", QUERY_PREFIX, 8), ("document", DOCUMENT_PREFIX, 18)):
            lost = max(len(vocabulary.encode(prefix + row[name])) - limit, 0)
            cut[name] = (cut[name][0] + (lost > 0), cut[name][1] + lost)
    found = [task["cut"] for task in statistics["tasks"].values()]
    for name, expected in cut.items():
        counts = [counts[name] for counts in found if name in counts]
        assert tuple(np.sum(counts, axis=0)) == expected and expected[0]
    assert statistics["tasks"]["aws_api"]["pairs"] == 2500
    assert statistics["store"] == folder.name
    assert json.loads((folder / "statistics.json").read_text()) == statistics["tasks"]
    out = capsys.readouterr().out
    assert "aws_api" in out and re.search(
        r"^cut: [\d,]+ documents of \w+ lose [\d,]+ tok", out, re.M
    )


def test_second_call_returns_at_once(builders, tmp_path, monkeypatch):
    first = prepare.prepare(FEW, tmp_path)
    spec = (first / "spec.json").stat().st_mtime_ns
    monkeypatch.setattr(prepare, "_write_store", None)
    assert prepare.prepare(dict(FEW), tmp_path) == first
    assert len(builders["calls"]) == 2
    assert (first / "spec.json").stat().st_mtime_ns == spec


def test_same_input_gives_equal_files(builders, tmp_path):
    first, second = (prepare.prepare(CONFIG, tmp_path / name) for name in "ab")
    assert first.name == second.name
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    models = [vocabulary_path(CONFIG, tmp_path / name).read_bytes() for name in "ab"]
    assert models[0] == models[1]


def test_empty_texts_are_left_out_and_named(builders, tmp_path, capsys):
    home = builders["home_assistant"][0]
    home[3] = pair("", "document", "de")
    home[7] = pair("query", " \n\t", "de")
    home[20] = pair("query", "\x01\x02", "de")
    home[40:49] = [pair(" ", "document", "ja")] * 9
    store = TokenStore.open(prepare.prepare(FEW, tmp_path))
    assert len(store) == 49 - 12
    assert ("translations", "ja") not in [(g["task"], g["language"]) for g in store.groups]
    statistics = json.loads((tmp_path / "statistics.json").read_text())["tokens"]["tasks"][
        "translations"
    ]
    assert statistics["pairs"] == 37 and statistics["empty"] == {
        "de": {"pairs": 3, "rows": [3, 7, 20]},
        "ja": {"pairs": 9, "rows": list(range(40, 49))},
    }
    printed = capsys.readouterr().out
    assert "left out: 3 pairs of translations/de with an empty text (rows 3, 7, 20)" in printed
    kept = [row for i, row in enumerate(home[:40]) if i not in (3, 7, 20)]
    start = store.groups[-1]["start"]
    expected = [content_ids([row["query"]])[0].tolist() for row in kept]
    assert store.content_ids[start:, 0].tolist() == expected


def test_rates_choose_and_weigh_tasks(builders, tmp_path):
    config = {**CONFIG, "rates": {"translations": 3, "google_api": 1}}
    store = TokenStore.open(prepare.prepare(config, tmp_path))
    rates = {(g["task"], g["language"]): g["rate"] for g in store.groups}
    assert rates == {
        ("google_api", "en"): 0.25,
        ("translations", "de"): 0.75,
        ("translations", "ja"): 0.75,
    }
    # The vocabulary does not depend on the rates, the store does.
    assert vocabulary_path(config, tmp_path) == vocabulary_path(CONFIG, tmp_path)
    assert token_store_path(CONFIG, tmp_path) is None


def test_vocabulary_from_a_file(builders, tmp_path):
    path = tmp_path / "given.model"
    train_vocabulary(sentences(9, 300), path, size=120)
    config = {**FEW, "vocabulary": {"kind": "file", "path": str(path)}}
    folder = prepare.prepare(config, tmp_path)
    copy = vocabulary_path(config, tmp_path)
    assert copy.read_bytes() == path.read_bytes()
    assert TokenStore.open(folder).spec["vocabulary"]["size"] == 120
    # Another content behind the same path is another store.
    train_vocabulary(sentences(10, 300), path, size=120)
    assert token_store_path(config, tmp_path) is None
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"given\.model is not a SentencePiece model"):
        prepare.prepare(config, tmp_path)


def test_interrupted_preparation_leaves_no_store(builders, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_describe_lengths", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(FEW, tmp_path)
    assert token_store_path(FEW, tmp_path) is None
    assert list((tmp_path / "tokens").iterdir()) == []
    assert len(TokenStore.open(prepare.prepare(FEW, tmp_path))) == 49


def test_lengths_without_room_for_text(builders, tmp_path):
    with pytest.raises(UserError, match=r"leave no room for text: .* take 3 and 3 tokens"):
        prepare.prepare({**CONFIG, "query_length": 3}, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"query_len": 3}, "unknown key 'query_len'; known: vocabulary, mixture"),
        ({"query_length": 0}, "query_length=0 must be an integer"),
        ({"document_length": "long"}, "document_length='long' must be an integer"),
        ({"query_length": True}, "query_length=True must be an integer"),
        ({"vocabulary": "xlmr"}, "vocabulary='xlmr' must be"),
        ({"vocabulary": {"kind": "train", "path": "x"}}, "must be"),
        ({"vocabulary": {"kind": "train", "size": 0}}, "size=0 must be"),
        ({"vocabulary": {"kind": "file", "path": "no.model"}}, "no.model does not exist"),
        ({"rates": [1, 2]}, "rates="),
        ({"rates": {"aws_api": "much"}}, "rates="),
        ({}, "vocabulary=None must be"),
        ({"mixture": "mc4"}, "unknown mixture 'mc4'"),
        ({"rates": {"mc4": 1}}, "unknown task 'mc4'"),
    ],
)
def test_bad_configuration(builders, tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        prepare.prepare(config, tmp_path)


def test_store_path_follows_the_configuration(tmp_path, monkeypatch):
    config = {"vocabulary": {"kind": "train", "size": 16_384}}
    path = planned_store_path(config, tmp_path)
    defaults = {"query_length": 32, "document_length": 256, "rates": None}
    assert path == planned_store_path(config | defaults, tmp_path)
    assert token_store_path(config, tmp_path) is None
    assert path != planned_store_path(config | {"query_length": 33}, tmp_path)
    assert path != planned_store_path(config | {"rates": {"aws_api": 1}}, tmp_path)
    assert prepare.package_texts.VERSION == data_spec.BUILDER_VERSION
    monkeypatch.setattr(data_spec, "source_checksums", lambda: {"other.whl": "0" * 64})
    assert path != planned_store_path(config, tmp_path)
    # That of a run is the same: its defaults are these.
    run = DataConfig(vocabulary=VocabularyConfig("train", size=16_384))
    assert complete_config(run.preparation()) == complete_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "error: --config_json is not JSON"),
        ('{"nonsense": 1}', "error: data config: unknown key 'nonsense'"),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, config, message):
    command = [sys.executable, "-m", "moe_embed_jax.preparation.tokenize", f"--data_dir={tmp_path}"]
    done = subprocess.run(
        [*command, f"--config_json={config}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
