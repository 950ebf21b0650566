import random
import unicodedata

import numpy as np
import pytest
import sentencepiece
from conftest import ROOT

from moe_embed_jax.errors import UserError
from moe_embed_jax.tokenizers.vocabulary import (
    DOCUMENT_PREFIX,
    QUERY_PREFIX,
    Vocabulary,
    content_ids,
    train_vocabulary,
)

XLMR = ROOT.parent / "shared/data/xlmr_tokenizer/sentencepiece.bpe.model"

# Reference encodings of XLM-R as published in the tests of Hugging Face transformers
# (tests/models/xlm_roberta/test_tokenization_xlm_roberta.py), made there with fairseq. Where the
# two differ - a literal "<unk>" is markup for transformers and text for fairseq - fairseq's.
GOLDEN = [
    (
        "Hello World!",
        "0 35378 6661 38 2",
    ),
    (
        'This is a very long text with a lot of weird characters, such as: . , ~ ? ( ) " [ ] ! '
        ": - . Also we will add words that should not exsist and be tokenized to <unk>, such as"
        " saoneuhaoesuth",
        "0 3293 83 10 4552 4989 7986 678 10 5915 111 179459 124850 4 6044 237 12 6 5 6 4 6780 "
        "705 15 1388 44 378 10114 711 152 20 6 5 22376 642 1221 15190 34153 450 5608 959 1119 "
        "57702 136 186 47 1098 29367 47 4426 3678 2740 4 6044 237 6284 50901 528 31 90 34 927 2",
    ),
    (
        "Transformers (formerly known as pytorch-transformers and pytorch-pretrained-bert) "
        "provides general-purpose architectures (BERT, GPT-2, RoBERTa, XLM, DistilBert, "
        "XLNet...) for Natural Language Understanding (NLU) and Natural Language Generation "
        "(NLG) with over 32+ pretrained models in 100+ languages and deep interoperability "
        "between Jax, PyTorch and TensorFlow.",
        "0 11062 82772 7 15 82772 538 51529 237 17198 1290 206 9 215175 1314 136 17198 1290 206"
        " 9 56359 42 122009 9 16466 16 87344 4537 9 4717 78381 6 159958 7 15 24480 618 4 527 "
        "22693 5428 4 2777 24480 9874 4 43523 594 4 803 18392 33189 18 4 43523 24447 12399 100 "
        "24955 83658 9626 144057 15 839 22335 16 136 24955 83658 83479 15 39102 724 16 678 645 "
        "2789 1328 4589 42 122009 115774 23 805 1328 46876 7 136 53894 1940 42227 41159 17721 "
        "823 425 4 27512 98722 206 136 5531 4970 919 17336 5 2",
    ),
    (
        "BERT is designed to pre-train deep bidirectional representations from unlabeled text "
        "by jointly conditioning on both left and right context in all layers.",
        "0 20080 618 83 82775 47 479 9 1517 73 53894 333 80581 110117 18811 5256 1295 51 152526"
        " 297 7986 390 124416 538 35431 214 98 15044 25737 136 7108 43701 23 756 135355 7 5 2",
    ),
    (
        "The quick brown fox jumps over the lazy dog.",
        "0 581 63773 119455 6 147797 88203 7 645 70 21 3285 10269 5 2",
    ),
]
GOLDEN = [(text, [int(i) for i in ids.split()]) for text, ids in GOLDEN]

MULTILINGUAL = [
    "Configure the network connection of your device.",
    "Gerät konnte nicht über die lokale Schnittstelle erreicht werden – ist es eingeschaltet?",
    "无法连接到设备，请检查网络设置。",
    "デバイスに接続できませんでした。ネットワークを確認してください。",
    "Не удалось подключиться к устройству.",
    "تعذر الاتصال بالجهاز، تحقق من إعدادات الشبكة.",
    "לא ניתן להתחבר למכשיר",
    "장치에 연결할 수 없습니다.",
    "ไม่สามารถเชื่อมต่อกับอุปกรณ์ได้",
    "Δεν ήταν δυνατή η σύνδεση με τη συσκευή.",
    "डिवाइस से कनेक्ट नहीं हो सका",
    "emoji 👩‍👩‍👧 and ﬁ ligature, fullwidth ＡＢＣ, e\u0301 combining",
]


@pytest.fixture(scope="module")
def xlmr() -> Vocabulary:
    if not XLMR.is_file():
        pytest.skip(f"needs XLM-R's SentencePiece model in {XLMR.parent.name}")
    return Vocabulary.load(XLMR)


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    generator = random.Random(0)
    words = [word for text in MULTILINGUAL for word in text.split()]
    words += ["".join(generator.choices("abcdefghiklmnoprstu", k=5)) for _ in range(300)]
    return [" ".join(generator.choices(words, k=12)) for _ in range(800)]


@pytest.fixture(scope="module")
def small(corpus, tmp_path_factory) -> Vocabulary:
    return train_vocabulary(corpus, tmp_path_factory.mktemp("v") / "new" / "sp.model", size=400)


def test_xlmr_layout(xlmr):
    assert (xlmr.bos_id, xlmr.pad_id, xlmr.eos_id, xlmr.unk_id) == (0, 1, 2, 3)
    assert (xlmr.mask_id, xlmr.size) == (250001, 250002)
    assert len(xlmr.content_hash) == 64


@pytest.mark.parametrize(
    ("text", "ids"), GOLDEN, ids=lambda v: v[:20] if isinstance(v, str) else ""
)
def test_xlmr_equals_published_encodings(xlmr, text, ids):
    assert xlmr.encode_text(text, 512).tolist() == ids
    assert xlmr.encode(text) == ids[1:-1]
    assert xlmr.encode_batch([text, "x"])[0] == ids[1:-1]


def test_decode_round_trip(xlmr):
    texts = [text for text in MULTILINGUAL if unicodedata.is_normalized("NFKC", text)]
    assert len(texts) > 7
    for text in texts:
        assert xlmr.decode(xlmr.encode_text(text, 512)) == text
    assert xlmr.decode([0, 35378, 250001, 1, 2]) == "Hello"
    with pytest.raises(UserError, match="250002 is outside"):
        xlmr.decode([250002])


@pytest.mark.parametrize("text", ["", "   ", "\n\t ", "\x01\x02\x7f", b""])
def test_texts_without_ids(xlmr, text):
    assert xlmr.encode(text) == []
    assert xlmr.encode_text(text, 8).tolist() == [0, 2]


def test_invalid_unicode_is_replaced_not_refused(xlmr):
    assert xlmr.encode("a\ud800b") == xlmr.encode("a\ufffdb")
    assert xlmr.encode("\ud83d\ude00") == xlmr.encode("😀")
    assert xlmr.encode(b"caf\xc3\xa9 \xff ok") == xlmr.encode("café \ufffd ok")
    assert xlmr.encode_batch(["x\udfff", b"\xc3"]) == [
        xlmr.encode("x\ufffd"),
        xlmr.encode("\ufffd"),
    ]
    # NUL is an ordinary unknown character and does not end the text.
    assert xlmr.encode("a\0b") == [*xlmr.encode("a"), 3, xlmr._processor.piece_to_id("b") + 1]


def test_other_types_are_refused(xlmr):
    with pytest.raises(UserError, match="must be a string, got NoneType"):
        xlmr.encode(None)
    with pytest.raises(UserError, match="got float"):
        xlmr.encode_batch(["a", 1.5])


def test_encode_text_truncates_and_keeps_eos(xlmr):
    whole = xlmr.encode(GOLDEN[2][0])
    cut = xlmr.encode_text(GOLDEN[2][0], 16)
    assert cut.dtype == np.int32 and cut.tolist() == [0, *whole[:14], 2]
    assert xlmr.encode_text("a b c", 2).tolist() == [0, 2]
    with pytest.raises(UserError, match="no room"):
        xlmr.encode_text("a", 1)


def _long_texts() -> dict[str, str]:
    generator = random.Random(1)
    mixed = " ".join(generator.choices(MULTILINGUAL, k=20000))
    return {
        "mixed": mixed,
        "no spaces": MULTILINGUAL[2] * 60000,
        "one word": "a" * 1_000_000,
        "spaces first": " " * 1_000_000 + "hello world " * 10,
        "unknown": "\u1bc0 " * 50_000 + "\u1bc0" * 900_000,
        "other white space": "one\u00a0two\u3000three\n" * 70_000,
        "lines": "first line\nsecond line\n" * 50_000,
    }


@pytest.mark.parametrize("name", list(_long_texts()))
@pytest.mark.parametrize("max_ids", [1, 30, 2046])
def test_one_megabyte_gives_the_same_first_ids(xlmr, name, max_ids):
    text = _long_texts()[name]
    assert len(text) > 900_000 or name == "mixed"
    assert xlmr.encode(text, max_ids=max_ids) == xlmr.encode(text)[:max_ids]


def test_long_texts_are_cut_before_tokenising(xlmr):
    text = _long_texts()["mixed"]
    head = xlmr.head(text, 510)
    assert len(head) < 10_000 and text.startswith(head)
    assert xlmr.head("short text", 1) == "short text"


@pytest.mark.parametrize("max_ids", [5, 100, 700])
def test_cut_is_exact_on_random_texts(xlmr, max_ids):
    generator = random.Random(max_ids)
    for _ in range(20):
        text = "".join(
            generator.choice(" ,.-") + generator.choice(generator.choice(MULTILINGUAL).split())
            for _ in range(4000)
        )
        assert len(xlmr.head(text, max_ids)) < len(text)
        assert xlmr.encode(text, max_ids=max_ids) == xlmr.encode(text)[:max_ids]


# ---- Small vocabularies --------------------------------------------------------------------------


def test_trained_vocabulary_has_the_same_layout(small):
    assert small.size == 400 and small.mask_id == 399
    ids = [i for text in MULTILINGUAL for i in small.encode(text)]
    assert min(ids) >= 3 and max(ids) < small.mask_id
    assert small.decode(small.encode_text(MULTILINGUAL[0], 99)) == MULTILINGUAL[0]
    assert small.encode("\u1bc0\u1bc1")[-1] == small.unk_id


def test_a_prefix_is_one_token(small):
    word = small.encode("device.")
    for prefix in (QUERY_PREFIX, DOCUMENT_PREFIX):
        assert len(small.encode(prefix)) == 1
        assert small.encode(prefix + "device.") == [*small.encode(prefix), *word]
    assert small.encode(QUERY_PREFIX) != small.encode(DOCUMENT_PREFIX)


def test_training_is_deterministic_whatever_the_order(small, corpus, tmp_path):
    again = train_vocabulary(reversed([*corpus, corpus[0], "  "]), tmp_path / "a.model", size=400)
    assert again.model_bytes == small.model_bytes
    assert (tmp_path / "a.model").read_bytes() == small.model_bytes
    assert [path.name for path in tmp_path.iterdir()] == ["a.model"]
    assert Vocabulary.load(tmp_path / "a.model").content_hash == small.content_hash


def test_training_limits_lines(corpus, tmp_path):
    long = ["one two three four " * 10_000, "a\0b", *corpus]
    few = train_vocabulary(long, tmp_path / "b.model", 300, max_lines=100, max_line_characters=20)
    assert few.size == 300


def test_too_little_text(tmp_path):
    with pytest.raises(
        UserError, match=r"9000 ids on 2 lines: this text allows at most \d+; choose"
    ):
        train_vocabulary(["hello world", "some more"], tmp_path / "c.model", size=9000)
    with pytest.raises(UserError, match="no text to train"):
        train_vocabulary(["", "  "], tmp_path / "c.model")
    with pytest.raises(UserError, match=r"20 ids on 500 lines: its characters alone need 50\d;"):
        train_vocabulary([chr(0x4E00 + i) * 3 for i in range(500)], tmp_path / "c.model", size=20)
    assert not list(tmp_path.iterdir())


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.model does not exist"):
        Vocabulary.load(tmp_path / "nothing.model")
    for content in (b"", b"this is no model", bytes(5000)):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.model is not a SentencePiece model"):
            Vocabulary.load(tmp_path / "bad.model")


def test_a_piece_that_is_no_text(small, tmp_path):
    word = next(p for p in small._processor.id_to_piece(list(range(300))) if len(p) > 4).encode()
    (tmp_path / "bad.model").write_bytes(small.model_bytes.replace(word, b"\xff" * len(word), 1))
    with pytest.raises(UserError, match=r"bad\.model is (damaged|not a SentencePiece)"):
        Vocabulary.load(tmp_path / "bad.model")


def test_wrong_layout(corpus, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(tmp_path / "t5"),
        vocab_size=300,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"unk, bos, eos, pad at \(2, -1, 1, 0\)"):
        Vocabulary.load(tmp_path / "t5.model")


def test_truncated_model_file(small, tmp_path):
    (tmp_path / "cut.model").write_bytes(small.model_bytes[: len(small.model_bytes) // 2])
    with pytest.raises(UserError, match=r"cut\.model"):
        Vocabulary.load(tmp_path / "cut.model")


# ---- Content ids ---------------------------------------------------------------------------------


def test_content_ids():
    ids = content_ids(["é", "e\u0301 \n", b"\xc3\xa9", "e", ""])
    assert ids.shape == (5, 2) and ids.dtype == np.int32
    assert (ids[0] == ids[1]).all() and (ids[0] == ids[2]).all()
    assert len({tuple(row) for row in ids.tolist()}) == 3
    assert (content_ids(["e"])[0] == ids[3]).all()
    assert content_ids([]).shape == (0, 2)
    # A fixed value: stores written today must match texts hashed tomorrow.
    assert content_ids(["search"])[0].tolist() == [-1562656743, 177177603]


def test_content_ids_do_not_collide_easily():
    ids = content_ids([f"text {i}" for i in range(20000)])
    assert len(np.unique(ids, axis=0)) == 20000
