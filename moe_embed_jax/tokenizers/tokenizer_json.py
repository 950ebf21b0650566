"""Text to token ids by a Hugging Face `tokenizer.json`: WordPiece (BERT), BPE or Unigram.

`TokenizerJson` is a `Tokenizer` as `Vocabulary` is, so a model with a published tokenizer embeds
and trains as one with a SentencePiece model does. Its ids equal transformers' for
the same folder with `truncation=True`: the markup of special tokens in a text ("[SEP]") is a token
there, and so it is here, unless tokenizer_config.json says otherwise (see `settings`).
What happens to empty texts, bytes and lone surrogates is said in `vocabulary`.

Neither transformers nor PyTorch is needed.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence

import tokenizers

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.json_file import parse_object, printable
from moe_embed_jax.tokenizers.settings import MARKUP_IS_TEXT, effective_bytes
from moe_embed_jax.tokenizers.tokenizer import Tokenizer
from moe_embed_jax.tokenizers.vocabulary import Vocabulary, clean_text, cut_before_space

TEXTS_PER_CALL = 1024  # the library keeps strings and offsets of every token of a call

# Steps after which what stands before a space has become the same ids whatever follows the space.
_LOCAL_NORMALIZERS = frozenset(
    ["BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Precompiled", "StripAccents"]
)
_SPLITTING_PRE_TOKENIZERS = frozenset(["BertPreTokenizer", "Whitespace", "WhitespaceSplit"])


class TokenizerJson(Tokenizer):
    """A tokenizer that puts one special token before a text and one behind it.

    Attributes:
      size: number of ids, added tokens included (the highest id + 1).
      bos_id, eos_id: what the post-processor puts around a text; [CLS] and [SEP] for BERT.
      pad_id: of the file's padding or of its padding token; `eos_id` if it names neither (padding
        is never attended to, so any id would do).
      unk_id, mask_id: None for a tokenizer without such a token.
      content_hash: SHA-256 of the file, hexadecimal.
      model_bytes: the file, with what the files beside it change (`settings`).
      markup_is_text: whether special tokens in a text are plain text.
    """

    def __init__(self, model_bytes: bytes, name: str = "tokenizer.json"):
        """`name` is what errors call the tokenizer, e.g. its path. See also `load`."""
        content = _read_json(model_bytes, name)
        truncation = content.get("truncation")
        if isinstance(truncation, dict) and truncation.get("direction") == "Left":
            raise UserError(f"{name} truncates texts at their beginning; here only the end is cut")
        self.model_bytes = model_bytes
        self.content_hash = hashlib.sha256(model_bytes).hexdigest()
        self.markup_is_text = bool(content.pop(MARKUP_IS_TEXT, False))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self.plain_bytes())
            self._tokenizer.encode_special_tokens = self.markup_is_text
            # Files keep the settings of whoever saved them: a length, or a padding to 128 tokens.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._read_ids(content, name)
            self._cut_at_spaces = _is_local(content)
        except (UserError, KeyboardInterrupt):
            raise
        except BaseException as error:  # a panic of the library is no Exception
            if re.search(r"unk_id|unknown token|\[UNK\]|UNK token", str(error)):
                raise UserError(
                    f"{name} has no token for what its vocabulary lacks "
                    f"({printable(str(error))}): name one in unk_id or unk_token of its model, and "
                    "put it into the vocabulary"
                ) from None
            raise UserError(
                f"{name} cannot be read by tokenizers {tokenizers.__version__} "
                f"({printable(repr(error), 200)}); give the "
                "tokenizer.json of a Hugging Face model, or install a newer tokenizers"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TokenizerJson":
        """Reads a tokenizer.json, and the files beside it that change what it does.

        Raises:
          UserError: no such file, not a tokenizer, or one that does not add exactly one token at
            each end of a text.
        """
        path = storage.path(path)
        if not path.is_file():
            raise UserError(
                f"tokenizer file {path} does not exist; give the path of a tokenizer.json"
            )
        return cls(effective_bytes(path), name=str(path))

    def plain_bytes(self) -> bytes:
        """A tokenizer.json that `tokenizers` reads: `model_bytes` without our own key."""
        if not self.markup_is_text:
            return self.model_bytes
        content = _read_json(self.model_bytes, "tokenizer.json")
        del content[MARKUP_IS_TEXT]
        return json.dumps(content, ensure_ascii=False).encode()

    def encode_batch(
        self, texts: Sequence[str | bytes], max_ids: int | None = None
    ) -> list[list[int]]:
        texts = [clean_text(text) for text in texts]
        if max_ids is not None:
            texts = [self.head(text, max_ids) for text in texts]
        rows = []
        for start in range(0, len(texts), TEXTS_PER_CALL):
            batch = texts[start : start + TEXTS_PER_CALL]
            rows += [encoding.ids[:max_ids] for encoding in self._encode_plain(batch)]
        return rows

    def head(self, text: str, max_ids: int) -> str:
        """A beginning of `text` with the same first `max_ids` ids, short where that is sure.

        That is so for tokenizers which split texts at white space and whose normaliser does not
        look beyond a space (BERT's and XLM-R's); other texts stay whole, and one megabyte
        takes about a second.
        """
        if not self._cut_at_spaces:
            return text
        return cut_before_space(text, max_ids, lambda head: self._encode_plain([head])[0])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are left out.

        Raises:
          UserError: an id outside [0, size).
        """
        return self._tokenizer.decode(self.check_ids(ids), skip_special_tokens=True)

    def token_of(self, token_id: int) -> str:
        """The token as the file writes it, e.g. "[CLS]"."""
        return self._tokenizer.id_to_token(token_id)

    def _encode_plain(self, texts: list[str]) -> list[tokenizers.Encoding]:
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)

    def _read_ids(self, content: dict, name: str) -> None:
        """Finds the special tokens by encoding a text: there are a dozen ways to write them."""
        text = "a \u1bc0"  # a word, and a letter (Batak) that hardly any vocabulary has
        plain = self._tokenizer.encode(text, add_special_tokens=False)
        full = self._tokenizer.encode(text)
        if len(full) != len(plain) + 2 or full.ids[1:-1] != plain.ids:
            raise UserError(
                f"{name} turns the tokens {plain.tokens!s:.60} into {full.tokens!s:.80}; what is "
                "needed is one special token at each end, as [CLS] and [SEP]: correct its "
                "post_processor"
            )
        self.bos_id, self.eos_id = full.ids[0], full.ids[-1]
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        padding = content.get("padding") or {}
        padding_token = _special_id(content, "pad", "padding")
        self.pad_id = padding.get("pad_id", self.eos_id if padding_token is None else padding_token)
        self.mask_id = _special_id(content, "mask")
        unknown = content["model"].get("unk_token")
        self.unk_id = content["model"].get("unk_id")
        if self.unk_id is None and unknown is not None:
            self.unk_id = self._tokenizer.token_to_id(unknown)


def _read_json(model_bytes: bytes, name: str) -> dict:
    content = parse_object(model_bytes, name)
    if not isinstance(content.get("model"), dict):
        raise UserError(
            f'{name} has no section "model"; give the tokenizer.json of a Hugging Face model, not '
            "its tokenizer_config.json or vocab.json"
        )
    tokens = content.get("added_tokens")
    for token in tokens if isinstance(tokens, list) else []:
        if isinstance(token, dict) and "\0" in str(token.get("content")):  # the library panics
            raise UserError(f"{name}: added token {token['content']!r:.40} holds a NUL character")
    return content


def _special_id(content: dict, *names: str) -> int | None:
    """The id of the special token called e.g. "pad", however it is dressed: [PAD], <|pad|>."""
    for token in content.get("added_tokens") or []:
        if token.get("special") and re.sub(r"[\W_]", "", token["content"]).lower() in names:
            return token["id"]
    return None


def _is_local(content: dict) -> bool:
    """Whether a text may be cut before a space, see `TokenizerJson.head`."""

    def types(step: dict | None, inner: str) -> list[str]:
        if step is None:
            return []
        if step["type"] == "Sequence":
            return [name for part in step[inner] for name in types(part, inner)]
        return [step["type"]]

    splitting = types(content.get("pre_tokenizer"), "pretokenizers")[:1]
    return (
        _LOCAL_NORMALIZERS.issuperset(types(content.get("normalizer"), "normalizers"))
        and bool(_SPLITTING_PRE_TOKENIZERS.intersection(splitting))
        and not any(" " in token["content"] for token in content.get("added_tokens") or [])
    )


def open_vocabulary(path: str | os.PathLike) -> Tokenizer:
    """A SentencePiece model, or a tokenizer.json by its ending. Raises `UserError`."""
    path = storage.path(path)
    return TokenizerJson.load(path) if path.suffix == ".json" else Vocabulary.load(path)
