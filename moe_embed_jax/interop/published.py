"""Model folders as others publish them: config.json and safetensors of a known architecture."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop import bert, nomic
from moe_embed_jax.interop.layers import from_layers, shapes_by_layer
from moe_embed_jax.interop.rules import Entry, Rule, entries, to_ours
from moe_embed_jax.interop.source import CONFIG_FILE
from moe_embed_jax.interop.tensors import Tensors
from moe_embed_jax.json_file import read_object
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.models.heads import UNREACHABLE_BIAS, mlm_head_shapes
from moe_embed_jax.sharding import path_of

# model_type -> module with the table, rules of the language-model head.
LAYOUTS = {
    "nomic_bert": (nomic, nomic.HEAD_RULES),
    "moe_embed": (nomic, nomic.HEAD_RULES),
    "bert": (bert, bert.BERT_HEAD_RULES),
    "roberta": (bert, bert.ROBERTA_HEAD_RULES),
    "xlm-roberta": (bert, bert.ROBERTA_HEAD_RULES),
}
VOCABULARY_MULTIPLE = 64  # of the word table of a stage 1 encoder, as the reference pads it


@dataclasses.dataclass
class PublishedModel:
    """A checked checkpoint whose values are read by `read`.

    Attributes:
      model: the encoder as it will be (positions and vocabulary padding applied).
      has_mlm_head: whether the folder holds a language-model head.
      unused: tensors that an embedding does not need.
      model_type: as config.json names it.
    """

    model: EncoderConfig
    has_mlm_head: bool
    unused: list[str]
    model_type: str
    _tensors: Tensors
    _table: list[Entry]

    def read(self, progress=iter, form=lambda path, array: array) -> tuple[dict, dict | None]:
        """(encoder parameters, head or None), NumPy float32.

        `progress` wraps the iterable of parameters, as tqdm does. `form`: (path by layer, array of
        a layer) -> what becomes the parameter, see `int8_weight.quantized`.

        Raises `UserError` for NaN or infinite weights, naming the tensor.
        """
        head: dict = {}
        arrays = progress(self._adapted(head))
        params = from_layers(self.model, ((path, form(path, array)) for path, array in arrays))
        return params, unflatten_dict(head, sep="/") if self.has_mlm_head else None

    def _adapted(self, head: dict) -> Iterator[tuple[str, np.ndarray]]:
        """The encoder's arrays as `model` wants them; the head's are put into `head`."""
        model = self.model
        for path, array in to_ours(self._table, self._tensors):
            if path == "embeddings/position":
                if model.positions == "rotary":
                    continue
                array = array[array.shape[0] - model.max_positions :]
            elif path == "embeddings/token":
                array = _pad_rows(array, model.vocab_size, 0.0)
            elif path == "mlm_head/bias":
                array = _pad_rows(array, model.vocab_size, UNREACHABLE_BIAS)
            if path.startswith("mlm_head/"):
                head[path.removeprefix("mlm_head/")] = np.ascontiguousarray(array)
            else:
                yield path, array


def read_config(folder: pathlib.Path) -> dict:
    """config.json of a model folder. Raises `UserError`: there is none, or it is no JSON object."""
    path = folder / CONFIG_FILE
    if not storage.has_entry(path):
        raise UserError(f"{folder} is not a model folder: {CONFIG_FILE} is missing")
    return read_object(path)


def has_mlm_head(folder: pathlib.Path) -> bool | None:
    """Whether a RoBERTa checkpoint holds its language-model head; None for other architectures."""
    if "roberta" not in str(read_config(folder).get("model_type")):
        return None
    return bert.ROBERTA_HEAD_RULES[0].keys[0] in Tensors(folder).names


def open_published(folder, positions: str = "learned") -> PublishedModel:
    """Checks config.json, every tensor's name and shape; reads no weights yet.

    Args:
      positions: what becomes of learned positions: "learned" keeps them, which is exact; "rotary"
        drops the table for a rotary encoder, which is stage 1's start (paper 4.1: it needs masked
        language modelling before it is good for anything), and pads the word table to a multiple
        of 64.

    Raises:
      UserError: an unknown architecture, pickle files, and whatever does not fit.
    """
    folder = storage.path(folder)
    config = read_config(folder)
    where = str(folder / CONFIG_FILE)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in LAYOUTS:
        raise UserError(
            f"{where}: model_type={model_type!r:.80} is not known here; there are "
            f"{', '.join(sorted(LAYOUTS))}, and the work directories of training runs"
        )
    layout, head_rules = LAYOUTS[model_type]
    tensors = Tensors(folder)
    tensors.drop_prefix(layout.PREFIXES, "embeddings.word_embeddings.weight")
    # Names of LayerNorm parameters in files that were converted from TensorFlow.
    tensors.rename(lambda name: re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name)))
    try:
        file_model = layout.model_from_config(config, tensors.names, where)
    except UserError as error:  # of the encoder's own checks, which know no file
        line = str(error)
        raise UserError(line if line.startswith(where) else f"{where}: {line}") from None

    shapes = shapes_by_layer(file_model)
    has_head = head_rules[0].keys[0] in tensors.names
    rules: tuple[Rule, ...] = layout.RULES
    if has_head:
        rules += head_rules
        flat = jax.tree_util.tree_flatten_with_path(mlm_head_shapes(file_model))[0]
        shapes |= {f"mlm_head/{path_of(path)}": leaf.shape for path, leaf in flat}
    unused = _set_aside(tensors, layout, has_head)
    if layout is nomic and not file_model.expert_output_bias:
        _drop_zero_biases(tensors)
    table = entries(rules, shapes)
    to_ours(table, tensors)  # raises what does not fit

    model = file_model
    if file_model.positions == "learned":
        if positions == "rotary":
            padded = -(-file_model.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
            model = dataclasses.replace(
                file_model, positions="rotary", max_positions=0, vocab_size=padded
            )
        else:
            first = 0 if layout is nomic else bert.first_position(config, where)
            model = dataclasses.replace(file_model, max_positions=file_model.max_positions - first)
    return PublishedModel(model, has_head, unused, model_type, tensors, table)


def _set_aside(tensors: Tensors, layout, has_head: bool) -> list[str]:
    """Takes out what the encoder does not need; returns the names.

    Raises `UserError` for a separate output matrix: our head uses the word table.
    """
    unused = []
    for name in list(tensors.names):
        if name in layout.TIED:
            words = "embeddings.word_embeddings.weight"
            if has_head and not np.array_equal(tensors.read(name), tensors.read(words)):
                raise UserError(
                    f"{tensors.origin}: {name} is not tied to the word embeddings; such a "
                    "language-model head cannot be kept"
                )
        elif not any(re.fullmatch(pattern, name) for pattern in layout.IGNORED):
            continue
        unused.append(name)
        tensors.discard(name)
    return unused


def _drop_zero_biases(tensors: Tensors) -> None:
    """Raises `UserError` for an output bias of experts in a model that says it has none."""
    for name in [name for name in tensors.names if re.fullmatch(nomic.OUTPUT_BIAS, name)]:
        if tensors.read(name).any():
            raise UserError(
                f"{tensors.origin}: {name} is not zero, but config.json says "
                "moe_expert_output_bias=false; remove that key"
            )
        tensors.discard(name)


def _pad_rows(array: np.ndarray, rows: int, value: float) -> np.ndarray:
    if array.shape[0] == rows:
        return array
    padding = np.full((rows - array.shape[0], *array.shape[1:]), value, array.dtype)
    return np.concatenate([array, padding])
