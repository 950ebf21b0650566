"""Copies of token stores on the disk of this machine, for stores that lie in a bucket.

Training reads rows at random, and in a bucket each read waits for the network.
"""

import concurrent.futures
from pathlib import Path

import tqdm

from moe_embed_jax import storage
from moe_embed_jax.checksums import checksums, damage_of
from moe_embed_jax.data.token_store import SPEC, read_spec
from moe_embed_jax.errors import UserError
from moe_embed_jax.new_folder import new_folder
from moe_embed_jax.ownership import own

COPIES_AT_ONCE = 16
KEPT_FREE = 1 << 30  # bytes on the disk, for what else is written there


def copied_store(folder: Path, cache_dir: str) -> Path:
    """`cache_dir`/tokens-HASH: the token store `folder`, copied there now unless it is there.

    HASH is that of the store's content, so a copy is never out of date. Of several processes on
    this machine one copies, and the others wait for it.

    Raises:
      UserError: `cache_dir` is in a bucket, or has no room; a file was damaged on the way.
    """
    cache = storage.path(cache_dir).expanduser()
    if storage.is_remote(cache):
        raise UserError(f"data.cache_dir={cache} is in a bucket: name a folder on a local disk")
    target = cache / f"tokens-{read_spec(folder)['hash'][:16]}"
    with own(cache, inside=True, wait=True):
        if (target / SPEC).is_file():
            print(f"data: copied before, {target}")
        else:
            _copy(folder, target)
    return target


def _copy(folder: Path, target: Path) -> None:
    files = checksums(folder, ["."])
    sizes = {name: int(value.partition("-")[0]) for name, value in files.items()}
    needed, free = sum(sizes.values()) + KEPT_FREE, storage.free_bytes(target.parent)
    if needed > free:
        raise UserError(
            f"data.cache_dir={target.parent} has {free / 1e9:.1f} GB free, and {folder} needs "
            f"{needed / 1e9:.1f} GB: name a folder on a larger disk, or leave data.cache_dir out"
        )
    with (
        new_folder(target, last=SPEC, replace=True) as partial,
        concurrent.futures.ThreadPoolExecutor(COPIES_AT_ONCE) as pool,
        tqdm.tqdm(
            total=sum(sizes.values()),
            desc="copy data",
            unit="B",
            unit_scale=True,
            mininterval=0.5,
        ) as bar,
    ):

        def copy(name: str) -> str:
            storage.copy(folder / name, partial / name)
            if damage := damage_of(partial / name, files[name]):
                raise UserError(f"{damage} after it was copied from {folder}: repeat the command")
            return name

        for done in concurrent.futures.as_completed([pool.submit(copy, name) for name in files]):
            try:
                bar.update(sizes[done.result()])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
