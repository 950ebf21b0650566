import json

import numpy as np
import pytest
import tokenizers
from conftest import run_python
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from moe_embed_jax.errors import UserError
from moe_embed_jax.tokenizers.tokenizer_json import TokenizerJson

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Configure the network connection of your device, then restart it.",
    "Gerät konnte nicht über die lokale Schnittstelle erreicht werden.",
    "search_query: how do I embed a text?",
    "search_document: Embeddings are vectors.",
    "无法连接到设备，请检查网络设置。",
]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def around(tokenizer: tokenizers.Tokenizer, template: str) -> tokenizers.Tokenizer:
    names = [part for part in template.split() if part != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )
    return tokenizer


def train(tokenizer: tokenizers.Tokenizer, trainer) -> tokenizers.Tokenizer:
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    return tokenizer


def wordpiece(template: str = "[CLS] $A [SEP]") -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    train(
        tokenizer,
        trainers.WordPieceTrainer(vocab_size=180, special_tokens=SPECIALS, show_progress=False),
    )
    return around(tokenizer, template)


def byte_pairs() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "<|padding|>", "</s>"]
    train(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    train(
        tokenizer,
        trainers.UnigramTrainer(
            vocab_size=150, special_tokens=specials, unk_token="<unk>", show_progress=False
        ),
    )
    return around(tokenizer, "<s> $A </s>")


KINDS = {"wordpiece": wordpiece, "byte_pairs": byte_pairs, "unigram": unigram}


def wrap(tokenizer: tokenizers.Tokenizer) -> TokenizerJson:
    return TokenizerJson(tokenizer.to_str().encode())


@pytest.fixture(scope="module")
def bert() -> TokenizerJson:
    return wrap(wordpiece())


@pytest.fixture(scope="module", params=KINDS)
def both(request) -> tuple[tokenizers.Tokenizer, TokenizerJson]:
    """The library's tokenizer and ours of the same file."""
    original = KINDS[request.param]()
    return original, wrap(original)


def test_layout(bert):
    assert (bert.pad_id, bert.unk_id, bert.bos_id, bert.eos_id, bert.mask_id) == (0, 1, 2, 3, 4)
    assert bert.size == 180 and len(bert.content_hash) == 64
    assert bert.token_of(bert.bos_id) == "[CLS]"


def test_layout_of_other_models():
    roberta, xlmr = wrap(byte_pairs()), wrap(unigram())
    assert (roberta.bos_id, roberta.pad_id, roberta.eos_id) == (0, 1, 2)
    assert roberta.unk_id is None and roberta.mask_id is None
    assert (xlmr.bos_id, xlmr.pad_id, xlmr.eos_id, xlmr.unk_id, xlmr.mask_id) == (0, 1, 2, 3, 4)


def test_added_tokens_count():
    original = wordpiece()
    original.add_tokens(["▁newest"])
    assert wrap(original).size == original.get_vocab_size() == 181
    assert wrap(original).encode("the ▁newest") == [*wrap(original).encode("the"), 180]


def test_a_padding_token_is_not_needed():
    original = wordpiece()
    content = json.loads(original.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "[PAD]"]
    assert TokenizerJson(json.dumps(content).encode()).pad_id == 3  # [SEP]
    original.enable_padding(pad_id=7, pad_token="x")
    assert wrap(original).pad_id == 7


TEXTS = st.lists(st.text(max_size=60) | st.sampled_from([*SENTENCES, "a [SEP] b", "[MASK]"]))


@given(texts=TEXTS, max_length=st.integers(2, 30))
def test_ids_are_the_librarys_own_truncated_ids(both, texts, max_length):
    original, ours = both
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    original.enable_truncation(max_length)
    expected = [encoding.ids for encoding in original.encode_batch(texts)]
    found = ours.encode_texts(texts, max_length)
    assert [ids.tolist() for ids in found] == expected
    assert all(ids.dtype == np.int32 for ids in found)


def test_batches_and_arrays(both):
    ours = both[1]
    one_by_one = [ours.encode(text) for text in SENTENCES]
    assert ours.encode_batch(SENTENCES) == one_by_one
    flat, lengths = ours.encode_flat([text.encode() for text in SENTENCES], max_ids=4)
    assert flat.dtype == np.int32 and lengths.dtype == np.int64
    assert lengths.tolist() == [min(4, len(ids)) for ids in one_by_one]
    assert flat.tolist() == [i for ids in one_by_one for i in ids[:4]]
    assert ours.encode_texts([], 8) == []
    assert [part.tolist() for part in ours.encode_flat([])] == [[], []]
    many = SENTENCES * 400
    assert ours.encode_batch(many) == one_by_one * 400


def test_texts_without_ids_and_invalid_unicode(bert):
    for text in ("", "  \n\t", b""):
        assert bert.encode(text) == [] and bert.encode_text(text, 8).tolist() == [2, 3]
    assert bert.encode("\ud83d\ude00") == bert.encode("😀")
    assert bert.encode(b"caf\xc3\xa9 \xff the") == bert.encode("café \ufffd the")
    with pytest.raises(UserError, match="must be a string, got NoneType"):
        bert.encode(None)
    with pytest.raises(UserError, match="no room"):
        bert.encode_text("a", 1)


def test_settings_saved_in_the_file_do_not_count():
    original = wordpiece()
    plain = wrap(original)
    original.enable_truncation(5)
    original.enable_padding(length=12, pad_id=0, pad_token="[PAD]")
    ours = wrap(original)
    for text in SENTENCES:
        assert ours.encode_text(text, 64).tolist() == plain.encode_text(text, 64).tolist()
        assert len(ours.encode_text(text, 64)) > 5 or len(plain.encode(text)) < 4


def test_decode(bert):
    assert bert.decode(bert.encode_text("The Quick brown FOX", 99)) == "the quick brown fox"
    with pytest.raises(UserError, match=r"180 is outside the vocabulary \[0, 180\)"):
        bert.decode([180])


# ---- Long texts ----------------------------------------------------------------------------------


LONG = {
    "words": " ".join(SENTENCES) * 2000,
    "lines": "one line\nanother line \n" * 20_000,
    "one word": "a" * 400_000,
    "spaces first": " " * 200_000 + "the quick fox " * 10,
    "markup": "the quick [MASK] [SEP] fox " * 9000,
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("max_ids", [1, 30, 510])
def test_a_long_text_gives_the_same_first_ids(bert, name, max_ids):
    assert bert.encode(LONG[name], max_ids) == bert.encode(LONG[name])[:max_ids]


def test_long_texts_are_cut_where_that_is_exact(bert):
    text = LONG["words"]
    for tokenizer in (bert, wrap(unigram())):
        head = tokenizer.head(text, 500)
        assert len(head) < 10_000 and text.startswith(head)
    # A byte-level tokenizer attaches the space to the next word, and some cross words.
    assert wrap(byte_pairs()).head(text, 500) == text
    original = wordpiece()
    original.add_tokens(["quick brown"])
    assert wrap(original).head(text, 500) == text


# ---- Unusable files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"model": ', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"tokenizer_class": "BertTokenizer"}', 'no section "model"'),
        (b'{"model": {"type": "Quantum"}}', "cannot be read by tokenizers"),
        (b'{"model": {}, "added_tokens": [{"content": "\\u0000"}]}', "holds a NUL character"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        TokenizerJson.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram"])
def test_a_tokenizer_without_an_unknown_token(kind):
    model = {
        "WordPiece": tokenizers.models.WordPiece(
            {"a": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="[UNK]"
        ),
        "Unigram": tokenizers.models.Unigram([("a", -1.0), ("[CLS]", 0.0), ("[SEP]", 0.0)]),
    }[kind]
    made = tokenizers.Tokenizer(model)
    made.add_special_tokens(["[CLS]", "[SEP]"])
    with pytest.raises(UserError, match=r"has no token for what its vocabulary lacks .*unk_token"):
        wrap(around(made, "[CLS] $A [SEP]"))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.json does not exist"):
        TokenizerJson.load(tmp_path / "nothing.json")


@pytest.mark.parametrize("template", ["$A", "$A [SEP]", "[CLS] [CLS] $A [SEP]", "[CLS] $A"])
def test_one_special_token_at_each_end(template):
    with pytest.raises(UserError, match=r"one special token at each end.*post_processor"):
        wrap(wordpiece(template))


def test_truncation_at_the_beginning_is_refused():
    original = wordpiece()
    original.enable_truncation(8, direction="left")
    with pytest.raises(UserError, match="at their beginning"):
        wrap(original)


# ---- The process around it -----------------------------------------------------------------------


def test_no_heavy_imports(tmp_path):
    wordpiece().save(str(tmp_path / "tokenizer.json"))
    program = """
import sys
from moe_embed_jax.tokenizers.tokenizer_json import TokenizerJson
TokenizerJson.load(sys.argv[1]).encode_batch(["the quick fox"])
assert not {"torch", "transformers", "tensorflow", "jax"} & set(sys.modules)
"""
    ran = run_python(["-c", program, tmp_path / "tokenizer.json"], timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
