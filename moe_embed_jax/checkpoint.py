"""Orbax checkpoints: async, atomic, always restored into an explicit abstract tree.

A checkpoint is a folder per step with the items `params`, `optimizer` (both sharded trees) and
`data` (JSON: the data spec, by which a resumed run proves that it would read the same batches).
Because restore is given shapes and shardings, any mesh can read a checkpoint of any other.
"""

import pathlib

import jax
import orbax.checkpoint as ocp

from moe_embed_jax.errors import UserError
from moe_embed_jax.sharding import path_of


class Checkpoints:
    """Checkpoints under `folder`; `keep` newest ones are kept."""

    def __init__(self, folder, keep: int = 2):
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
            },
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, params, optimizer, data: dict) -> None:
        """Starts writing in the background; a step that exists already is left alone."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                data=ocp.args.JsonSave(data),
            ),
        )

    def data(self, step: int) -> dict:
        args = ocp.args.Composite(data=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["data"]

    def restore(self, step: int, abstract_params, abstract_optimizer=None):
        """(params, optimizer) in the shapes and shardings of the abstract trees.

        Without `abstract_optimizer` only the parameters are read (optimizer is None).
        """
        items = {"params": ocp.args.StandardRestore(abstract_params)}
        if abstract_optimizer is not None:
            items["optimizer"] = ocp.args.StandardRestore(abstract_optimizer)
        self._check_shapes(step, "params", abstract_params)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return restored["params"], restored.get("optimizer")

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
