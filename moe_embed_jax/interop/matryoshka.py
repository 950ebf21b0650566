"""The widths to which a model's vectors may be cut, as config.json says them."""

import pathlib

from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.source import CONFIG_FILE
from moe_embed_jax.json_file import read_optional

MATRYOSHKA_KEY = "matryoshka_dimensions"  # as vLLM and SGLang read it


def read_matryoshka_dims(folder: pathlib.Path, width: int) -> tuple[int, ...]:
    """Widths from wide to narrow: of a published folder or an import, or a run's `loss.dims`.

    (): config.json names none. Raises `UserError` for what is no list of widths.
    """
    path = folder / CONFIG_FILE
    card = read_optional(path)
    widths = card.get(MATRYOSHKA_KEY)
    if widths is None:
        dims = card["loss"].get("dims") if isinstance(card.get("loss"), dict) else None
        dims = dims if isinstance(dims, dict) else {}
        widths = [int(key) for key, weight in dims.items() if key.isdecimal() and weight]
    if not isinstance(widths, list) or any(
        type(dim) is not int or not 1 <= dim <= width for dim in widths
    ):
        raise UserError(
            f"{path}: {MATRYOSHKA_KEY}={widths!r:.60} must be a list of widths from 1 to {width}"
        )
    return tuple(sorted(set(widths), reverse=True))
