"""Loads a model again and again while a run writes and removes checkpoints: load_beside.py WORKDIR.

Prints how many loads there were; ends when the run has ended.
"""

import pathlib
import sys

import numpy as np

from moe_embed_jax import Embedder, launching
from moe_embed_jax.errors import UserError


def main(workdir: pathlib.Path) -> None:
    loads, refused = 0, 0
    while not (workdir / "results.json").exists():
        try:
            loaded = Embedder.load(workdir)
        except UserError as error:
            if loads:  # there was a checkpoint before, and is one now
                raise
            assert len(str(error).splitlines()) == 1
            refused += 1
            continue
        assert all(np.isfinite(leaf).all() for leaf in _leaves(loaded.params))
        loads += 1
    print(f"{loads} loads, {refused} refused before the first checkpoint")


def _leaves(params):
    import jax

    return jax.tree.leaves(params)


if __name__ == "__main__":
    sys.exit(launching.run(lambda: main(pathlib.Path(sys.argv[1]))))
