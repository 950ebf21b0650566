"""A folder of compiled programs, so that the next process loads them instead of compiling."""

import jax
from jax.experimental.compilation_cache import compilation_cache

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError


def keep_programs(folder) -> None:
    """From now on JAX keeps every program that this process compiles in `folder`, and looks there
    first. It is made if it does not exist; it may be a bucket, and many processes may share it.

    A program is found by its code, the versions of JAX and XLA and the devices, so a folder cannot
    give a wrong one. JAX's own threshold, which keeps only what compiled for a second, is lifted:
    the programs of an embedder are small, and there are few.

    Raises `UserError` where `folder` is a file, or cannot be made.
    """
    folder = storage.path(folder)
    if folder.is_file():
        raise UserError(f"compilation_cache={folder} is a file: name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"compilation_cache={folder} cannot be made: {why}") from None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # JAX looks at the folder's name only once
