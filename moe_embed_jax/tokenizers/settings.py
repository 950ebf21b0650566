"""What the files beside a tokenizer.json change about it, written into its content.

transformers and sentence-transformers read tokenizer_config.json and others after tokenizer.json:
tokens are added, BERT's lower-casing is decided again, markup in a text becomes plain text. Here
all of that becomes part of one file, so that its copies (in an import, in prepared data, in a work
directory) give the same ids, and its checksum says which ids those are.

Imports neither `tokenizers` nor transformers.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.json_file import flag, parse, read_bytes, read_optional, text

CONFIG_FILE = "tokenizer_config.json"
# In content: special tokens in a text are plain text. No key of `tokenizers`: it has no file format
# for that setting.
MARKUP_IS_TEXT = "split_special_tokens"
MOST_BYTES = 256 << 20
# What sentence-transformers calls the settings of its Transformer, in its order: the first one that
# is there counts.
TRANSFORMER_FILES = (
    "sentence_bert_config.json",
    *(
        f"sentence_{name}_config.json"
        for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    ),
)
BERT_CLASSES = ("BertTokenizer", "BertTokenizerFast")
NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def effective_bytes(path: Path) -> bytes:
    """The content of the tokenizer.json `path`, changed by the files beside it.

    The bytes of the file where they change nothing. Raises `UserError`: a setting that cannot be
    honoured, named.
    """
    raw = read_bytes(path, MOST_BYTES)
    content = parse(raw, path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        return raw  # no tokenizer.json, as its reader will say
    try:
        changed = _apply(content, path.parent)
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(f"{path} or {CONFIG_FILE} beside it is damaged ({error!r:.100})") from None
    if not changed:
        return raw
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _apply(content: dict, folder: Path) -> bool:
    """Changes `content`; whether anything changed."""
    config = read_optional(folder / CONFIG_FILE)
    where = folder / CONFIG_FILE
    refuse_settings(config, where)
    changed = any([_add(content, token, where) for token in wanted_tokens(folder, config)])
    architecture = text(read_optional(folder / "config.json"), "model_type", folder, "")
    kind = text(config, "tokenizer_class", where, "BertTokenizer" if architecture == "bert" else "")
    if kind in BERT_CLASSES and content["model"].get("type") in ("WordPiece", None):
        # The class makes its normaliser of these keys, whatever tokenizer.json says.
        accents = flag(config, "strip_accents", where)
        normalizer = {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": flag(config, "tokenize_chinese_chars", where, True),
            "strip_accents": None if config.get("strip_accents") is None else accents,
            "lowercase": flag(config, "do_lower_case", where, True),
        }
        if content.get("normalizer") != normalizer:
            content["normalizer"], changed = normalizer, True
    if lower_cases(folder):
        changed |= _prepend_lowercase(content)
    if flag(config, MARKUP_IS_TEXT, where):
        content[MARKUP_IS_TEXT] = changed = True
    return changed


def refuse_settings(config: dict, where: Path) -> None:
    """Raises `UserError` for a tokenizer_config.json that asks for what is not done here."""
    if text(config, "truncation_side", where, "right") != "right":
        raise UserError(f"{where}: truncation_side: texts are truncated at their end only")
    for key in ("add_bos_token", "add_eos_token"):
        if not flag(config, key, where, True):
            raise UserError(f"{where}: {key}=false: a special token stands at each end of a text")


def lower_cases(folder: Path) -> bool:
    """Whether sentence-transformers lower-cases texts before the tokenizer sees them."""
    path = transformer_file(folder)
    return path is not None and flag(read_optional(path), "do_lower_case", path)


def transformer_file(folder: Path) -> Path | None:
    """The first of `TRANSFORMER_FILES` in `folder`; None: there is none."""
    paths = [folder / name for name in TRANSFORMER_FILES]
    return next((path for path in paths if storage.has_entry(path)), None)


def wanted_tokens(folder: Path, config: dict) -> Iterator[dict]:
    """Tokens that files beside the tokenizer add, in the order in which transformers adds them.

    {"content", "special", ...}, and "id" where the file says one.
    """
    where = folder / CONFIG_FILE
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        for token_id, token in sorted(decoder.items(), key=lambda item: int(item[0])):
            yield _token(token, where) | {"id": int(token_id)}
    else:
        path = folder / "special_tokens_map.json"
        config = config | read_optional(path)
        path = folder / "added_tokens.json"
        for token, token_id in read_optional(path).items():
            if type(token_id) is not int:
                raise UserError(f"{path}: {token!r:.40}: {token_id!r:.40} is not an id")
            yield _token(token, path) | {"id": token_id}
    for name in NAMED_TOKENS:
        if config.get(name) is not None:
            yield _token(config[name], where)
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(name) or []
        for token in more.values() if isinstance(more, dict) else more:
            yield _token(token, where)


def _token(token, where) -> dict:
    if isinstance(token, str):
        token = {"content": token, "special": True}
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise UserError(f"{where}: {token!r:.60} is not a token")
    special = bool(token.get("special", "__type" in token))
    flags = {name: bool(token.get(name, False)) for name in _TOKEN_FLAGS[:3]}
    normalized = bool(token.get("normalized", not special))
    return {"content": token["content"], **flags, "normalized": normalized, "special": special}


def _add(content: dict, token: dict, where) -> bool:
    """Appends `token` to the added tokens; False if it is one of them already."""
    added = content.setdefault("added_tokens", [])
    if any(old["content"] == token["content"] for old in added):
        return False
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {row[0]: i for i, row in enumerate(vocabulary)}
    following = max([len(vocabulary), *(old["id"] + 1 for old in added)])
    token_id = vocabulary.get(token["content"], following)
    if token.setdefault("id", token_id) != token_id:
        raise UserError(
            f"{where}: token {token['content']!r:.40} shall have id {token['id']}, but "
            f"tokenizer.json gives it {token_id}: save the tokenizer again with transformers"
        )
    added.append(token)
    return True


def _prepend_lowercase(content: dict) -> bool:
    normalizer = content.get("normalizer")
    steps = [] if normalizer is None else [normalizer]
    if normalizer is not None and normalizer["type"] == "Sequence":
        steps = normalizer["normalizers"]
    if any(step["type"] == "Lowercase" for step in steps):
        return False
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *steps]}
    return True
