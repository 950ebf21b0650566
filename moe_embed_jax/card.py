"""The config.json of a run's folder, and of a model folder that we wrote, with its own checksum.

It says what the weights are: another number there can give other vectors without an error.
"""

import pathlib

from moe_embed_jax.checksums import take_own, with_own
from moe_embed_jax.config import save_json
from moe_embed_jax.errors import UserError
from moe_embed_jax.json_file import read_object


def save_card(path: pathlib.Path, values: dict) -> None:
    save_json(path, with_own(values))


def read_card(path: pathlib.Path) -> dict:
    """What `save_card` wrote; a file of an earlier version has no checksum, and may be changed.

    Raises `UserError` for a file that is no JSON object or was changed.
    """
    card = read_object(path)
    if take_own(card) is False:
        raise UserError(
            f"{path} was changed (its CRC-32 differs): bring it back, or remove its key "
            '"crc32" if you meant to change it'
        )
    return card
