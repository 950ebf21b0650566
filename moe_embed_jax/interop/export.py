"""A self-contained folder for PyTorch: weights, config, tokenizer, sentence-transformers modules.

Experts or rotary positions: the layout of nomic-embed-text-v2-moe with our modelling file, which
needs `trust_remote_code=True` and no network. A dense encoder with learned positions leaves as
transformers' BERT, which needs nothing of ours.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from moe_embed_jax import storage
from moe_embed_jax.interop import bert, nomic
from moe_embed_jax.interop.card_config import CardConfig
from moe_embed_jax.interop.layers import by_layer, shapes_by_layer
from moe_embed_jax.interop.matryoshka import MATRYOSHKA_KEY
from moe_embed_jax.interop.model_card import CARD, Exported, model_card
from moe_embed_jax.interop.onnx_export import write_onnx
from moe_embed_jax.interop.output_bias import output_bias_size
from moe_embed_jax.interop.prompts import exported_prompts
from moe_embed_jax.interop.rules import entries, to_theirs
from moe_embed_jax.interop.sentence_transformers import write_settings
from moe_embed_jax.interop.source import CONFIG_FILE
from moe_embed_jax.interop.tensors import WEIGHTS_FILE, write_tensors
from moe_embed_jax.made_by import keep_command
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.new_folder import new_folder
from moe_embed_jax.tokenizers.files import write_tokenizer

MODELING_FILE = "modeling_moe_embed.py"  # torch_model.py under the name that config.json gives


def leaves_as_bert(model: EncoderConfig) -> bool:
    return model.positions == "learned" and not model.num_moe_layers


def export_tensors(
    model: EncoderConfig, arrays: Mapping[str, np.ndarray]
) -> Iterable[tuple[str, np.ndarray]]:
    """(name, array) of the published layout from {path by layer: array}.

    The layout has an output bias of the experts, which is zero for a model without.
    """
    rules = bert.RULES if leaves_as_bert(model) else nomic.RULES
    layout = dataclasses.replace(model, expert_output_bias=True)
    shapes = shapes_by_layer(layout)
    zeros = {path: np.zeros(shapes[path], np.float32) for path in shapes.keys() - arrays.keys()}
    return to_theirs(entries(rules, shapes), {**arrays, **zeros})


def export_config(model: EncoderConfig, max_length: int, pad_id: int) -> dict:
    # Without a version transformers 4 takes every large tokenizer for one with a known fault, and
    # its advice (fix_mistral_regex) would break this one.
    version = {"transformers_version": "5.0.0"}
    if leaves_as_bert(model):
        return bert.config_from_model(model, pad_id) | version
    config = nomic.config_from_model(model, max_length, pad_id) | version
    module = MODELING_FILE.removesuffix(".py")
    config["auto_map"] = {
        "AutoConfig": f"{module}.NomicBertConfig",
        "AutoModel": f"{module}.NomicBertModel",
    }
    return config


def write_folder(
    folder,
    model: EncoderConfig,
    params: dict,
    vocabulary,
    prompts: dict,
    max_length: int,
    matryoshka_dims: Sequence[int] = (),
    progress=iter,
    command: str | None = None,
    onnx: str | None = None,
    card: CardConfig | None = None,
    scores: Sequence[dict] = (),
) -> None:
    """Writes `folder`, which appears when it is complete.

    Args:
      vocabulary: None leaves the tokenizer out (then only token ids can be embedded).
      prompts: name -> prefix; "document" is there as "passage" too.
      max_length: of a text, in tokens; PyTorch's side has one for queries and documents.
      matryoshka_dims: widths that vectors may be cut to; servers refuse others.
      progress: wraps the iterable of tensors, as tqdm does.
      command: as of `made_by`, to be kept in the folder.
      onnx: None, or one of `onnx_export.CHOICES`.
      card: what the model card says that weights do not.
      scores: for the card, as of `card_results`.

    Raises `UserError` if `folder` exists.
    """
    with new_folder(folder, last=CONFIG_FILE) as partial:
        arrays = by_layer(model, params)
        write_tensors(partial / WEIGHTS_FILE, progress(export_tensors(model, arrays)))
        config = export_config(model, max_length, 1 if vocabulary is None else vocabulary.pad_id)
        if matryoshka_dims:
            config[MATRYOSHKA_KEY] = list(matryoshka_dims)
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        if not leaves_as_bert(model):
            source = pathlib.Path(__file__).with_name("torch_model.py")
            storage.copy(source, partial / MODELING_FILE)
        if vocabulary is not None:
            write_tokenizer(vocabulary, partial, max_length)
        prompts = exported_prompts(prompts)
        write_settings(partial, model.width, prompts, max_length, model.pooling)
        if onnx:
            write_onnx(partial, onnx)
        exported = Exported(
            model,
            prompts,
            max_length,
            matryoshka_dims,
            output_bias_size(arrays),
            leaves_as_bert(model),
            sorted(path.name for path in (partial / "onnx").glob("*.onnx")),
            scores,
        )
        text = model_card(exported, card or CardConfig())
        (partial / CARD).write_text(text, encoding="utf-8")
        if command:
            keep_command(partial, command)
