"""Tables of key rules between our parameters and the tensors of a checkpoint of others.

One table serves both directions. What the table and the file do not agree on is an error that names
the tensor: a checkpoint that loads by halves is worse than one that does not load.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.tensors import Tensors

# Name -> (ours to theirs, theirs to ours given our shape).
LAYOUTS = {
    "same": (lambda x: x, lambda x, shape: x),
    # Linear kernels: ours [in, out], theirs (PyTorch) [out, in].
    "linear": (lambda x: x.T, lambda x, shape: x.T),
    # Experts, ours [E, D, F]; theirs [E * F, D], used as x @ w[e].T.
    "experts_in": (
        lambda x: x.transpose(0, 2, 1).reshape(-1, x.shape[1]),
        lambda x, shape: x.reshape(shape[0], shape[2], shape[1]).transpose(0, 2, 1),
    ),
    # Experts, ours [E, F, D]; theirs [E * F, D], used as hidden @ w[e], not transposed.
    "experts_out": (
        lambda x: x.reshape(-1, x.shape[-1]),
        lambda x, shape: x.reshape(shape),
    ),
    # Hidden biases of the experts, ours [E, F]; theirs [E * F].
    "experts_bias": (lambda x: x.reshape(-1), lambda x, shape: x.reshape(shape)),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Our parameter `path` ({i}: the layer) is the tensors `keys` of the other side.

    Several keys lie one after the other on the first axis of the other side's layout.
    """

    path: str
    keys: tuple[str, ...]
    layout: str = "same"


def linear(path: str, *keys: str) -> tuple[Rule, Rule]:
    """Kernel and bias of our layer `path`, which joins the PyTorch layers `keys`."""
    return (
        Rule(f"{path}/kernel", tuple(f"{key}.weight" for key in keys), "linear"),
        Rule(f"{path}/bias", tuple(f"{key}.bias" for key in keys)),
    )


def layer_norm(path: str, key: str) -> tuple[Rule, Rule]:
    """Scale and bias of a layer norm."""
    return Rule(f"{path}/scale", (f"{key}.weight",)), Rule(f"{path}/bias", (f"{key}.bias",))


def mlm_head(dense: str, norm: str, bias: str) -> tuple[Rule, ...]:
    """The language-model head; its output matrix is the word table."""
    return (
        *linear("mlm_head/dense", dense),
        *layer_norm("mlm_head/norm", norm),
        Rule("mlm_head/bias", (bias,)),
    )


def check_architecture(config: dict, allowed: Mapping[str, tuple], where: str) -> None:
    """Raises `UserError` for a key of config.json that has none of its allowed values."""
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise UserError(
                f"{where}: {key}={config[key]!r:.60} is an architecture that this encoder is not "
                f"({key} must be {values[0]!r})"
            )


@dataclasses.dataclass(frozen=True)
class Entry:
    """A rule applied to one parameter: shapes of ours and of each of their tensors."""

    path: str
    keys: tuple[str, ...]
    layout: str
    shape: tuple[int, ...]
    their_shape: tuple[int, ...]


def entries(rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
    """The rule of every parameter of ours, in the order of `shapes` (path by layer -> shape).

    Raises:
      ValueError: a parameter without a rule, or tensors that would not be of equal size.
    """
    patterns = [
        (re.compile(re.escape(rule.path).replace(re.escape("{i}"), r"(\d+)")), rule)
        for rule in rules
    ]
    result = []
    for path, shape in shapes.items():
        found = [(m, rule) for pattern, rule in patterns if (m := pattern.fullmatch(path))]
        if len(found) != 1:
            raise ValueError(f"parameter {path} {shape} has {len(found)} key rules, not 1")
        match, rule = found[0]
        layer = match[1] if match.re.groups else ""
        keys = tuple(key.replace("{i}", layer) for key in rule.keys)
        theirs = jax.eval_shape(LAYOUTS[rule.layout][0], jax.ShapeDtypeStruct(shape, "float32"))
        first, *rest = theirs.shape
        if first % len(keys):
            raise ValueError(f"{path}: {first} rows do not divide into {len(keys)} tensors")
        their_shape = (first // len(keys), *rest)
        result.append(Entry(path, keys, rule.layout, shape, their_shape))
    return result


def to_ours(table: list[Entry], tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """(path by layer, float32 array) pairs, read one by one from a checkpoint.

    Raises `UserError` before anything is read, naming every tensor that is missing, left over or of
    another shape (the first few of each).
    """
    wanted = {key: entry.their_shape for entry in table for key in entry.keys}
    faults = [f"{key} is missing" for key in wanted if key not in tensors.names]
    faults += [f"{key} is left over" for key in tensors.names if key not in wanted]
    faults += [
        f"{key} has shape {list(tensors.shape(key))} instead of {list(shape)}"
        for key, shape in wanted.items()
        if key in tensors.names and tensors.shape(key) != shape
    ]
    if faults:
        more = f" and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise UserError(
            f"{tensors.origin} does not hold the model that its config.json describes: "
            f"{'; '.join(faults[:6])}{more}"
        )

    def read():
        for entry in table:
            parts = [tensors.read(key) for key in entry.keys]
            joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
            yield entry.path, LAYOUTS[entry.layout][1](joined, entry.shape)

    return read()


def to_theirs(
    table: list[Entry], arrays: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """(tensor name, array) pairs of the other side from {path by layer: array} of ours."""
    for entry in table:
        theirs = LAYOUTS[entry.layout][0](arrays[entry.path])
        parts = np.split(theirs, len(entry.keys)) if len(entry.keys) > 1 else [theirs]
        yield from zip(entry.keys, parts, strict=True)
