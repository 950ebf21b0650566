"""Orbax checkpoints: async, atomic, always restored into an explicit abstract tree.

A checkpoint is a folder per step with sharded trees (`params`; of a training run also `optimizer`;
`mlm_head` where there is one), `data` (JSON: the data spec, by which a resumed run proves that
it would read the same batches) and `checksums` (CRC-32 of all these files: TensorStore's arrays
have none, so that a flipped bit would be another weight).
Because restore is given shapes and shardings, any mesh can read a checkpoint of any other.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from moe_embed_jax import checksums, orbax_leftovers, storage
from moe_embed_jax.errors import LostConnection, UserError, first_line
from moe_embed_jax.processes import from_process_0, wait_for_all
from moe_embed_jax.refusals import is_lost_connection
from moe_embed_jax.sharding import path_of

TREES = ("params", "optimizer", "mlm_head")
DATA, CHECKSUMS = "data", "checksums"
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's; it names the items of the checkpoint
# Of a step, also with the name that Orbax gives it on a disk until it is written.
_LEFTOVER = re.compile(r"\d+(\.orbax-checkpoint-tmp.*)?")
_LONGEST_REASON = 600  # bytes of a message that every process gets
MOST_ATTEMPTS = 20  # of a reader beside a run that removes its old checkpoints

T = TypeVar("T")

# Where several devices hold an array, each of them writes a slice of it. Every slice is another
# program (a hundred at the first save on eight devices), which small arrays are not worth. Orbax
# has an option for it, and no public way to set it that keeps its other settings.
_LEAST_SLICE = 1 << 20  # bytes
ocp.type_handlers.get_type_handler(jax.Array)._min_slice_bytes_for_replica_parallel = _LEAST_SLICE


class DamagedCheckpoint(UserError):
    """The files of a checkpoint are not those that were saved; the message names one and why."""


class _ChecksumHandler(ocp.CheckpointHandler):
    """Writes the checksums of all other items, when they are complete and before the checkpoint
    appears under its name. Orbax calls `finalize` on process 0, after all processes have written.
    """

    def save(self, directory, args) -> None:
        """Nothing: there are no files yet."""

    def restore(self, directory, args=None) -> None:
        """Nothing: `Checkpoints.check` reads the file."""

    def finalize(self, directory) -> None:
        folder = storage.path(directory)
        text = checksums.dump(checksums.checksums(folder.parent, (DATA, *TREES)))
        (folder / checksums.FILE_NAME).write_text(text)


@ocp.args.register_with_handler(_ChecksumHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _ChecksumSave(ocp.args.CheckpointArgs):
    pass


class Checkpoints:
    """Checkpoints under `folder`; `keep` newest ones are kept."""

    def __init__(self, folder, keep: int = 2):
        self.folder = storage.path(folder).absolute()
        self._moved = 0
        orbax_leftovers.hide()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True
        )
        handlers = {
            **{name: ocp.StandardCheckpointHandler() for name in TREES},
            DATA: ocp.JsonCheckpointHandler(),
            CHECKSUMS: _ChecksumHandler(),  # the last: it reads what the others have written
        }
        self._manager = self._open(options, handlers)

    def _open(self, options, handlers) -> ocp.CheckpointManager:
        """Orbax's manager, which reads the description of every step; also while a run removes
        steps between their listing and their reading."""
        for _ in range(MOST_ATTEMPTS):
            listed = set(self.folder.glob("*"))
            try:
                return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
            except (FileNotFoundError, NotADirectoryError) as error:
                reason = error
            # Other damage to the files of a step is seen by `check`.
            except (RecursionError, ValueError, TypeError, AttributeError, LookupError) as error:
                reason = error
                if listed == set(self.folder.glob("*")):
                    raise UserError(
                        f"{_misdescribed(self.folder)} is damaged ({_first_line(error)}): move "
                        "the folder of its step away; the one before is then used"
                    ) from None
        raise reason

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, in order."""
        return sorted(self._manager.all_steps())

    def set_aside(self, step: int) -> pathlib.Path:
        """Takes the checkpoint of `step` out of use, without deleting it; returns where it is.

        Every process calls this; process 0 moves the folder.
        """
        self.wait()
        folder = self.folder.with_name(f"{self.folder.name}_set_aside")
        number = 1
        while (target := folder / (f"{step}" if number == 1 else f"{step}-{number}")).exists():
            number += 1  # an earlier attempt at the same run was set aside, too
        wait_for_all(f"{self.folder} set aside {self._moved}")
        if jax.process_index() == 0:
            target.parent.mkdir(exist_ok=True)
            storage.move(self.folder / str(step), target)
        wait_for_all(f"{self.folder} was set aside {self._moved}")
        self._moved += 1
        self._manager.reload()  # so that this step can be saved again
        return target

    def _remove_leftovers(self) -> None:
        """Removes what killed runs left of checkpoints that they were writing or removing: Orbax
        does not see these folders, so it would keep them for good. Every process calls this."""
        wait_for_all(f"{self.folder} was opened")  # by all: who opens it reads every folder
        if jax.process_index() == 0:
            whole = set(map(str, self.steps()))
            for entry in sorted(self.folder.glob("[0-9]*")):
                if entry.name not in whole and _LEFTOVER.fullmatch(entry.name):
                    storage.remove(entry)
        wait_for_all(f"{self.folder} has no leftovers")

    def check(self, step: int, trees: Iterable[str] = TREES) -> None:
        """Reads every file of these trees and of the data spec, at 3 GB/s of one core.

        All processes call this together; process 0 reads. A checkpoint that has no checksums passes
        with a line that says so.

        Raises:
          DamagedCheckpoint: a file is missing, cut short or changed.
        """
        reason = None
        if jax.process_index() == 0:
            reason, has_checksums = self._damage(step, trees)
            if reason is None and not has_checksums:
                warn(
                    f"checkpoint {self.folder / str(step)} was saved without checksums: damage to "
                    "its arrays would not be seen"
                )
        reason = _text_from_process_0(reason or "")
        if reason:
            raise self._damaged(step, reason)

    def restore_newest(
        self, check_data: Callable[[dict], None], read: Callable[[int], T]
    ) -> tuple[int, dict, T] | None:
        """(step, data spec, what `read` returns for it) of the newest checkpoint that is whole;
        None: there is none.

        Damaged ones that are newer are set aside, with a line for each. Only the owner of the
        folder may call this; others use `newest_checkpoint.read_newest`.

        Args:
          check_data: is called with the checkpoint's data spec before the arrays are read.
          read: restores the trees of a step.

        Raises:
          UserError: there are checkpoints, but none is whole; whatever `check_data` raises.
        """
        self._remove_leftovers()
        target = None
        while (step := self.latest_step()) is not None:
            try:
                self.check(step)
                data = self.data(step)
                check_data(data)
                return step, data, read(step)
            except DamagedCheckpoint as error:
                target = self.set_aside(step)
                if jax.process_index() == 0:
                    warn(f"{error}; moved to {target}")
        if target is not None:
            raise UserError(
                f"{self.folder} holds no whole checkpoint: the damaged ones are in "
                f"{target.parent}; the same command starts again at step 0"
            )
        return None

    def _damage(self, step: int, trees: Iterable[str]) -> tuple[str | None, bool]:
        """(what is wrong with the files, None: nothing; whether there are checksums)."""
        root = self.folder / str(step)
        path = root / _METADATA
        has_checksums = False
        try:
            items = set(json.loads(path.read_text())["item_handlers"])
            has_checksums = CHECKSUMS in items or (root / CHECKSUMS).exists()
            if not has_checksums:
                return None, False
            summed = root / CHECKSUMS / checksums.FILE_NAME
            path, described = summed, path
            expected = checksums.parse(summed.read_text())
            if items != {CHECKSUMS, *(name.partition("/")[0] for name in expected)}:
                return f"{described} was changed (it names other items)", True
        except FileNotFoundError:
            return f"{path} is missing", has_checksums
        except (PermissionError, LostConnection):
            raise
        except OSError as error:
            return f"{path} cannot be read ({error.strerror or error})", has_checksums
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            return f"{path} was changed ({_first_line(error)})", has_checksums
        folders = (DATA, *trees)
        chosen = {name: v for name, v in expected.items() if name.partition("/")[0] in folders}
        return checksums.find_damage(root, chosen), True

    def _damaged(self, step: int, reason: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"checkpoint {self.folder / str(step)} is damaged: {reason}")

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns errors of Orbax and TensorStore into `DamagedCheckpoint`, where files are damaged.

        Others are passed on: a checkpoint is whole though there is too little memory for it.
        """
        try:
            yield
        except Exception as error:
            # Orbax raises a plain `Exception` for an array that TensorStore cannot read.
            expected = (OSError, ValueError, LookupError, TypeError, AttributeError)
            if type(error) is not Exception and not isinstance(error, expected):
                raise
            reason, has_checksums = self._damage(step, TREES)
            if reason is None and has_checksums:
                raise
            raise self._damaged(step, reason or _first_line(error)) from error

    def save(self, step: int, data: dict, **trees) -> None:
        """Starts writing `trees` (names in `TREES`) in the background.

        A step that exists already is left alone.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{DATA: ocp.args.JsonSave(data), CHECKSUMS: _ChecksumSave()},
                **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
            ),
        )

    def data(self, step: int) -> dict:
        """The data spec. This and what follows raise `DamagedCheckpoint` where Orbax fails on
        damaged files; only `check` looks for damage that Orbax does not see."""
        with self._reading(step):
            args = ocp.args.Composite(**{DATA: ocp.args.JsonRestore()})
            return self._manager.restore(step, args=args)[DATA]

    def items(self, step: int) -> set[str]:
        """Names of the trees that the checkpoint holds."""
        with self._reading(step):
            metadata = self._manager.item_metadata(step)
            return {name for name in TREES if name in metadata and metadata[name] is not None}

    def shapes(self, step: int, item: str) -> dict[str, tuple[int, ...]]:
        """{path: shape} of the leaves of a tree that the checkpoint holds."""
        with self._reading(step):
            return _shapes(self._manager.item_metadata(step)[item].tree)

    def restore(self, step: int, **abstract) -> dict:
        """{name: tree} in the shapes and shardings of the abstract trees (names in `TREES`)."""
        with self._reading(step):
            for name, tree in abstract.items():
                self._check_shapes(step, name, tree)
            args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
            return {name: restored[name] for name in abstract}

    def restore_each(self, step: int, name: str, abstract) -> Iterator[tuple[str, jax.Array]]:
        """(path, array) of the leaves of the tree `name`, in their order and each when it is asked
        for, so that a caller who makes them smaller never holds the whole tree."""
        with self._reading(step), contextlib.closing(ocp.PyTreeCheckpointer()) as reader:
            self._check_shapes(step, name, abstract)
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
        saved = self.shapes(step, item)
        wanted = _shapes(abstract)
        for path in sorted(saved.keys() | wanted.keys()):
            if saved.get(path) != wanted.get(path):
                raise UserError(
                    f"checkpoint {self.folder}/{step}: {item}/{path} is {saved.get(path)} there "
                    f"and {wanted.get(path)} in this configuration"
                )

    def raise_errors(self) -> None:
        """Raises what went wrong in the background, if it did, without waiting."""
        self._manager.check_for_errors()

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def leave(self, kind, error, trace) -> None:
        """Closes at the end of a run, as `contextlib.ExitStack.push` calls it."""
        del kind, trace
        if error is None or not is_lost_connection(error):
            self.close()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_of(path): tuple(leaf.shape) for path, leaf in flat}


def _misdescribed(folder: pathlib.Path) -> str:
    """The description with a value that Orbax does not take."""
    for path in sorted(folder.glob(f"*/{_METADATA}")):
        try:
            for key, value in json.loads(path.read_text()).items():
                if not isinstance(value, int if key.endswith("_nsecs") else dict):
                    return str(path)
        except (OSError, ValueError, AttributeError, RecursionError):
            return str(path)
    return f"{folder}/*/{_METADATA}"


def _text_from_process_0(text: str) -> str:
    """Process 0's `text`, shortened, in every process."""
    buffer = np.zeros(_LONGEST_REASON, np.uint8)
    data = np.frombuffer(text.encode()[:_LONGEST_REASON], np.uint8)
    buffer[: len(data)] = data
    return bytes(from_process_0(buffer)).rstrip(b"\0").decode(errors="ignore")


def _first_line(error: BaseException) -> str:
    return first_line(error)[:_LONGEST_REASON]


def warn(message: str) -> None:
    """One line about a checkpoint that is not as it should be."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
