"""The seqio side: same ids as the plain vocabulary, and tasks over a small fake of the builders."""

import numpy as np
import pytest
from conftest import ROOT
from helpers.memory_records import MemoryRecords

seqio = pytest.importorskip("seqio")
import tensorflow as tf  # noqa: E402

from moe_embed_jax.data.data_spec import MIXTURES  # noqa: E402
from moe_embed_jax.errors import UserError  # noqa: E402
from moe_embed_jax.preparation import tasks  # noqa: E402
from moe_embed_jax.preparation.seqio_vocabulary import SeqioVocabulary  # noqa: E402
from moe_embed_jax.tokenizers.vocabulary import (  # noqa: E402
    DOCUMENT_PREFIX,
    QUERY_PREFIX,
    Vocabulary,
    train_vocabulary,
)

XLMR = ROOT.parent / "shared/data/xlmr_tokenizer/sentencepiece.bpe.model"

LINES = [
    "Configure the network connection of your device.",
    "search_query: what is this? search_document: that",
    "Gerät konnte nicht erreicht werden – ist es eingeschaltet?",
    "无法连接到设备，请检查网络设置。",
    "デバイスに接続できませんでした。",
    "Не удалось подключиться к устройству.",
    "تعذر الاتصال بالجهاز، تحقق من إعدادات الشبكة.",
    "장치에 연결할 수 없습니다. 각 각",
    "ไม่สามารถเชื่อมต่อกับอุปกรณ์ได้",
    "डिवाइस से कनेक्ट नहीं हो सका",
    "emoji 👩‍👩‍👧 ﬁ ＡＢＣ e\u0301 \u200d zero width",
    "unknown \u1bc0\u1bc1\u1bc2 letters, NUL \0 inside, \x01\x02 control",
    "<s> </s> <unk> <mask> <pad> ▁▁ \u2581x",
    # Ties between segmentations, which tensorflow_text's own operation breaks differently.
    "xxxxxxx XXXXXX-XX TTT AAAAA ``` xxxxxxxxxxx",
    "",
    "   ",
    "\t\n",
]
LONG = "a long description of many words " * 20


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Vocabulary:
    path = tmp_path_factory.mktemp("v") / "sp.model"
    lines = [f"{line} {i} {chr(97 + i % 26) * 3}" for i in range(40) for line in LINES[:11]]
    return train_vocabulary(lines, path, size=290)


@pytest.fixture(params=["trained", "xlmr"])
def vocabulary(request, small) -> Vocabulary:
    if request.param == "trained":
        return small
    if not XLMR.is_file():
        pytest.skip(f"needs XLM-R's SentencePiece model in {XLMR.parent.name}")
    return Vocabulary.load(XLMR)


# ---- SeqioVocabulary -----------------------------------------------------------------------------


def test_tensorflow_and_python_give_the_same_ids(vocabulary):
    wrapped = SeqioVocabulary(vocabulary)
    ragged = wrapped.encode_tf(tf.constant(LINES))
    for line, ids in zip(LINES, ragged.to_list(), strict=True):
        assert ids == vocabulary.encode(line), line
        assert wrapped.encode(line) == ids
        one = wrapped.encode_tf(tf.constant(line))
        assert one.dtype == tf.int32 and one.numpy().tolist() == ids


def test_decoding_agrees(vocabulary):
    wrapped = SeqioVocabulary(vocabulary)
    for line in LINES[:10]:
        ids = [0, *vocabulary.encode(line), 2]
        text = vocabulary.decode(ids)
        assert wrapped.decode([*ids, 1, 1]) == text
        assert wrapped.decode_tf(tf.constant(ids)).numpy().decode() == text
    batch = tf.constant([[0, 10, 11, 2, 12], [0, 13, 2, 1, 1]])
    texts = [text.decode() for text in wrapped.decode_tf(batch).numpy()]
    assert texts == [vocabulary.decode([10, 11]), vocabulary.decode([13])]


def test_seqio_properties(vocabulary):
    wrapped = SeqioVocabulary(vocabulary)
    assert (wrapped.bos_id, wrapped.pad_id, wrapped.eos_id, wrapped.unk_id) == (0, 1, 2, 3)
    assert wrapped.vocab_size == vocabulary.size
    assert wrapped == SeqioVocabulary(vocabulary) and wrapped != seqio.ByteVocabulary()
    assert vocabulary.content_hash[:12] in str(wrapped)


# ---- Tasks over fake builders --------------------------------------------------------------------


def fake_rows(task: str, language: str, count: int) -> list[dict]:
    return [
        {
            "query": f"{task} {i} {LINES[i % 11]}",
            "document": f"{LINES[(i + 3) % 11]} {LONG if i % 5 == 0 else ''}",
            "source": task,
            "language": language,
        }
        for i in range(count)
    ]


@pytest.fixture
def builders(monkeypatch):
    """Two tasks share a config; ranges neither start at 0 nor come in order of their names."""
    home = (
        fake_rows("descriptions", "de", 7)
        + fake_rows("translations", "zz", 30)
        + fake_rows("translations", "ar", 23)
    )
    data = {
        "home_assistant": (
            home,
            {"descriptions/de": (0, 7), "translations/zz": (7, 37), "translations/ar": (37, 60)},
        ),
        "aws_api": (fake_rows("aws_api", "en", 20), {"aws_api/en": (0, 20)}),
        "google_api": (fake_rows("google_api", "en", 10), {"google_api/en": (0, 10)}),
    }

    def open_split(data_dir, config, split):
        assert data_dir == "somewhere"
        rows, groups = data[config] if split == "train" else ([], {})
        return MemoryRecords(rows) if isinstance(rows, list) else rows, groups

    monkeypatch.setattr(tasks.package_texts, "open_split", open_split)
    return data


def test_task_gives_prefixed_truncated_ids_in_order(builders, vocabulary):
    mixture = tasks.register("somewhere", vocabulary, query_length=12, document_length=24)
    assert sorted(task.name for task in mixture.tasks) == sorted(builders_tasks())
    task = seqio.TaskRegistry.get("translations")
    assert list(task.source.groups["train"].items()) == [("zz", (7, 37)), ("ar", (37, 60))]
    found = list(task.get_dataset(split="train", shuffle=False).as_numpy_iterator())
    rows = builders["home_assistant"][0]
    assert [row["row"] for row in found] == list(range(7, 60))
    for row in found:
        source = rows[row["row"]]
        assert row["language"].decode() == source["language"]
        assert row["query_text"].decode() == source["query"]
        for name, prefix, limit in (
            ("query", QUERY_PREFIX, 12),
            ("document", DOCUMENT_PREFIX, 24),
        ):
            expected = vocabulary.encode_text(prefix + source[name], limit)
            np.testing.assert_array_equal(row[name], expected)
            assert row[name].dtype == np.int32 and row[name][-1] == 2 and row[name][0] == 0
    assert max(len(row["document"]) for row in found) == 24  # the long ones keep </s>


def builders_tasks() -> list[str]:
    return list(MIXTURES["package_texts"])


def test_batches_equal_single_rows(builders, small):
    tasks.register("somewhere", small, 12, 24)
    task = seqio.TaskRegistry.get("translations")
    single = list(task.get_dataset(split="train", shuffle=False).as_numpy_iterator())
    position = 0
    for batch in tasks.read_tokens(task, "train", batch_size=8):
        queries, documents = batch["query"].to_list(), batch["document"].to_list()
        for query, document, row in zip(queries, documents, batch["row"].numpy(), strict=True):
            expected = single[position]
            assert row == expected["row"]
            assert query == expected["query"].tolist()
            assert document == expected["document"].tolist()
            position += 1
    assert position == len(single) == 53


def test_registering_again_replaces(builders, small):
    tasks.register("somewhere", small, 12, 24)
    first = seqio.TaskRegistry.get("aws_api")
    mixture = tasks.register("somewhere", small, 6, 8, rates={"aws_api": 1, "google_api": 3})
    assert seqio.TaskRegistry.get("aws_api") is not first
    rows = seqio.TaskRegistry.get("aws_api").get_dataset(split="train", shuffle=False)
    assert max(len(row["document"]) for row in rows.as_numpy_iterator()) == 8
    assert seqio.MixtureRegistry.get("package_texts") is mixture


def test_rates(builders, small):
    mixture = tasks.register("somewhere", small, 12, 24)
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates == {"translations": 53, "descriptions": 7, "aws_api": 20, "google_api": 10}
    mixture = tasks.register("somewhere", small, 12, 24, rates={"translations": 2, "aws_api": 0.5})
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates == {"translations": 2, "aws_api": 0.5}
    mixed = mixture.get_dataset({"query": 12, "document": 24}, split="train", shuffle=False)
    assert set(mixed.element_spec) >= {"query", "document"}
    assert len(next(iter(mixed.as_numpy_iterator()))["query"]) <= 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rates": {"wikipedia": 1.0}}, "unknown task 'wikipedia'; package_texts has translations"),
        ({"rates": {"aws_api": 0}}, "aws_api has rate 0"),
        ({"rates": {}}, "name at least one task"),
        ({"mixture": "mc4"}, "unknown mixture 'mc4'; known: package_texts"),
    ],
)
def test_bad_registration(builders, small, arguments, message):
    with pytest.raises(UserError, match=message):
        tasks.register("somewhere", small, 12, 24, **arguments)


def test_empty_task_is_an_error(builders, small):
    builders["aws_api"] = ([], {})
    with pytest.raises(UserError, match="task aws_api has no training rows"):
        tasks.register("somewhere", small, 12, 24)


def test_invalid_text_in_the_data(builders, small):
    row = {"source": "aws_api", "language": "en"}
    records = MemoryRecords(
        [row | {"query": "caf? x", "document": "a?b"}, row | {"query": "", "document": " \x01"}]
    )
    for old, new in ((b"caf?", b"caf\xc3"), (b"a?b", b"a\xffb")):
        records.records[0] = records.records[0].replace(old, new)
    builders["aws_api"] = (records, {"aws_api/en": (0, 2)})
    tasks.register("somewhere", small, 12, 24)
    first, second = (
        seqio.TaskRegistry.get("aws_api")
        .get_dataset(split="train", shuffle=False)
        .as_numpy_iterator()
    )
    assert first["query"].tolist() == [0, *small.encode(QUERY_PREFIX + "caf\ufffd x"), 2]
    assert first["document_text"].decode() == "a\ufffdb"
    # An empty text is not dropped here; preparation counts and names it.
    assert second["query"].tolist() == [0, *small.encode(QUERY_PREFIX), 2]


def test_a_damaged_record_is_named(builders, small):
    rows = fake_rows("aws_api", "en", 3000)
    records = MemoryRecords(rows)
    builders["aws_api"] = (records, {"aws_api/en": (0, 3000)})
    tasks.register("somewhere", small, 12, 24, rates={"aws_api": 1})
    task = seqio.TaskRegistry.get("aws_api")
    texts = [t for batch in tasks.read_tokens(task, "train") for t in batch["query_text"].numpy()]
    assert [text.decode() for text in texts] == [row["query"] for row in rows]
    records.records[2345] = b"broken"
    with pytest.raises(UserError, match=r"some\.array_record: record 2345: damaged"):
        list(tasks.read_tokens(task, "train"))
