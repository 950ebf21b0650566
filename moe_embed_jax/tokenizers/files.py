"""Tokenizers in Hugging Face folders: which file to read, and what an export writes.

For a `TokenizerJson` an export holds the original file. For a `Vocabulary` it holds the
SentencePiece model and a `tokenizer.json` made from it here, because transformers 5,
text-embeddings-inference and transformers.js read only that one. It gives the ids of
`Vocabulary.encode_texts`, with two known exceptions:

* ties: where two segmentations are equally likely ("...." as "... ." or ". ..."), SentencePiece
  lets the rounding of its float32 sums decide, and `tokenizers` sums in float64. This concerns 10
  of 598,404 real texts in more than 110 languages with XLM-R's model, 22 with one trained here;
* a compatibility character with a combining mark behind it, such as "ª" with a grave accent.

A folder's tokenizer.json is read before its SentencePiece model, because transformers reads it: the
ids equal transformers', also for tokens that were added and markup in texts. Our exports say
`split_special_tokens`, which makes markup text; there the SentencePiece model is read.

A literal "<s>" in a text is text to SentencePiece. It is for transformers, too, because
tokenizer_config.json says `split_special_tokens`; a runtime that reads tokenizer.json alone takes
it for the special token, unless told otherwise (`Tokenizer.encode_special_tokens = True`).
"""

import functools
import json
import os
import pathlib

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as HuggingFaceTokenizer

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.json_file import flag, parse_object, read_bytes, read_optional
from moe_embed_jax.tokenizers.combining_marks import (
    BOUNDARY,
    boundary_pattern,
    hidden_characters,
)
from moe_embed_jax.tokenizers.settings import (
    CONFIG_FILE,
    MARKUP_IS_TEXT,
    MOST_BYTES,
    lower_cases,
    refuse_settings,
    wanted_tokens,
)
from moe_embed_jax.tokenizers.tokenizer import Tokenizer
from moe_embed_jax.tokenizers.tokenizer_json import TokenizerJson, open_vocabulary
from moe_embed_jax.tokenizers.vocabulary import WORD_START, Vocabulary

XLMR_SIZE = 250_002
XLMR_FILE = "sentencepiece.bpe.model"  # XLM-R's name for it
SENTENCEPIECE_FILE = "sentencepiece.model"  # ours
JSON_FILE = "tokenizer.json"
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# What SentencePiece gives a user-defined symbol in place of its score.
USER_DEFINED_SCORE = float(np.float32(-0.1))

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


def find_tokenizer(folder: str | os.PathLike) -> pathlib.Path | None:
    """The tokenizer file of a model folder: tokenizer.json before a SentencePiece model, unless
    markup in texts is text to both, and no token was added."""
    folder = storage.path(folder)
    paths = [folder / name for name in (XLMR_FILE, SENTENCEPIECE_FILE)]
    pieces = next((path for path in paths if storage.has_entry(path)), None)
    if not storage.has_entry(folder / JSON_FILE):
        return pieces
    config = folder / CONFIG_FILE
    if pieces and flag(read_optional(config), MARKUP_IS_TEXT, config):
        added = _parsed(folder / JSON_FILE).get("added_tokens")
        tokens = [isinstance(row, dict) and row.get("content") for row in added or []]
        if set(tokens) <= set(SPECIAL_TOKENS) and not lower_cases(folder):
            return pieces
    return folder / JSON_FILE


def load_tokenizer(path: str | os.PathLike) -> Tokenizer | None:
    """The tokenizer in a file or a folder; None if the folder has none.

    Raises:
      UserError: the file is missing or unusable; a SentencePiece model next to files that add
        tokens or lower-case texts, or whose tokenizer.json numbers the tokens in another way than
        XLM-R does.
    """
    path = storage.path(path)
    if path.is_dir():
        found = find_tokenizer(path)
        return None if found is None else _load_file(found)
    return _load_file(path)


def _load_file(path: pathlib.Path) -> Tokenizer:
    vocabulary = open_vocabulary(path)
    if isinstance(vocabulary, TokenizerJson):
        return vocabulary
    _refuse_changes(vocabulary, path)
    other = path.with_name(JSON_FILE)
    # Models such as CamemBERT ship a file of the same name for another layout of ids.
    if storage.has_entry(other):
        pieces = [piece.piece for piece in _read(vocabulary).pieces[3:]]
        if _pieces_of(other)[4 : 4 + len(pieces)] != pieces:
            raise UserError(
                f"{other} gives the pieces of {path.name} other ids than XLM-R's layout does: name "
                f"{other} as the tokenizer, or move it away if it does not belong to this model"
            )
    return vocabulary


def _pieces_of(path: pathlib.Path) -> list[str]:
    """The vocabulary of a Unigram tokenizer.json in the order of the ids; [] for other types."""
    try:
        vocabulary = _parsed(path)["model"]["vocab"]
        return [row[0] for row in vocabulary] if isinstance(vocabulary, list) else []
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is not a tokenizer.json ({error!r:.100}); copy it again") from None


def _parsed(path: pathlib.Path) -> dict:
    return parse_object(read_bytes(path, MOST_BYTES), path)


def _refuse_changes(vocabulary: Vocabulary, path: pathlib.Path) -> None:
    """Raises `UserError` where files beside a SentencePiece model change its ids."""
    folder, ids = path.parent, dict(zip(SPECIAL_TOKENS, range(4), strict=False))
    ids["<mask>"] = vocabulary.mask_id
    config = read_optional(folder / CONFIG_FILE)
    refuse_settings(config, folder / CONFIG_FILE)
    if lower_cases(folder):
        raise UserError(
            f"{folder}: do_lower_case=true is honoured for a tokenizer.json only: save the "
            "tokenizer with a current version of transformers, which writes one"
        )
    try:
        tokens = list(wanted_tokens(folder, config))
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_FILE} is damaged ({error!r:.100})") from None
    for token in tokens:
        if token["content"] not in ids or token.get("id", -1) not in (-1, ids[token["content"]]):
            raise UserError(
                f"{folder} adds the token {token['content']!r:.40} to {path.name}, which is "
                "honoured for a tokenizer.json only: save the tokenizer with a current version of "
                "transformers, which writes one"
            )


# ---- Export --------------------------------------------------------------------------------------


def write_tokenizer(vocabulary: Tokenizer, folder: str | os.PathLike, max_length: int) -> None:
    """Writes what `AutoTokenizer.from_pretrained(folder)` of transformers 4.57 and 5 reads.

    Args:
      folder: is created if need be; files of the same names are replaced.
      max_length: tokens of a text, special tokens included; becomes `model_max_length`.

    Raises:
      UserError: a SentencePiece model that no tokenizer.json can stand for, with the reason.
    """
    folder = storage.path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(vocabulary, TokenizerJson):
        special = _special_names(vocabulary)
        behaviour = {MARKUP_IS_TEXT: True} if vocabulary.markup_is_text else {}
        (folder / JSON_FILE).write_bytes(vocabulary.plain_bytes())
    else:
        bos, pad, eos, unk, mask = SPECIAL_TOKENS
        special = {"bos": bos, "eos": eos, "cls": bos, "sep": eos}
        special |= {"pad": pad, "unk": unk, "mask": mask}
        # The last two are for llama.cpp's converter: whether to put a space before the text and
        # whether to merge runs of spaces.
        behaviour = {
            MARKUP_IS_TEXT: True,
            "add_prefix_space": True,
            "clean_up_tokenization_spaces": True,
        }
        (folder / JSON_FILE).write_text(unigram_json(vocabulary), encoding="utf-8")
        # llama.cpp's converter takes a file of XLM-R's name for XLM-R itself, with its 250,002 ids.
        name = XLMR_FILE if vocabulary.size == XLMR_SIZE else SENTENCEPIECE_FILE
        (folder / name).write_bytes(vocabulary.model_bytes)
    special = {f"{name}_token": token for name, token in special.items()}
    config = {
        # The class that takes tokenizer.json as it is: XLMRobertaTokenizer of transformers 5 builds
        # its own steps around the pieces, which normalise in another way.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "truncation_side": "right",
        **special,
        **behaviour,
    }
    for name, content in (("tokenizer_config", config), ("special_tokens_map", special)):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def _special_names(tokenizer: TokenizerJson) -> dict[str, str]:
    ids = {
        "cls": tokenizer.bos_id,
        "sep": tokenizer.eos_id,
        "pad": tokenizer.pad_id,
        "unk": tokenizer.unk_id,
        "mask": tokenizer.mask_id,
    }
    return {name: tokenizer.token_of(i) for name, i in ids.items() if i is not None}


def unigram_json(vocabulary: Vocabulary) -> str:
    """The content of a tokenizer.json with the ids of `vocabulary`, see the module's docstring.

    Raises:
      UserError: the model has an option that `tokenizers` cannot follow.
    """
    model = _read(vocabulary)
    if reason := _obstacle(model):
        raise UserError(f"this SentencePiece model cannot become a tokenizer.json: it {reason}")
    # `tokenizers` looks for special tokens in texts like for any piece; SentencePiece does not. At
    # this score their single characters are always better.
    lowest = min(piece.score for piece in model.pieces if piece.type == _Piece.NORMAL)
    hidden = [*SPECIAL_TOKENS, *(p.piece for p in model.pieces if p.type != _Piece.NORMAL)]
    never = (2 + max(map(len, hidden))) * min(lowest, -1.0)
    pieces = [(piece.piece, _score(piece, never)) for piece in model.pieces[3:]]
    bos, pad, eos, unk, mask = SPECIAL_TOKENS
    rows = [*((token, never) for token in (bos, pad, eos, unk)), *pieces, (mask, never)]
    tokenizer = HuggingFaceTokenizer(
        models.Unigram(rows, unk_id=Vocabulary.unk_id, byte_fallback=False)
    )
    if steps := _normalizer_steps(model):
        tokenizer.normalizer = normalizers.Sequence(steps)
    # Other white space than the space is an ordinary character at this point.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # A Regex: of a string transformers.js makes a capture group, which keeps the spaces.
            pre_tokenizers.Split(Regex(" "), "removed"),
            pre_tokenizers.Metaspace(WORD_START, prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(WORD_START, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, Vocabulary.bos_id), (eos, Vocabulary.eos_id)],
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    content = json.loads(tokenizer.to_str())
    for step in (content["normalizer"] or {}).get("normalizers", []):
        if step["type"] == "Precompiled":
            # llama.cpp's converter looks for the table here; `tokenizers` overlooks it.
            content["normalizer"]["precompiled_charsmap"] = step["precompiled_charsmap"]
    return json.dumps(content, ensure_ascii=False)


def _score(piece: sentencepiece_model_pb2.ModelProto.SentencePiece, never: float) -> float:
    if piece.type == _Piece.NORMAL:
        return piece.score
    return USER_DEFINED_SCORE if piece.type == _Piece.USER_DEFINED else never


def _normalizer_steps(model: sentencepiece_model_pb2.ModelProto) -> list[normalizers.Normalizer]:
    """SentencePiece's replacements, one character at a time, and what that needs before and after.

    SentencePiece replaces the longest match at each place. `tokenizers` looks at grapheme clusters:
    of a short one it replaces what matches first and loses the rest ("a" with a circumflex and a
    grave accent becomes "â"), in a long one no two characters are replaced together (Korean and
    Indic vowels in two parts stay apart). So clusters are taken apart where SentencePiece would,
    and what remains together is composed by NFC. transformers.js does not read the table; what the
    model keeps and it would not is hidden from it.
    """
    steps = []
    if charsmap := model.normalizer_spec.precompiled_charsmap:
        replacements = sentencepiece.SentencePieceNormalizer(model_proto=model.SerializeToString())
        pattern = boundary_pattern(replacements.normalize)
        hidden = hidden_characters(replacements.normalize)
        steps = [
            normalizers.Replace(Regex(pattern), BOUNDARY),
            normalizers.NFC(),
            *(normalizers.Replace(character, stand_in) for character, stand_in in hidden.items()),
            normalizers.Precompiled(charsmap),
            *(normalizers.Replace(stand_in, character) for character, stand_in in hidden.items()),
            normalizers.NFC(),  # what the table has made: "ｶﾞ" is two characters until here
            normalizers.Replace(BOUNDARY, ""),
        ]
    # Without a piece for "<" the special token would be the best segmentation of "<s>" after all.
    # Any other character without a piece gives the same ids, but no special token.
    known = {character for piece in model.pieces[3:] for character in piece.piece}
    unknown = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in known)
    missing = sorted(set("".join(SPECIAL_TOKENS)) - known)
    return steps + [normalizers.Replace(character, unknown) for character in missing]


def _obstacle(model: sentencepiece_model_pb2.ModelProto) -> str | None:
    """Why `tokenizers` cannot give the ids of `model`, or None."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.UNIGRAM:
        return "is no unigram model"
    if trainer.byte_fallback:
        return "falls back to bytes"
    if trainer.treat_whitespace_as_suffix or not (
        normalizer.add_dummy_prefix
        and normalizer.remove_extra_whitespaces
        and normalizer.escape_whitespaces
    ):
        return "treats white space otherwise than XLM-R's does"
    pieces = {piece.piece for piece in model.pieces}
    if WORD_START not in pieces or any(WORD_START in piece[1:] for piece in pieces):
        return "has pieces that go beyond one word, or none for a space"
    return None


@functools.lru_cache(maxsize=1)
def _parse(model_bytes: bytes) -> sentencepiece_model_pb2.ModelProto:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(model_bytes)
    return model


def _read(vocabulary: Vocabulary) -> sentencepiece_model_pb2.ModelProto:
    return _parse(vocabulary.model_bytes)
