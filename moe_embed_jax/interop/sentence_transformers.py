"""The small JSON files that make a folder a sentence-transformers model: prompts, length, pooling.

Read without sentence-transformers, so that the base installation needs no PyTorch.
"""

import dataclasses
import json
import pathlib

from moe_embed_jax.errors import UserError

MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"
LENGTH_FILE = "sentence_bert_config.json"
POOLING_FOLDER = "1_Pooling"
NORMALIZE_FOLDER = "2_Normalize"
NO_LIMIT = 1_000_000  # tokenizers write 1e30 for "no limit"


@dataclasses.dataclass(frozen=True)
class Settings:
    """prompts: name -> prefix ({}: none said). max_length: tokens, specials included, or None."""

    prompts: dict[str, str]
    max_length: int | None


def read_settings(folder: pathlib.Path) -> Settings:
    """What the folder says; a folder without these files says nothing, and pooling is the mean.

    Raises:
      UserError: pooling other than the mean of all tokens, or modules behind it, named.
    """
    _check_modules(folder)
    prompts = _read(folder / PROMPTS_FILE).get("prompts") or {}
    length = _read(folder / LENGTH_FILE).get("max_seq_length")
    if length is None:
        length = _read(folder / "tokenizer_config.json").get("model_max_length")
    if length is not None and length > NO_LIMIT:
        length = None
    return Settings({str(k): str(v) for k, v in prompts.items() if v is not None}, length)


def _read(path: pathlib.Path):
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def _check_modules(folder: pathlib.Path) -> None:
    path = folder / MODULES_FILE
    for module in _read(path) or []:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            file = folder / module.get("path", "") / "config.json"
            pooling = _read(file)
            modes = {key for key, on in pooling.items() if key.startswith("pooling_mode_") and on}
            named = pooling.get("pooling_mode", "mean")
            if modes - {"pooling_mode_mean_tokens"} or named != "mean":
                said = named if named != "mean" else ", ".join(sorted(modes))
                raise UserError(f"{file}: pooling {said}: only the mean over all tokens is known")
            if not pooling.get("include_prompt", True):
                raise UserError(f"{file}: include_prompt=false: prompts are always pooled here")
        elif kind not in ("Transformer", "Normalize"):
            raise UserError(f"{path}: module {kind} is not known; it would change the embeddings")


def write_settings(
    folder: pathlib.Path, width: int, prompts: dict[str, str], max_length: int
) -> None:
    """Transformer -> Pooling (mean) -> Normalize, with prompts and the maximal length."""
    prefix = "sentence_transformers.models."
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": prefix + "Transformer"},
        {"idx": 1, "name": "1", "path": POOLING_FOLDER, "type": prefix + "Pooling"},
        {"idx": 2, "name": "2", "path": NORMALIZE_FOLDER, "type": prefix + "Normalize"},
    ]
    modes = ("cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pooling = {
        "word_embedding_dimension": width,
        "pooling_mode_mean_tokens": True,
        **{f"pooling_mode_{mode}": False for mode in modes},
        "include_prompt": True,
    }
    contents = {
        MODULES_FILE: modules,
        PROMPTS_FILE: {
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        LENGTH_FILE: {"max_seq_length": max_length, "do_lower_case": False},
        f"{POOLING_FOLDER}/config.json": pooling,
    }
    # Normalize has nothing to configure, but the folder is what its path names.
    (folder / NORMALIZE_FOLDER).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
