"""Parameters by layer: `layers/3/moe/w_in` instead of `groups/block_1/moe/w_in` at index 1.

The encoder stacks equal layers for its scan; checkpoints of others, and upcycling, think in layers.
All tables of key rules are written against this form, so they know nothing of grouping.
"""

from collections.abc import Iterable, Iterator

import jax
import ml_dtypes
import numpy as np

from moe_embed_jax.models.encoder import EncoderConfig, abstract_params
from moe_embed_jax.sharding import path_of


def _leaves(config: EncoderConfig) -> Iterator[tuple[str, tuple, tuple[int, ...], int | None]]:
    """(path by layer, key path in the tree, shape, index on the stacked axis) of every parameter.

    In the order of the layers.
    """
    leaves = jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]
    first_layer = {"groups": 0}
    first_layer["tail"] = config.num_layers - config.parts.get("tail", (0, 0))[1]
    blocks = []
    for key_path, leaf in leaves:
        keys = tuple(key.key for key in key_path)
        if keys[0] not in first_layer:
            yield path_of(key_path), keys, leaf.shape, None
            continue
        block = int(keys[1].removeprefix("block_"))
        for index in range(leaf.shape[0]):
            layer = first_layer[keys[0]] + index * config.group_size + block
            name = "/".join(("layers", str(layer), *keys[2:]))
            blocks.append((layer, name, keys, leaf.shape[1:], index))
    for _, *leaf in sorted(blocks, key=lambda block: block[0]):
        yield tuple(leaf)


def shapes_by_layer(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """{path by layer: shape} of all parameters of the encoder."""
    return {name: tuple(shape) for name, _, shape, _ in _leaves(config)}


def by_layer(config: EncoderConfig, params: dict) -> dict[str, np.ndarray]:
    """{path by layer: float32 array on the host}, views of `params` where the host holds them."""
    on_host = jax.tree.map(np.asarray, params)
    result = {}
    for name, keys, _, index in _leaves(config):
        leaf = on_host
        for key in keys:
            leaf = leaf[key]
        result[name] = leaf if index is None else leaf[index]
    return result


def from_layers(config: EncoderConfig, arrays: Iterable[tuple[str, np.ndarray]]) -> dict:
    """The parameter tree (NumPy) from (path by layer, array) pairs, each path once.

    Reads the pairs one by one, so an iterator that loads them needs no second copy of the model.
    Arrays may be `Int8Weight`s of arrays or bfloat16, which stay so.

    Raises:
      ValueError: a path that the architecture lacks, comes twice, is missing, or has another shape.
    """
    places = {name: (keys, shape, index) for name, keys, shape, index in _leaves(config)}
    tree: dict = {}
    for name, array in arrays:
        if name not in places:
            raise ValueError(f"{name}: not a parameter of this encoder, or given twice")
        keys, shape, index = places.pop(name)
        if tuple(array.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {array.shape}, the encoder has {shape}")
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        if index is None:
            node[keys[-1]] = jax.tree.map(
                lambda part: np.ascontiguousarray(part, _dtype(part)), array
            )
        else:
            if keys[-1] not in node:
                count = config.parts[keys[0]][0]
                node[keys[-1]] = jax.tree.map(
                    lambda part, count=count: np.empty((count, *part.shape), _dtype(part)), array
                )
            for whole, part in zip(*map(jax.tree.leaves, (node[keys[-1]], array)), strict=True):
                whole[index] = part
    if places:
        raise ValueError(f"no value for {next(iter(places))}")
    return tree


def _dtype(array: np.ndarray) -> np.dtype:
    """Of parameters: float32, or int8 and bfloat16 as they come."""
    kept = array.dtype in (np.int8, ml_dtypes.bfloat16)
    return array.dtype if kept else np.dtype(np.float32)
