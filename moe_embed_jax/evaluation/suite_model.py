"""The model that a suite evaluates: its vectors, and what the results say about it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.results import ModelCard
from moe_embed_jax.evaluation.text_vectors import SIDES, TextEncoder, TextVectors
from moe_embed_jax.interop.source import EXTERNAL, HUB

LOCAL = "local"  # organisation of a model that is a folder


def model_vectors(
    encoder: TextEncoder,
    cache: Path,
    prompts: dict[str, str | None],
    mesh: jax.sharding.Mesh,
    widths: Sequence[int | None],
    dtype: str,
) -> TextVectors:
    """A width of all features is None. Raises `UserError` for an unknown prompt and for a width
    that the model does not have."""
    for side in SIDES:
        full = encoder.encode([], prompt=prompts[side]).shape[1]
    for width in widths:
        if width is not None and not 1 <= width <= full:
            raise UserError(f"--dim={width} must be between 1 and the model's width {full}")
    widths = dict.fromkeys(None if width == full else width for width in widths)
    return TextVectors(encoder, cache, prompts, mesh, tuple(widths), dtype)


def model_card(encoder: TextEncoder, vectors: TextVectors, name: str) -> ModelCard:
    """What the results are filed under.

    name: organisation/model, or a folder, of which the last part counts. The revision is 40 digits
    of a hash of weights, tokenizer, prefixes and lengths.
    """
    identity = vectors.identity()
    text = json.dumps(identity, sort_keys=True)
    params = getattr(encoder, "params", None)
    return ModelCard(
        name=_name(name),
        revision=hashlib.sha256(text.encode()).hexdigest()[:40],
        width=encoder.encode([], prompt=None).shape[1],
        max_tokens=max(side["max_length"] for side in identity.values()),
        prompts={side: identity[side]["prefix"] for side in SIDES},
        framework=("Sentence Transformers", "PyTorch") if params is None else ("JAX",),
        parameters=None if params is None else sum(x.size for x in jax.tree.leaves(params)),
    )


def _name(name: str) -> str:
    """organisation/model stays, as on the hub; of a folder the last part, below `LOCAL`."""
    name = name.removeprefix(EXTERNAL)
    if name.startswith(HUB):
        return name.removeprefix(HUB).partition("@")[0]
    is_on_hub = name.count("/") == 1 and not name.startswith((".", "/"))
    path = storage.path(name)
    return name if is_on_hub and not path.exists() else f"{LOCAL}/{path.resolve().name}"
