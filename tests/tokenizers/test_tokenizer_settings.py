"""What files beside a tokenizer change: ids are those of transformers and sentence-transformers."""

import hashlib
import json
import pathlib
import shutil

import pytest

from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.errors import UserError
from moe_embed_jax.model_folder import open_model
from moe_embed_jax.tokenizers.files import find_tokenizer, load_tokenizer, write_tokenizer
from moe_embed_jax.tokenizers.tokenizer_json import TokenizerJson, open_vocabulary
from moe_embed_jax.tokenizers.vocabulary import Vocabulary, train_vocabulary

st_folders = pytest.importorskip("helpers.st_folders")
transformers = pytest.importorskip("transformers")

TEXTS = [
    *st_folders.TEXTS,
    "[Q] new [SEP]x[MASK] [PAD] brand-new [q]",
    "a <s> b</s>c <mask> <pad><unk> <new> d <s",
]


def edit(path: pathlib.Path, **change) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | change))


def token(content: str, **flags) -> dict:
    off = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"content": content} | dict.fromkeys(off, False) | flags


def lowered(folder):
    edit(folder / "sentence_bert_config.json", do_lower_case=True)


def lowered_by_an_older_file(folder):
    (folder / "sentence_bert_config.json").unlink()
    edit(folder / "sentence_roberta_config.json", do_lower_case=True)


def split(folder):
    edit(folder / "tokenizer_config.json", split_special_tokens=True)


def split_and_lowered(folder):
    split(folder)
    lowered(folder)


def of_class_bert(folder):
    edit(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")


def of_class_bert_cased(folder):
    edit(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer", do_lower_case=False)


def of_class_bert_accents(folder):
    change = dict(do_lower_case=True, strip_accents=False)
    edit(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer", **change)


def without_config(folder):
    """The class follows from config.json."""
    (folder / "tokenizer_config.json").unlink()


def added_by_transformers(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[Q]", "brand-new"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[q]"]})
    tokenizer.save_pretrained(folder)


def added_in_the_config(folder):
    size = open_vocabulary(folder / "tokenizer.json").size
    tokens = {str(size): token("[Q]"), str(size + 1): token("brand-new", special=True)}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=tokens)


def named_in_the_config(folder):
    edit(folder / "tokenizer_config.json", extra_special_tokens=["[Q]"], bos_token="new")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings") / "bert"
    return st_folders.save_model(folder, vocab_size=256)


CHANGES = (
    lowered,
    lowered_by_an_older_file,
    split,
    split_and_lowered,
    of_class_bert,
    of_class_bert_cased,
    of_class_bert_accents,
    without_config,
    added_by_transformers,
    added_in_the_config,
    named_in_the_config,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_ids_are_those_of_the_folder(change, bert, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    change(folder)
    theirs = st_folders.load(folder).tokenizer
    ours = open_model(folder).vocabulary
    expected = theirs(TEXTS, truncation=True)["input_ids"]
    assert [ids.tolist() for ids in ours.encode_texts(TEXTS, 48)] == expected
    plain = open_vocabulary(bert / "tokenizer.json")
    assert ours.content_hash != plain.content_hash or change is of_class_bert_cased
    # One file holds it all: copies in imports and prepared data, whose names follow from it.
    (tmp_path / "tokenizer.json").write_bytes(ours.model_bytes)
    copy = open_vocabulary(tmp_path / "tokenizer.json")
    assert [ids.tolist() for ids in copy.encode_texts(TEXTS, 48)] == expected
    names = [
        vocabulary_path({"vocabulary": {"kind": "file", "path": str(path)}}, tmp_path)
        for path in (folder / "tokenizer.json", tmp_path / "tokenizer.json")
    ]
    assert names[0] == names[1]
    assert hashlib.sha256(ours.model_bytes).hexdigest() == ours.content_hash
    # And an export says it to transformers.
    write_tokenizer(ours, tmp_path / "export", 48)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert again(TEXTS, truncation=True)["input_ids"] == expected
    assert load_tokenizer(tmp_path / "export").content_hash == ours.content_hash


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tokenizer_config.json", dict(truncation_side="left"), "truncation_side"),
        ("tokenizer_config.json", dict(add_eos_token=False), "add_eos_token=false"),
        (
            "tokenizer_config.json",
            dict(added_tokens_decoder={"300": token("[Q]")}),
            r"'\[Q\]' shall have id 300, but tokenizer\.json gives it 2\d\d",
        ),
        ("tokenizer_config.json", dict(added_tokens_decoder=[3]), "is damaged"),
        ("tokenizer_config.json", dict(pad_token=7), "7 is not a token"),
        ("tokenizer_config.json", dict(split_special_tokens="yes"), "must be true or false"),
        ("added_tokens.json", {"[Q]": 299}, r"'\[Q\]' shall have id 299"),
    ],
)
def test_settings_that_cannot_be_honoured(file, change, message, bert, tmp_path):
    shutil.copytree(bert, tmp_path / "model")
    edit(tmp_path / "model" / file, **change)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "model")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Vocabulary:
    words = [*st_folders.WORDS, "<s>", "</s>", "<mask>", "<pad>", "<unk>", *"bcdu/[]QSEP"]
    texts = [" ".join(words[i % 19 :] + words[: i % 7]) for i in range(200)]
    return train_vocabulary(texts, tmp_path_factory.mktemp("pieces") / "sp.model", size=58)


def xlmr_folder(folder: pathlib.Path, pieces: Vocabulary, **config) -> pathlib.Path:
    """As transformers saves XLM-R: markup in a text is a token."""
    write_tokenizer(pieces, folder, 48)
    (folder / "sentencepiece.model").rename(folder / "sentencepiece.bpe.model")
    edit(folder / "tokenizer_config.json", **({"split_special_tokens": False} | config))
    return folder


def test_markup_is_what_the_folder_says(pieces, tmp_path):
    folder = xlmr_folder(tmp_path / "model", pieces)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens(["<new>"])
    for added in (False, True):
        if added:
            theirs.save_pretrained(folder)
        ours = load_tokenizer(folder)
        assert isinstance(ours, TokenizerJson)
        expected = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
        assert [ids.tolist() for ids in ours.encode_texts(TEXTS, 999)] == expected
        assert pieces.mask_id in expected[-1] and (pieces.size in expected[-1]) == added


def test_an_export_saved_again_keeps_markup_as_text(pieces, tmp_path):
    write_tokenizer(pieces, tmp_path / "export", 48)
    assert find_tokenizer(tmp_path / "export").name == "sentencepiece.model"
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    again.save_pretrained(tmp_path / "again")
    ours = load_tokenizer(tmp_path / "again")
    assert isinstance(ours, TokenizerJson) and ours.markup_is_text
    for mine, first in zip(
        ours.encode_texts(TEXTS, 48), pieces.encode_texts(TEXTS, 48), strict=True
    ):
        assert mine.tolist() == first.tolist()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("added_tokens.json", {"<new>": 58}, "adds the token '<new>' to sentencepiece"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"58": token("<new>")}}, "'<new>'"),
        ("tokenizer_config.json", {"additional_special_tokens": ["<new>"]}, "'<new>'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": token("<mask>")}}, "'<mask>'"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case=true"),
    ],
)
def test_pieces_alone_with_changes_are_refused(file, change, message, pieces, tmp_path):
    """They would need a tokenizer.json, which transformers writes."""
    folder = xlmr_folder(tmp_path / "model", pieces)
    (folder / "tokenizer.json").unlink()
    assert load_tokenizer(folder).content_hash == pieces.content_hash
    edit(folder / file, **change)
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)
