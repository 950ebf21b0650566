"""A model with random weights as a run leaves it; which of its parameters are matrices."""

import dataclasses
import json

import jax

from moe_embed_jax.checkpoint import Checkpoints
from moe_embed_jax.models.encoder import init_params

MATRICES = ("token", "qkv/kernel", "out/kernel", "up/kernel", "down/kernel", "w_in", "w_out")


def write(folder, model, query_length: int, document_length: int) -> None:
    """config.json and the checkpoint of step 1."""
    lengths = {"query_length": query_length, "document_length": document_length}
    card = {"model": dataclasses.asdict(model), "data": lengths}
    (folder / "config.json").write_text(json.dumps(card))
    checkpoints = Checkpoints(folder / "checkpoints")
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    checkpoints.save(1, {}, params=params)
    checkpoints.close()
