"""Uploading an exported folder to the Hugging Face hub, by the hub's own client."""

import os
import pathlib

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError, first_line
from moe_embed_jax.interop.model_card import CARD, UNNAMED
from moe_embed_jax.interop.source import CONFIG_FILE
from moe_embed_jax.interop.tensors import WEIGHTS_FILE
from moe_embed_jax.made_by import MADE_BY


def check_push(folder: str | os.PathLike, name: str) -> tuple[pathlib.Path, list[str]]:
    """(the folder, notes on what its card lacks), before anything is sent.

    Raises `UserError`: no export, a name that is not OWNER/NAME, a card whose
    front matter the hub cannot read.
    """
    from huggingface_hub import ModelCard

    folder = storage.path(folder)
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"--target={name}: write OWNER/NAME, the model on the hub")
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE, CARD) if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{folder} is no exported folder, it has no {' and no '.join(missing)}: make one by "
            "launch/convert.py export"
        )
    try:
        data = ModelCard.load(storage.local_copy(folder / CARD)).data
    except Exception as error:  # of YAML or of the client
        raise UserError(f"{folder / CARD}: bad front matter: {first_line(error)}") from None
    notes = [f"the card names no {key}" for key in ("license", "language") if not data.get(key)]
    if f'"{UNNAMED}"' in (folder / CARD).read_text(encoding="utf-8"):
        notes.append(f"the card calls the model {UNNAMED}: export with --name=OWNER/NAME")
    return folder, notes


def files_to_push(folder: pathlib.Path) -> dict[str, int]:
    """{name: bytes} of what is uploaded."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return {name: size for name, size in sizes.items() if name != MADE_BY}


def push(folder: pathlib.Path, name: str, private: bool, message: str) -> str:
    """Creates the model on the hub if need be, and uploads the folder; returns the commit's URL.

    Raises `UserError` with the hub's first line.
    """
    import huggingface_hub

    with storage.local_folder(folder) as local:
        try:
            api = huggingface_hub.HfApi()
            api.create_repo(name, private=private or None, repo_type="model", exist_ok=True)
            commit = api.upload_folder(
                repo_id=name,
                folder_path=str(local),
                repo_type="model",
                commit_message=message,
                ignore_patterns=[MADE_BY],
            )
        except Exception as error:  # the client raises a dozen kinds, all with a clear first line
            raise UserError(f"{name} cannot be uploaded: {first_line(error)}") from None
    return str(commit.commit_url)
