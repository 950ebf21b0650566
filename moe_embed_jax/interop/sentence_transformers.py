"""The small JSON files that make a folder a sentence-transformers model: prompts, length, pooling.

Read without sentence-transformers, so that the base installation needs no PyTorch. Whatever could
change the embeddings is honoured or refused by name.
"""

import dataclasses
import json
import pathlib

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.json_file import (
    flag,
    parse,
    printable,
    read_bytes,
    read_object,
    read_optional,
    text,
    whole,
)
from moe_embed_jax.tokenizers.settings import (
    CONFIG_FILE,
    TRANSFORMER_FILES,
    transformer_file,
)

MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"
LENGTH_FILE = TRANSFORMER_FILES[0]
POOLING_FOLDER = "1_Pooling"
NORMALIZE_FOLDER = "2_Normalize"
NO_LIMIT = 1_000_000  # tokenizers write 1e30 for "no limit"

# Ours -> the library's names: of `pooling_mode`, and in the keys `pooling_mode_NAME` of old files.
POOLING_MODES = {"mean": "mean", "cls": "cls", "last": "lasttoken"}
_OLD_MODES = {
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean_tokens": "weightedmean",
    "lasttoken": "lasttoken",
}
_POOLING_KEYS = ("embedding_dimension", "word_embedding_dimension", "include_prompt")
# Keys of LENGTH_FILE: values that change nothing here. Those below are read elsewhere.
_FIXED = {
    "transformer_task": (None, "feature-extraction"),
    "module_output_name": (None, "token_embeddings"),
    "processing_kwargs": (None, {}),
    "query_expansion": (None,),
}
_LENGTH_KEYS = ("max_seq_length", "query_length", "document_length", "do_lower_case")
_ARGUMENT_KEYS = tuple(
    f"{of}_{kind}"
    for of in ("model", "tokenizer", "processor", "config")
    for kind in ("args", "kwargs")
)
# Arguments that change how a model is loaded or computed, not what it is.
_HARMLESS_ARGUMENTS = {
    "add_pooling_layer",
    "attn_implementation",
    "dtype",
    "low_cpu_mem_usage",
    "torch_dtype",
    "trust_remote_code",
    "use_fast",
    "use_memory_efficient_attention",
    "unpad_inputs",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a folder says.

    Attributes:
      prompts: name -> prefix ({}: none named); "query" and "document" of `default_prompt_name`
        where the folder names none for them.
      max_lengths: {"query": tokens, "document": tokens}, special tokens included; None: no limit.
      pooling: one of POOLING_MODES, or None: the folder does not say.
      weights: the folder of config.json, weights and tokenizer.
      notes: what a user should know, in sentences.
    """

    prompts: dict[str, str]
    max_lengths: dict[str, int | None]
    pooling: str | None
    weights: pathlib.Path
    notes: list[str]


def read_settings(folder: pathlib.Path) -> Settings:
    """What the folder says; a folder without these files says nothing.

    Raises:
      UserError: pooling, modules or arguments that are not known here, named; a path outside the
        folder; whatever is not as the library writes it.
    """
    weights, pooling, normalized = read_modules(folder)
    prompts = _prompts(folder / PROMPTS_FILE, normalized)
    notes = []
    if normalized is False:
        notes.append("the folder's own modules do not normalise: embeddings here have length 1")
    return Settings(prompts, _max_lengths(weights), pooling, weights, notes)


def read_modules(folder: pathlib.Path) -> tuple[pathlib.Path, str | None, bool | None]:
    """(folder of the transformer, pooling, whether Normalize follows); None: no modules.json.

    Raises `UserError`, see `read_settings`.
    """
    path = folder / MODULES_FILE
    if not storage.has_entry(path):
        return folder, None, None
    modules = parse(read_bytes(path), path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{path} must be a list of JSON objects, one for each module")
    kinds, folders = [], []
    for module in modules:
        kind = text(module, "type", path, "")
        library, _, name = kind.rpartition(".")
        known = name in ("Transformer", "Pooling", "Normalize")
        if not known or not library.startswith("sentence_transformers."):
            named = name if library.startswith("sentence_transformers.") else kind
            raise UserError(
                f"{path}: module {printable(named)} is not known; it would change the embeddings"
            )
        kinds.append(name)
        folders.append(_inside(folder, text(module, "path", path), path))
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Normalize"}:
        raise UserError(
            f"{path}: the modules are {', '.join(kinds[:9]) or 'none'}; only Transformer, Pooling "
            "and Normalize in this order are known"
        )
    for inner in folders[2:]:
        _check_normalize(inner / "config.json")
    return folders[0], _pooling(folders[1] / "config.json"), len(kinds) > 2


def _inside(folder: pathlib.Path, path: str | None, where: pathlib.Path) -> pathlib.Path:
    """`folder`/`path`, which must stay in `folder`, symbolic links followed."""
    if path is None:
        raise UserError(f"{where}: a module has no path")
    pure = pathlib.PurePath(path)
    try:
        if not path.isprintable() or len(path) > 200:
            raise ValueError
        outside = pure.is_absolute() or ".." in pure.parts
        outside = outside or not (folder / path).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        raise UserError(f"{where}: path {path!r:.80} is not the name of a folder") from None
    if outside:
        raise UserError(f"{where}: path {path!r:.80} leads outside of the model's folder")
    return folder / path


def _pooling(path: pathlib.Path) -> str:
    """The library's rules: `pooling_mode` before the old keys, and the mean where none is on."""
    if not storage.has_entry(path):
        raise UserError(f"{path} is missing, so the pooling is not known: copy the folder again")
    config = read_object(path)
    old = {key: key.removeprefix("pooling_mode_") for key in config if key != "pooling_mode"}
    for key, mode in old.items():
        if key not in _POOLING_KEYS and (mode == key or mode not in _OLD_MODES):
            raise UserError(
                f"{path}: key {printable(key)} is not known; it may change the embeddings"
            )
    active = [
        _OLD_MODES[mode] for key, mode in old.items() if mode != key and flag(config, key, path)
    ]
    modes = config.get("pooling_mode", active or "mean")
    modes = modes if isinstance(modes, list) else [modes]
    ours = [our for our, theirs in POOLING_MODES.items() if modes == [theirs]]
    if not ours:
        raise UserError(
            f"{path}: pooling {printable(' + '.join(map(str, modes)))}: only one of "
            f"{', '.join(POOLING_MODES.values())} is known"
        )
    if not flag(config, "include_prompt", path, default=True):
        raise UserError(f"{path}: include_prompt=false: prompts are always pooled here")
    return ours[0]


def _check_normalize(path: pathlib.Path) -> None:
    for key, value in read_optional(path).items():
        if key not in ("module_input_name", "module_output_name") or (
            value not in (None, "sentence_embedding")
        ):
            raise UserError(
                f"{path}: {printable(key)}={value!r:.40}: only the embedding is normalised"
            )


def _prompts(path: pathlib.Path, normalized: bool | None) -> dict[str, str]:
    config = read_optional(path)
    kind = text(config, "model_type", path, "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise UserError(f"{path}: model_type={kind!r:.40} is no model of single embeddings")
    if config.get("truncate_dim") is not None:
        raise UserError(f"{path}: truncate_dim is not read: remove it, and say the width instead")
    similarity = text(config, "similarity_fn_name", path, "cosine")
    if similarity != "cosine" and (similarity not in ("dot", "euclidean") or not normalized):
        raise UserError(
            f"{path}: similarity_fn_name={similarity!r:.40} does not rank as the cosine does, "
            "which embeddings of length 1 are compared by: this model cannot be used here"
        )
    prompts = config.get("prompts")
    if prompts is not None and not isinstance(prompts, dict):
        raise UserError(f"{path}: prompts={prompts!r:.40} must be an object of names and prefixes")
    prompts = {name: text(prompts, name, path, "") for name in prompts or {}}
    default = text(config, "default_prompt_name", path)
    if default is not None:
        if default not in prompts:
            raise UserError(f"{path}: default_prompt_name={default!r:.40} is not in prompts")
        prompts.setdefault("query", prompts[default])
        if not any(name in prompts for name in ("document", "passage", "corpus")):
            prompts["document"] = prompts[default]
    return prompts


def _max_lengths(folder: pathlib.Path) -> dict[str, int | None]:
    path = transformer_file(folder)
    config = {} if path is None else read_object(path)
    for key, value in config.items():
        _check_argument(path, key, value)
    length = _length(config, "max_seq_length", path)
    if length is None:
        other = folder / CONFIG_FILE
        length = _length(read_optional(other), "model_max_length", other)
    sides = {side: _length(config, f"{side}_length", path) for side in ("query", "document")}
    return {side: length if own is None else own for side, own in sides.items()}


def _check_argument(path, key: str, value) -> None:
    if key in _LENGTH_KEYS or key == "unpad_inputs" or value in _FIXED.get(key, ()):
        return
    if key in _ARGUMENT_KEYS and isinstance(value or {}, dict):
        strange = [name for name in value or {} if name not in _HARMLESS_ARGUMENTS]
        if not strange:
            return
        key, value = f"{key}.{strange[0]}", value[strange[0]]
    if key == "modality_config" and isinstance(value, dict):
        states = {"method": "forward", "method_output_name": "last_hidden_state"}
        if value.get("text") == states:
            return
    raise UserError(
        f"{path}: {printable(key)}={value!r:.60} is not known; it may change the embeddings"
    )


def _length(config: dict, key: str, path) -> int | None:
    value = config.get(key)
    if value is None or (type(value) in (int, float) and value > NO_LIMIT):
        return None
    return whole(config, key, path, NO_LIMIT)


def write_settings(
    folder: pathlib.Path,
    width: int,
    prompts: dict[str, str],
    max_length: int,
    pooling: str = "mean",
) -> None:
    """Transformer -> Pooling -> Normalize, with prompts and the maximal length."""
    prefix = "sentence_transformers.models."
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": prefix + "Transformer"},
        {"idx": 1, "name": "1", "path": POOLING_FOLDER, "type": prefix + "Pooling"},
        {"idx": 2, "name": "2", "path": NORMALIZE_FOLDER, "type": prefix + "Normalize"},
    ]
    # The keys that versions 2 to 6 of the library and other runtimes read.
    modes = {
        f"pooling_mode_{old}": new == POOLING_MODES[pooling] for old, new in _OLD_MODES.items()
    }
    contents = {
        MODULES_FILE: modules,
        PROMPTS_FILE: {
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        LENGTH_FILE: {"max_seq_length": max_length, "do_lower_case": False},
        f"{POOLING_FOLDER}/config.json": {
            "word_embedding_dimension": width,
            **modes,
            "include_prompt": True,
        },
    }
    # Normalize has nothing to configure, but the folder is what its path names.
    (folder / NORMALIZE_FOLDER).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
