"""Reads a checkpoint of a folder that another process may write to: embedding, export, curation."""

import contextlib
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

from moe_embed_jax.checkpoint import MOST_ATTEMPTS, Checkpoints, DamagedCheckpoint, warn
from moe_embed_jax.errors import UserError
from moe_embed_jax.processes import from_process_0

T = TypeVar("T")


def read_newest(
    folder, step: int | None, trees: Iterable[str], read: Callable[[Checkpoints, int], T]
) -> T:
    """`read(checkpoints, step)` for one checkpoint of a folder that another process may write to.

    Nothing is moved. If the run removes the checkpoint meanwhile, the newest one is read then.

    Args:
      folder: of the checkpoints.
      step: which; None: the newest that is whole. Each damaged one that is newer is named in a
        line.
      trees: those that `read` reads, see `Checkpoints.check`.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or none is whole.
    """
    damaged: set[int] = set()
    for _ in range(MOST_ATTEMPTS):
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            chosen = [s for s in _chosen(checkpoints, step) if s not in damaged]
            number = int(from_process_0(np.array(chosen[-1])))
            try:
                checkpoints.check(number, trees)
                return read(checkpoints, number)
            except DamagedCheckpoint as error:
                with contextlib.closing(Checkpoints(folder)) as now:
                    if max(now.steps(), default=number) > checkpoints.latest_step():
                        continue  # the run went on, and removed this one
                if len(chosen) == 1:
                    raise
                damaged.add(number)
                warn(f"{error}; step {chosen[-2]} is read instead")
    raise UserError(
        f"{folder}: the run saves and removes checkpoints faster than they can be read: wait for "
        "its end, or copy one of them"
    )


def check_step(folder, step: int | None) -> None:
    """Raises `UserError` if `folder` has no checkpoint of `step`; None: none at all."""
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        _chosen(checkpoints, step)


def _chosen(checkpoints: Checkpoints, step: int | None) -> list[int]:
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{checkpoints.folder} holds no finished checkpoint yet")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"step={step}: {checkpoints.folder} has no such checkpoint, only {there}")
    return steps if step is None else [step]
