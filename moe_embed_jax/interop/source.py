"""Where a model comes from: a folder, or the Hugging Face hub by `hf://OWNER/NAME`.

Imports no jax.
"""

import pathlib

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError, first_line

HUB = "hf://"
EXTERNAL = "sentence-transformers:"  # in front of a model that PyTorch runs
CONFIG_FILE = "config.json"  # of every model folder
# Weights as safetensors, configuration and tokenizer; never code and never pickles.
PATTERNS = ("*.safetensors", "*.json", "*.model", "1_Pooling/*", "*.txt")


def source_folder(source: str | pathlib.Path) -> pathlib.Path:
    """The folder of `source`, downloaded into the hub's cache first if it is on the hub.

    Raises:
      UserError: no such folder; a hub name that is not OWNER/NAME, or that cannot be fetched.
    """
    check_source(source)
    text = str(source)
    if not text.startswith(HUB):
        return storage.path(text)
    name, _, revision = text.removeprefix(HUB).partition("@")
    import huggingface_hub

    try:
        path = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(PATTERNS)
        )
    except Exception as error:  # the hub's client raises a dozen kinds, all with a clear first line
        raise UserError(f"{text} cannot be fetched: {first_line(error)}") from None
    return storage.path(path)


def check_source(source: str | pathlib.Path) -> None:
    """Raises `UserError` for no such folder, or a hub name that is not OWNER/NAME; asks no hub."""
    text = str(source)
    if not text.startswith(HUB):
        if not storage.path(text).is_dir():
            hint = f"; on the hub? then {HUB}{text}" if text.count("/") == 1 else ""
            raise UserError(f"model folder {text} does not exist{hint}")
        return
    name = text.removeprefix(HUB).partition("@")[0]
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"{text}: write {HUB}OWNER/NAME, with @REVISION for a fixed version")
