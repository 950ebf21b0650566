"""Orbax checkpoints: async, atomic, always restored into an explicit abstract tree.

A checkpoint is a folder per step with sharded trees (`params`; of a training run also `optimizer`;
`mlm_head` where there is one) and `data` (JSON: the data spec, by which a resumed run proves that
it would read the same batches).
Because restore is given shapes and shardings, any mesh can read a checkpoint of any other.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp

from moe_embed_jax.errors import UserError
from moe_embed_jax.sharding import path_of

TREES = ("params", "optimizer", "mlm_head")


class Checkpoints:
    """Checkpoints under `folder`; `keep` newest ones are kept."""

    def __init__(self, folder, keep: int = 2):
        self.folder = pathlib.Path(folder).absolute()
        self._set_aside: set[int] = set()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={
                **{name: ocp.StandardCheckpointHandler() for name in TREES},
                "data": ocp.JsonCheckpointHandler(),
            },
        )

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, in order."""
        return sorted(set(self._manager.all_steps()) - self._set_aside)

    def set_aside(self, step: int) -> pathlib.Path:
        """Takes the checkpoint of `step` out of use, without deleting it; returns where it is.

        Every process calls this; process 0 moves the folder.
        """
        self.wait()
        self._set_aside.add(step)
        target = self.folder.with_name(f"{self.folder.name}_set_aside") / str(step)
        if jax.process_index() == 0:
            shutil.rmtree(target, ignore_errors=True)  # of an earlier attempt at the same run
            target.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(target)
        return target

    def save(self, step: int, data: dict, **trees) -> None:
        """Starts writing `trees` (names in `TREES`) in the background.

        A step that exists already is left alone.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                data=ocp.args.JsonSave(data),
                **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
            ),
        )

    def data(self, step: int) -> dict:
        args = ocp.args.Composite(data=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["data"]

    def items(self, step: int) -> set[str]:
        """Names of the trees that the checkpoint holds."""
        metadata = self._manager.item_metadata(step)
        return {name for name in TREES if name in metadata and metadata[name] is not None}

    def restore(self, step: int, **abstract) -> dict:
        """{name: tree} in the shapes and shardings of the abstract trees (names in `TREES`)."""
        for name, tree in abstract.items():
            self._check_shapes(step, name, tree)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: restored[name] for name in abstract}

    def restore_each(self, step: int, name: str, abstract) -> Iterator[tuple[str, jax.Array]]:
        """(path, array) of the leaves of the tree `name`, in their order and each when it is asked
        for, so that a caller who makes them smaller never holds the whole tree."""
        self._check_shapes(step, name, abstract)
        with contextlib.closing(ocp.PyTreeCheckpointer()) as reader:
            for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
                branch = leaf  # the tree with this leaf alone
                for key in reversed(path):
                    branch = {key.key: branch}
                how = ocp.checkpoint_utils.construct_restore_args(branch)
                args = ocp.args.PyTreeRestore(branch, restore_args=how, partial_restore=True)
                # No name for it here: that would keep it while the next one is read.
                item = self.folder / str(step) / name
                yield path_of(path), jax.tree.leaves(reader.restore(item, args=args))[0]

    def _check_shapes(self, step: int, item: str, abstract) -> None:
        """Name what differs before Orbax fails on it with a long trace."""
        saved = _shapes(self._manager.item_metadata(step)[item].tree)
        wanted = _shapes(abstract)
        for path in sorted(saved.keys() | wanted.keys()):
            if saved.get(path) != wanted.get(path):
                raise UserError(
                    f"checkpoint {self.folder}/{step}: {item}/{path} is {saved.get(path)} there "
                    f"and {wanted.get(path)} in this configuration"
                )

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_of(path): tuple(leaf.shape) for path, leaf in flat}
