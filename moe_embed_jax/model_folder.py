"""A model in a folder, whoever wrote it: a training run's work directory, an imported model, or a
published checkpoint (safetensors). Everything that loads a model goes through here.

Orbax (`checkpoint`) is imported inside the functions that need it: published models do not.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from moe_embed_jax import config as config_files
from moe_embed_jax import storage
from moe_embed_jax.card import read_card, save_card
from moe_embed_jax.config import CHECKPOINTS, RUN_CONFIG
from moe_embed_jax.errors import UserError
from moe_embed_jax.finite import all_finite, leaves_finite
from moe_embed_jax.interop.matryoshka import MATRYOSHKA_KEY, read_matryoshka_dims
from moe_embed_jax.interop.published import open_published, read_config
from moe_embed_jax.interop.sentence_transformers import NO_LIMIT, read_modules, read_settings
from moe_embed_jax.interop.source import CONFIG_FILE, source_folder
from moe_embed_jax.json_file import text, whole
from moe_embed_jax.losses import MASKED_LM
from moe_embed_jax.made_by import keep_command
from moe_embed_jax.mesh import replicated
from moe_embed_jax.models.encoder import EncoderConfig, abstract_params
from moe_embed_jax.models.heads import mlm_head_shapes
from moe_embed_jax.new_folder import new_folder
from moe_embed_jax.processes import to_devices, to_host
from moe_embed_jax.sharding import is_array, path_of, rules_for, shardings, with_shardings
from moe_embed_jax.tokenizers.files import (
    JSON_FILE,
    SENTENCEPIECE_FILE,
    find_tokenizer,
    load_tokenizer,
)
from moe_embed_jax.tokenizers.tokenizer import Tokenizer
from moe_embed_jax.tokenizers.vocabulary import DOCUMENT_PREFIX, QUERY_PREFIX, Vocabulary
from moe_embed_jax.weights import chosen, form_of

PROMPTS = {"query": QUERY_PREFIX, "document": DOCUMENT_PREFIX}
NO_PROMPTS = {"query": "", "document": ""}
LONGEST = 2048  # tokens, where neither the folder nor a position table limits them
# A tokenizer with far fewer ids than the word table has rows belongs to another model.
MOST_UNUSED_ROWS = 1024


@dataclasses.dataclass
class LoadedModel:
    """An encoder with what it needs to read text.

    params: on the mesh it was loaded for. mlm_head: arrays, None without.
    vocabulary: None where the folder has none (then only token ids can be encoded).
    prompts: name -> prefix. has_prompts: whether the folder names a prefix that is not empty.
    max_lengths: {"query": tokens, "document": tokens}.
    matryoshka_dims: widths that vectors can be cut to, as trained; (): not known.
    """

    model: EncoderConfig
    params: dict
    mlm_head: dict | None
    vocabulary: Tokenizer | None
    prompts: dict[str, str]
    max_lengths: dict[str, int]
    has_prompts: bool = True
    matryoshka_dims: tuple[int, ...] = ()


@dataclasses.dataclass
class ModelFolder:
    """A checked model folder whose weights are read by `load`; fields as in `LoadedModel`.

    unused: names of tensors that the encoder does not need.
    notes: what a user should know about the model, in sentences.
    """

    model: EncoderConfig
    vocabulary: Tokenizer | None
    vocabulary_path: pathlib.Path | None
    prompts: dict[str, str]
    max_lengths: dict[str, int]
    has_prompts: bool
    unused: list[str]
    notes: list[str]
    matryoshka_dims: tuple[int, ...]
    _read: Callable[..., tuple[dict, dict | None]]  # of mesh, progress, weights as chosen

    def load(self, mesh: jax.sharding.Mesh, progress=iter, weights: str = "float32") -> LoadedModel:
        """Parameters sharded over `mesh` by the table of rules.

        Args:
          progress: as tqdm.
          weights: one of `weights.WEIGHTS`. "bfloat16", "int8": matrices become that one after the
            other, for inference on one CPU device; a bfloat16 model computes in it, too.

        Raises:
          UserError: other weights; bfloat16 or int8 on another mesh.
        """
        weights = chosen(weights, mesh)
        params, mlm_head = self._read(mesh, progress, weights)
        return LoadedModel(
            dataclasses.replace(self.model, dtype=weights) if weights == "bfloat16" else self.model,
            params,
            mlm_head,
            self.vocabulary,
            self.prompts,
            self.max_lengths,
            self.has_prompts,
            self.matryoshka_dims,
        )


def is_run(folder: pathlib.Path) -> bool:
    """Whether `folder` is ours (a work directory or an import), not a published checkpoint."""
    folder = weights_folder(folder)
    return isinstance(read_config(folder).get("model"), dict)


def weights_folder(folder: pathlib.Path) -> pathlib.Path:
    """Where config.json, weights and tokenizer lie: `folder`, or what its modules.json says."""
    return folder if storage.has_entry(folder / CONFIG_FILE) else read_modules(folder)[0]


def open_model(
    folder, step: int | None = None, positions: str = "learned", vocabulary: str | None = None
) -> ModelFolder:
    """Checks any model folder, weights apart.

    Args:
      folder: or `hf://OWNER/NAME`.
      step: of a training run; None: the newest checkpoint.
      positions: of BERT and XLM-RoBERTa, see `interop.published.open_published`.
      vocabulary: tokenizer file to use instead of the folder's own.

    Raises:
      UserError: not a model folder, or one that cannot be loaded exactly, with the reason.
    """
    folder = source_folder(folder)
    is_ours = is_run(folder)
    path = (
        find_tokenizer(weights_folder(folder)) if vocabulary is None else storage.path(vocabulary)
    )
    tokenizer = None if path is None else load_tokenizer(path)
    if tokenizer is None and path is not None:
        raise UserError(
            f"{path} has no tokenizer file: name a tokenizer.json or SentencePiece model"
        )
    if is_ours:
        own = tokenizer.content_hash if tokenizer and vocabulary is None else None
        opened = _open_run(folder, step, own)
    elif step is None:
        opened = _open_published(folder, positions)
    else:
        raise UserError(f"step={step}: {folder} is a published checkpoint, which has no steps")
    if path is not None:
        opened.vocabulary, opened.vocabulary_path = tokenizer, path
        check_vocabulary(tokenizer, opened.model, path)
    return opened


def load_model(
    folder, mesh: jax.sharding.Mesh, step: int | None = None, weights: str = "float32"
) -> LoadedModel:
    """`open_model(folder, step).load(mesh, weights=weights)`."""
    return open_model(folder, step).load(mesh, weights=weights)


def _open_published(folder: pathlib.Path, positions: str) -> ModelFolder:
    settings = read_settings(folder)
    published = open_published(settings.weights, positions)
    pooling = settings.pooling or published.model.pooling
    model = published.model = dataclasses.replace(published.model, pooling=pooling)
    prompts, notes = settings.prompts or NO_PROMPTS, settings.notes
    if not settings.prompts and published.model_type == "nomic_bert":
        # Nomic's own models need these prefixes, and their folders do not always name them.
        prompts, notes = PROMPTS, [*notes, "the folder names no prompts, so Nomic's are used"]
    lengths = {side: max_length(model, said) for side, said in settings.max_lengths.items()}

    def read(mesh, progress, weights):
        params, mlm_head = published.read(progress, form_of(weights))
        return place(params, model, mesh), mlm_head

    return ModelFolder(
        model,
        None,
        None,
        with_document(prompts),
        lengths,
        any(settings.prompts.values()),
        published.unused,
        notes,
        read_matryoshka_dims(settings.weights, model.width),
        read,
    )


def _open_run(folder: pathlib.Path, step: int | None, tokenizer: str | None) -> ModelFolder:
    """`tokenizer`: SHA-256 of the one that lies in the folder, which must be the checkpoint's."""
    where = folder / RUN_CONFIG
    card = read_card(where)
    try:
        model = config_files.build(EncoderConfig, card["model"], "model")
    except UserError as error:  # which knows no file
        raise UserError(f"{where}: {error}") from None
    prompts, lengths = _card_settings(card, where)
    if not (folder / CHECKPOINTS).is_dir():
        raise UserError(f"{folder} holds no checkpoint yet: {CHECKPOINTS}/ is missing")
    from moe_embed_jax.newest_checkpoint import check_step, read_newest

    check_step(folder / CHECKPOINTS, step)

    def read(mesh, progress, weights):
        shapes = abstract_params(model)
        params = with_shardings(shapes, shardings(shapes, rules_for(model), mesh))

        def of_step(checkpoints, number):
            expected = _tokenizer_hash(checkpoints.data(number))
            if None not in (expected, tokenizer) and expected != tokenizer:
                raise UserError(
                    f"the tokenizer in {folder} was changed: its SHA-256 is {tokenizer[:12]}, the "
                    f"model was trained with {expected[:12]}; bring that file back"
                )
            if weights != "float32":
                form = form_of(weights)
                arrays = progress(checkpoints.restore_each(number, "params", params))

                def checked(path, array):
                    return form(path, _checked(path, array, folder))

                # Not by a loop, whose variable would keep each array while the next one is read.
                leaves = list(itertools.starmap(checked, arrays))
                return place(jax.tree.structure(params).unflatten(leaves), model, mesh), None
            abstract = {"params": params}
            if "mlm_head" in checkpoints.items(number):
                everywhere = replicated(mesh)
                abstract["mlm_head"] = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
                    mlm_head_shapes(model),
                )
            for restored in progress([checkpoints.restore(number, **abstract)]):
                return restored["params"], restored.get("mlm_head")

        # A run may still write here, and remove the checkpoint that was the newest a moment ago.
        restored = read_newest(folder / CHECKPOINTS, step, ("params", "mlm_head"), of_step)
        if weights == "float32":
            refuse_not_finite({"params": restored[0], "mlm_head": restored[1] or {}}, folder)
        return restored

    has_prompts = any(prompts.values())
    dims = read_matryoshka_dims(folder, model.width)
    return ModelFolder(model, None, None, prompts, lengths, has_prompts, [], [], dims, read)


def _card_settings(card: dict, where: pathlib.Path) -> tuple[dict[str, str], dict[str, int]]:
    """(prompts, longest texts of each side) that the card of a folder of ours says.

    Raises `UserError` naming the file and the key.
    """
    data, prompts = card.get("data"), card.get("prompts") or {}
    for name, section in (("data", data), ("prompts", prompts)):
        if not isinstance(section, dict):
            raise UserError(f"{where}: {name}={section!r:.40} must be an object")
    prompts = {name: text(prompts, name, where, "") for name in prompts}
    # A run of masked language modelling has rows of documents, and knows no prompts.
    is_masked = card.get("objective") == MASKED_LM
    keys = {side: "row_length" if is_masked else f"{side}_length" for side in PROMPTS}
    lengths = {side: whole(data, key, where, NO_LIMIT) for side, key in keys.items()}
    return with_document(prompts or (NO_PROMPTS if is_masked else PROMPTS)), lengths


def refuse_not_finite(params: dict, where) -> None:
    """Raises `UserError` that names a parameter with NaN or infinite numbers.

    All processes that share `params` call this together.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    on_host = all(leaf.is_fully_addressable for _, leaf in leaves) and all(
        device.platform == "cpu" for _, leaf in leaves for device in leaf.devices()
    )
    if on_host:
        for path, leaf in leaves:
            _checked(path_of(path), leaf, where)
        return
    for path, is_finite in jax.tree_util.tree_leaves_with_path(leaves_finite(params)):
        if not to_host(is_finite):
            raise _not_finite(path_of(path), where)


def _checked(path: str, array, where):
    """`array`, if it is finite."""
    if not all_finite(np.asarray(array)):
        raise _not_finite(path, where)
    return array


def _not_finite(path: str, where) -> UserError:
    return UserError(
        f"{where}: parameter {path} holds NaN or infinite numbers: training diverged, or the file "
        "is damaged; take an earlier step (--step) or another model"
    )


def _tokenizer_hash(data: dict) -> str | None:
    """The SHA-256 of the tokenizer in a checkpoint's data spec; None: it does not say."""
    vocabulary = data.get("store", data).get("vocabulary")
    return vocabulary["sha256"] if vocabulary else None


def place(params: dict, model: EncoderConfig, mesh: jax.sharding.Mesh) -> dict:
    """NumPy parameters (the same on every process) to device arrays in their shardings."""

    def put(leaf, sharding):
        return jax.tree.map(lambda array: to_devices(array, sharding), leaf)

    placed = shardings(params, rules_for(model), mesh)
    return jax.tree.map(put, params, placed, is_leaf=is_array)


def check_vocabulary(vocabulary, model: EncoderConfig, where) -> None:
    """Raises `UserError` if the vocabulary is another model's, by its size."""
    spare = model.vocab_size - vocabulary.size
    if spare < 0 or spare > MOST_UNUSED_ROWS:
        raise UserError(
            f"the tokenizer {where} has {vocabulary.size} ids, the model's word table "
            f"{model.vocab_size} rows: it is another model's"
        )


def max_length(model: EncoderConfig, said: int | None) -> int:
    """Longest text in tokens: what the folder said, within the table of positions."""
    limit = model.max_positions or LONGEST
    return limit if said is None else min(said, limit)


def with_document(prompts: dict[str, str]) -> dict[str, str]:
    """sentence-transformers calls documents "passage" or "corpus" too; here both names work."""
    names = [name for name in ("document", "passage", "corpus") if name in prompts]
    return {"query": "", "document": prompts[names[0]] if names else "", **prompts}


def save_model(
    folder: pathlib.Path, loaded: LoadedModel, origin: str, command: str | None = None
) -> None:
    """Writes a folder of ours that `load_model` and `init.source` of a training config read.

    It appears when it is complete.

    Args:
      origin: where the model comes from, for people.
      command: as of `made_by`, to be kept in the folder.
    """
    from moe_embed_jax.checkpoint import Checkpoints

    with new_folder(folder, last=RUN_CONFIG) as partial:
        if loaded.vocabulary is not None:
            sentencepiece = isinstance(loaded.vocabulary, Vocabulary)
            name = SENTENCEPIECE_FILE if sentencepiece else JSON_FILE
            (partial / name).write_bytes(loaded.vocabulary.model_bytes)
        trees = {"params": loaded.params}
        if loaded.mlm_head is not None:
            trees["mlm_head"] = loaded.mlm_head
        checkpoints = Checkpoints(partial / CHECKPOINTS)
        own = loaded.vocabulary and {"vocabulary": {"sha256": loaded.vocabulary.content_hash}}
        checkpoints.save(0, {"origin": origin, **(own or {})}, **trees)
        checkpoints.close()
        save_card(
            partial / RUN_CONFIG,
            {
                "model": dataclasses.asdict(loaded.model),
                "data": {f"{side}_length": n for side, n in loaded.max_lengths.items()},
                "prompts": loaded.prompts,
                MATRYOSHKA_KEY: list(loaded.matryoshka_dims),
                "origin": origin,
            },
        )
        if command:
            keep_command(partial, command)
