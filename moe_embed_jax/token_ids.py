"""Token ids that a caller brings: checked before anything is computed with them."""

import numpy as np

from moe_embed_jax.errors import UserError
from moe_embed_jax.models.encoder_config import EncoderConfig


def checked_ids(input_ids, attention_mask, model: EncoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """int32 ids and bool mask, both [batch, length].

    Raises `UserError`: other shapes, a mask that is not 0 or 1, ids outside the word table, more
    columns than the model has positions.
    """
    ids, mask = np.asarray(input_ids), np.asarray(attention_mask)
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise UserError(
            f"input_ids {list(ids.shape)} and attention_mask {list(mask.shape)} must both be "
            "[batch, length]"
        )
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"input_ids are {ids.dtype}; they must be integers")
    if not np.isin(mask, (0, 1)).all():
        raise UserError("attention_mask must hold 0 (padding) and 1 (token) only")
    mask = mask.astype(bool)
    outside = mask & ((ids < 0) | (ids >= model.vocab_size))
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        raise UserError(
            f"input_ids[{row}, {column}] = {ids[row, column]} is outside the word table "
            f"[0, {model.vocab_size})"
        )
    if model.max_positions and mask[:, model.max_positions :].any():
        raise UserError(
            f"a text has tokens beyond column {model.max_positions}, the model's last "
            "position: truncate it"
        )
    return ids.astype(np.int32), mask
