import io
import json
import lzma
import random
import unicodedata

import pytest
import sentencepiece
import tokenizers
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from test_tokenizer_json import wordpiece
from test_vocabulary import GOLDEN, MULTILINGUAL

from moe_embed_jax.errors import UserError
from moe_embed_jax.tokenizers.files import (
    find_tokenizer,
    load_tokenizer,
    write_tokenizer,
)
from moe_embed_jax.tokenizers.tokenizer_json import TokenizerJson
from moe_embed_jax.tokenizers.vocabulary import (
    DOCUMENT_PREFIX,
    QUERY_PREFIX,
    Vocabulary,
    train_vocabulary,
)

# What the steps before the table of replacements are there for, and what must not change.
UNUSUAL = [
    unicodedata.normalize("NFD", "Việt Nam: nếu, ộ, ữ, ặ; naïve café, Ångström, ǖ, ǭ"),
    unicodedata.normalize("NFD", "장치에 연결할 수 없습니다."),
    unicodedata.normalize("NFD", "デバイスに ガギグ パピプ"),
    unicodedata.normalize("NFD", "যৌন পুরনো ಜೆರೇಮಿ ನೋಡಿ പോലീസ് കൊട്ട இண்டோமி తెలుగులో ဦး"),
    "ﾃﾞｰﾀ ﾊﾟｿｺﾝ カ\uff9e",  # halfwidth, the voicing mark a character of its own
    "ê\u0301 ê\u0323 e\u0302\u0301 e\u0302\u0323 e\u0323\u0302 u\u031b\u0323 o\u0340 o\u0341",
    "\uac00\u11a8 \u1100\u1161\u11a8 \u1100\u1161",
    "بِسْمِ اللَّهِ الرَّحْمَٰنِ שָׁלוֹם בְּרֵאשִׁית יִשְׂרָאֵל קאַפּיטל",
    "หนังสือ น้ำ ที่นี่ ສະບາຍດີ किताबें क़लम",
    "ﬁ\u0301 ½\u0301 ²\u200d³ ™\ufe0f ①\u20e3 1\ufe0f\u20e3 ❤\ufe0f 👩\u200d👩\u200d👧 🇩🇪",
    "  two  spaces\ttabs\r\nlines\u00a0and\u2028others\u3000\u200b\u0085 ",
    "\u0301 a mark first, \u0301",
    "bell\x07 nul\x00 delete\x7f soft\u00adhyphen \ufeffbom \ufffd",
    "",
    "   ",
    "ＡＢＣ１２３ ㎏ ℃ … ﷺ",
    "\u1bc0\u1bc1 \u1bc2",
]
SENTENCES = [
    *MULTILINGUAL,
    *UNUSUAL,
    *(prefix + text for prefix in (QUERY_PREFIX, DOCUMENT_PREFIX) for text in MULTILINGUAL),
    "in between search_query: and search_document:, search_query:x xsearch_query: search_query",
]
MARKUP = ["a <s> b", "</s>", "x<mask>y <pad>", "<unk>", "＜s＞", "<s", "s>"]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    generator = random.Random(0)
    words = [word for text in [*MULTILINGUAL, *UNUSUAL] for word in text.split()]
    words += ["".join(generator.choices("abcdefghiklmnoprstu<>/", k=5)) for _ in range(300)]
    return [" ".join(generator.choices(words, k=12)) for _ in range(800)]


@pytest.fixture(scope="module")
def small(corpus, tmp_path_factory) -> Vocabulary:
    return train_vocabulary(corpus, tmp_path_factory.mktemp("v") / "sp.model", size=800)


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    """A folder as an export writes it."""
    folder = tmp_path_factory.mktemp("export") / "model"
    write_tokenizer(small, folder, 64)
    return folder


def open_plain(folder) -> tokenizers.Tokenizer:
    """The exported tokenizer.json as transformers runs it: markup in a text is text."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def assert_same_ids(vocabulary, tokenizer, texts):
    encodings = tokenizer.encode_batch(texts)
    for text, ours, theirs in zip(
        texts, vocabulary.encode_texts(texts, 1 << 20), encodings, strict=True
    ):
        assert theirs.ids == ours.tolist(), ascii(text)


# ---- The ids -------------------------------------------------------------------------------------


def test_same_ids(small, exported):
    assert_same_ids(small, open_plain(exported), SENTENCES)
    one = open_plain(exported).encode(QUERY_PREFIX + "device")
    assert one.tokens[1] == "▁search_query:"


def test_same_ids_as_transformers_js_reads_the_file(small, exported):
    """It puts a string pattern of Split into a capture group, which keeps the spaces, and replaces
    the table by two patterns and NFKC, whatever the model says."""
    content = json.loads((exported / "tokenizer.json").read_text())
    split, _ = content["pre_tokenizer"]["pretokenizers"]
    assert split["type"] == "Split" and split["pattern"] == {"Regex": " "}
    removed = r"[\x01-\x08\x0B\x0E-\x1F\x7F\x8F\x9F]"
    spaces = r"[\t\n\f\r\xA0\u1680\u2000-\u200F\u2028\u2029\u202F\u205F\u2581\u3000\uFEFF\uFFFD]"
    steps = content["normalizer"]["normalizers"]
    place = [step["type"] for step in steps].index("Precompiled")
    steps[place : place + 1] = [
        {"type": "Replace", "pattern": {"Regex": removed}, "content": ""},
        {"type": "Replace", "pattern": {"Regex": spaces}, "content": " "},
        {"type": "NFKC"},
    ]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    joined = "സ്ത്രീകള്\u200dക്ക് 👩\u200d👧 ab\u200dcd"  # this model keeps the joiner
    assert "\u200d" in small._processor.normalize("a\u200db")
    assert_same_ids(small, tokenizer, [*SENTENCES, joined])


def test_markup_is_text(small, exported):
    tokenizer = open_plain(exported)
    assert_same_ids(small, tokenizer, MARKUP)
    # Unless a runtime reads tokenizer.json alone, which cannot say so.
    tokenizer.encode_special_tokens = False
    assert tokenizer.encode("a <s> b").ids[1:-1] == [*small.encode("a"), 0, *small.encode("b")]


def test_markup_without_pieces_for_its_characters(tmp_path):
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefghiklmnoprstu", k=6)) for _ in range(300)]
    texts = [" ".join(generator.choices(words, k=9)) for _ in range(300)]
    vocabulary = train_vocabulary(texts, tmp_path / "sp.model", size=200)
    assert vocabulary.unk_id in vocabulary.encode("<")
    write_tokenizer(vocabulary, tmp_path / "export", 64)
    assert_same_ids(vocabulary, open_plain(tmp_path / "export"), [*MARKUP, "<<s>> < >", *SENTENCES])


CHARACTERS = [
    *"aeoukAEOêếộàü ąǭ ạﬁ½か한가 \u1100\u1161\u11a8اَّשּׁकनิ่่าৌো👩🇩\n\t\u00a0<>",
    *"\u0300\u0301\u0302\u0304\u0306\u0307\u0308\u030c\u0323\u0327\u0328\u031b\u200b\u200c\u200d\ufe0f",
    *("ｶﾞ", "ﾊﾟ", "<s>", "\u1111\u1171\u11b6"),
]


@given(text=st.lists(st.sampled_from(CHARACTERS), max_size=30).map("".join))
def test_any_text(small, exported, text):
    tokenizer = open_plain(exported)
    normal = "".join(
        "▁" + word for word in tokenizer.normalizer.normalize_str(text).split(" ") if word
    )
    expected = small._processor.normalize(text)
    # SentencePiece composes some compatibility characters ("ª") with the mark behind them.
    assert unicodedata.normalize("NFC", normal) == unicodedata.normalize("NFC", expected)
    ours, theirs = small.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
    if ours != theirs and normal == expected:
        # Equally likely segmentations.
        scores = [
            sum(-100.0 if i == small.unk_id else small._processor.get_score(i - 1) for i in ids)
            for ids in (ours, theirs)
        ]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.fixture(scope="module")
def xlmr(tmp_path_factory):
    path = SHARED / "data/xlmr_tokenizer/sentencepiece.bpe.model"
    if not path.is_file():
        pytest.skip("needs XLM-R's SentencePiece model in ../shared")
    vocabulary = Vocabulary.load(path)
    folder = tmp_path_factory.mktemp("xlmr")
    write_tokenizer(vocabulary, folder, 512)
    return vocabulary, folder, open_plain(folder)


def test_xlmr(xlmr):
    vocabulary, folder, tokenizer = xlmr
    assert tokenizer.get_vocab_size() == 250_002
    assert_same_ids(vocabulary, tokenizer, [*SENTENCES, *MARKUP])
    for text, ids in GOLDEN:
        assert tokenizer.encode(text).ids == ids
    assert find_tokenizer(folder).name == "sentencepiece.bpe.model"
    assert isinstance(load_tokenizer(folder), Vocabulary)


def test_xlmr_on_sentences_in_78_languages(xlmr):
    files = sorted((SHARED / "data/sib200_flores").glob("*.tsv.xz"))
    if not files:
        pytest.skip("needs sib200_flores in ../shared")
    vocabulary, _, tokenizer = xlmr
    for file in files:
        rows = lzma.decompress(file.read_bytes()).decode().splitlines()[1:21]
        assert_same_ids(vocabulary, tokenizer, [row.split("\t")[3] for row in rows])


def test_transformers_gives_the_same_ids(small, exported, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    texts = [*SENTENCES, *MARKUP, "a long text " * 40]
    expected = [ids.tolist() for ids in small.encode_texts(texts, 64)]
    assert tokenizer(texts, truncation=True)["input_ids"] == expected
    assert tokenizer(texts, truncation=True, max_length=9)["input_ids"] == [
        ids.tolist() for ids in small.encode_texts(texts, 9)
    ]
    assert (tokenizer.pad_token_id, len(tokenizer)) == (1, small.size)


# ---- The files -----------------------------------------------------------------------------------


def test_files_of_a_vocabulary(small, exported):
    assert sorted(path.name for path in exported.iterdir()) == [
        "sentencepiece.model",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((exported / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == 64 and config["split_special_tokens"]
    special = json.loads((exported / "special_tokens_map.json").read_text())
    assert (special["cls_token"], special["sep_token"]) == ("<s>", "</s>")
    content = json.loads((exported / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    assert ids == {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": small.mask_id}
    assert all(t["special"] and not t["normalized"] for t in content["added_tokens"])
    assert content["model"]["type"] == "Unigram" and len(content["model"]["vocab"]) == small.size
    # What llama.cpp's converter reads.
    steps = {step["type"]: step for step in content["normalizer"]["normalizers"]}
    table = steps["Precompiled"]["precompiled_charsmap"]
    assert content["normalizer"]["precompiled_charsmap"] == table
    assert config["add_prefix_space"] and config["clean_up_tokenization_spaces"]


def test_files_of_a_tokenizer_json(tmp_path):
    original = TokenizerJson(wordpiece().to_str().encode())
    write_tokenizer(original, tmp_path, 32)
    assert (tmp_path / "tokenizer.json").read_bytes() == original.model_bytes
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 32 and "split_special_tokens" not in config
    assert json.loads((tmp_path / "special_tokens_map.json").read_text()) == {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }
    again = load_tokenizer(tmp_path)
    assert isinstance(again, TokenizerJson) and again.content_hash == original.content_hash


def test_which_file_is_read(small, exported, tmp_path):
    assert load_tokenizer(tmp_path) is None and find_tokenizer(tmp_path) is None
    loaded = load_tokenizer(exported)
    assert isinstance(loaded, Vocabulary) and loaded.content_hash == small.content_hash
    wordpiece().save(str(tmp_path / "tokenizer.json"))
    assert isinstance(load_tokenizer(tmp_path), TokenizerJson)
    (tmp_path / "sentencepiece.model").write_bytes(small.model_bytes)
    pieces = tmp_path / "sentencepiece.bpe.model"
    pieces.write_bytes(small.model_bytes)
    assert find_tokenizer(tmp_path).name == "tokenizer.json"  # as transformers does
    # Two tokenizers with other ids: the other one is not silently taken.
    with pytest.raises(UserError, match=r"tokenizer\.json gives the pieces .* other ids"):
        load_tokenizer(pieces)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(pieces)
    (tmp_path / "tokenizer.json").write_text("{")
    for path in (pieces, tmp_path):
        with pytest.raises(UserError, match=r"tokenizer\.json is not JSON"):
            load_tokenizer(path)
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).size == small.size


def trained_with(corpus, **options) -> Vocabulary:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=800,
        minloglevel=2,
        **{"model_type": "unigram"} | options,
    )
    return Vocabulary(model.getvalue())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "bpe"}, "is no unigram model"),
        ({"byte_fallback": True}, "falls back to bytes"),
        ({"add_dummy_prefix": False}, "treats white space otherwise"),
        ({"remove_extra_whitespaces": False}, "treats white space otherwise"),
        ({"split_by_whitespace": False}, "beyond one word"),
    ],
)
def test_models_that_tokenizers_cannot_follow(corpus, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        write_tokenizer(trained_with(corpus, **options), tmp_path, 64)


def test_models_without_replacements(corpus, tmp_path):
    vocabulary = trained_with(corpus, normalization_rule_name="identity")
    write_tokenizer(vocabulary, tmp_path, 64)
    assert_same_ids(vocabulary, open_plain(tmp_path), SENTENCES)


def test_pieces_that_are_never_found(small, tmp_path):
    """Control and unused pieces of other trainers."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(small.model_bytes)
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    longest = sorted(model.pieces[5:], key=lambda piece: -len(piece.piece))
    longest[0].type, longest[1].type = kind.UNUSED, kind.CONTROL
    vocabulary = Vocabulary(model.SerializeToString())
    write_tokenizer(vocabulary, tmp_path, 64)
    texts = [longest[0].piece[1:], longest[1].piece[1:], *SENTENCES]
    assert_same_ids(vocabulary, open_plain(tmp_path), texts)
