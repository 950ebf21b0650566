"""The work directory of a run: the run config that it keeps, and the run's data."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

from moe_embed_jax import config as config_files
from moe_embed_jax import storage
from moe_embed_jax.card import read_card, save_card
from moe_embed_jax.children import ends_with_parent
from moe_embed_jax.config import FREE_IF_DROPLESS, RUN_CONFIG, differences, select
from moe_embed_jax.data.data_spec import (
    describe_spec_difference,
    planned_store_path,
    token_store_path,
    vocabulary_path,
)
from moe_embed_jax.data.store_copy import copied_store
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.errors import Interrupted, UserError
from moe_embed_jax.tokenizers.tokenizer import Tokenizer
from moe_embed_jax.tokenizers.tokenizer_json import open_vocabulary
from moe_embed_jax.training.records import CHECKSUMS
from moe_embed_jax.training.run_config import RUN_CONFIGS, Run, RunConfig

_STOPPING = (signal.SIGTERM, signal.SIGINT)


def drops_tokens(config: Run) -> bool:
    """Whether the experts of a run may leave tokens out: `capacity` and `all_to_all` have cells of
    a fixed size for the tokens that a device computes at a time."""
    model = config.model
    over_devices = config.mesh.expert > 1 and model.expert_exchange == "all_to_all"
    return bool(model.moe_every) and (model.expert_backend == "capacity" or over_devices)


def depends_on_devices(config: Run) -> bool:
    """Whether the numbers of a run depend, by more than rounding, on how many devices it has."""
    return drops_tokens(config) or getattr(config.loss, "balance_over", "batch") == "device"


def identity(config: Run) -> dict:
    """The fields, nested, that decide the numbers of a run, whether or not it drops tokens."""
    fixed = select(config, "")
    fixed["data"]["vocabulary"]["path"] = ""  # as the records of recipes have it
    return fixed


def changes(saved: Run, config: Run) -> list[str]:
    """`key: old -> new` for every field that a resumed run may not change; see `config.setting`."""
    lines = differences(identity(saved), identity(config))
    if drops_tokens(saved) or drops_tokens(config):
        lines += differences(select(saved, FREE_IF_DROPLESS), select(config, FREE_IF_DROPLESS))
    return lines


def check_or_create(workdir: pathlib.Path, config: Run, write: bool) -> None:
    """Keeps the run config in `workdir`, or checks it against the one that is there.

    Raises `UserError` that names every key that differs, with both values.
    """
    saved = read_run_config(workdir)
    if saved is not None and saved.objective != config.objective:
        raise UserError(
            f"work directory {workdir} belongs to another run (objective: {saved.objective} -> "
            f"{config.objective}); use a new --workdir"
        )
    if saved is not None and (lines := changes(saved, config)):
        raise UserError(
            f"work directory {workdir} belongs to another config ({'; '.join(lines)}); "
            "use a new --workdir, or the old values to resume"
        )
    if write:
        save_card(workdir / RUN_CONFIG, dataclasses.asdict(config))


def read_run_config(workdir: pathlib.Path) -> Run | None:
    """The run config that a work directory keeps; None: it keeps none yet. Keys that are newer than
    the file have their defaults. Raises `UserError` for a damaged file."""
    path = workdir / RUN_CONFIG
    if not path.exists():
        return None
    try:
        values = read_card(path)
        objective = values.get("objective", RunConfig.objective)
        if objective not in list(RUN_CONFIGS):
            raise UserError(f"objective={objective!r} is none of {', '.join(RUN_CONFIGS)}")
        return config_files.build(RUN_CONFIGS[objective], values)
    except UserError as error:
        reason = str(error).removeprefix(f"{path} ")
        raise UserError(
            f"{path} is damaged ({reason}): put the right file back; or remove it, and the command "
            "that made the run writes it again"
        ) from error


def find_data(config: Run, write: bool) -> tuple[pathlib.Path, pathlib.Path]:
    """(token store, vocabulary): where they lie, prepared now if need be.

    Preparation runs in its own process: it needs TensorFlow, which training must not load.
    """
    preparation = config.data.preparation()
    path = planned_store_path(preparation, config.data.dir)
    source = vocabulary_path(preparation, config.data.dir)
    if token_store_path(preparation, config.data.dir) is None or not source.is_file():
        if not write:
            raise UserError(
                f"no prepared data in {config.data.dir}: process 0 prepares it and either failed "
                "(its message says why) or wrote to another disk; put data.dir on a file system "
                "that all hosts see, or prepare it on every host first"
            )
        prepare(config)
    return path, source


def open_data(workdir: pathlib.Path, config: Run, write: bool) -> tuple[TokenStore, Tokenizer]:
    """The token store and the vocabulary of `find_data`. The vocabulary is copied to `workdir`, the
    store to `data.cache_dir`, if there is one."""
    path, source = find_data(config, write)
    if config.data.cache_dir:
        path = copied_store(path, config.data.cache_dir)
    elif write and storage.is_remote(path):
        print(
            f"warning: every step waits for rows from {path}: copy them to a disk first, by "
            "--config.data.cache_dir=FOLDER",
            file=sys.stderr,
        )
    store = TokenStore.open(path)
    vocabulary = open_vocabulary(source)
    stored = store.spec["vocabulary"]["sha256"]
    if vocabulary.content_hash != stored:
        raise UserError(
            f"{source} was changed: its SHA-256 is {vocabulary.content_hash[:12]}, the tokens in "
            f"{path} were made with {stored[:12]}; bring the file back, or delete both folders and "
            "prepare again"
        )
    if write:
        storage.copy(source, workdir / source.name)
    if vocabulary.size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the vocabulary "
            f"({vocabulary.size} ids in {source}); raise it, best to a multiple of 64"
        )
    return store, vocabulary


def prepare(config: Run) -> None:
    """Runs the preparation of `config.data` in a subprocess; its output goes to the terminal.

    SIGTERM ends it and this process, with status 0; Ctrl-C does, with status 130; and the
    preparation ends when this process is killed. The same command starts it again.
    """
    command = [
        sys.executable,
        "-m",
        "moe_embed_jax.preparation.tokenize",
        f"--config_json={json.dumps(config.data.preparation())}",
        f"--data_dir={config.data.dir}",
    ]
    if config.data.wheels_dir:
        command.append(f"--wheels_dir={config.data.wheels_dir}")
    with _Stop() as stop:
        # In its own process group: Ctrl-C in a terminal reaches this process alone.
        process = subprocess.Popen(ends_with_parent(command), process_group=0)
        try:
            stop.raise_from_now_on()
            status = process.wait()
        finally:
            process.kill()
            process.wait()
    if status != 0:
        raise UserError("preparation of the data failed; its message stands above")


class _Stop:
    """SIGTERM raises SystemExit(0) meanwhile, Ctrl-C `Interrupted`.

    Preparation may take hours, a preempted machine has seconds, and a run without data has nothing
    to save. While a process is being started, nothing is raised: it would be left behind.
    """

    def __enter__(self) -> "_Stop":
        self._raises, self._signal = False, None
        self._before = {number: signal.getsignal(number) for number in _STOPPING}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._set)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def raise_from_now_on(self) -> None:
        self._raises = True
        if self._signal is not None:
            self._raise()

    def _set(self, signum, frame) -> None:
        del frame
        self._signal = signum
        if self._raises:
            self._raise()

    def _raise(self) -> None:
        if self._signal == signal.SIGINT:
            raise Interrupted("nothing to save yet; the same command prepares the data")
        # Not print: a signal may arrive in the middle of one, which cannot be entered twice.
        os.write(2, b"SIGTERM: nothing to save yet; the same command prepares the data\n")
        raise SystemExit(0)


def data_spec(store: TokenStore, config: Run) -> dict:
    """What decides the batches: checkpoints hold it, a resumed run must match it."""
    return {
        "store": store.spec,
        "batch_size": config.batch_size,
        "seed": config.seed,
        **config.data.order(),
        **_devices(config),
    }


def _devices(config: Run) -> dict:
    """How many there are, where the numbers depend on it."""
    import jax  # here: the recipe reads this module, and does not need it

    return {"devices": jax.device_count()} if depends_on_devices(config) else {}


def check_data_spec(saved: dict, current: dict) -> None:
    """Refuses to resume on other data, naming the difference. `saved` may have `CHECKSUMS`, too."""
    saved = {key: value for key, value in saved.items() if key != CHECKSUMS}
    if saved == current:
        return
    outer = differences(
        {k: v for k, v in saved.items() if k != "store"},
        {k: v for k, v in current.items() if k != "store"},
    )
    if saved["store"] != current["store"]:
        outer.append(describe_spec_difference(saved["store"], current["store"]))
    what = "data"
    if saved.get("devices") != current.get("devices"):
        what = "devices or data"  # experts that drop tokens, or loss.balance_over="device"
    raise UserError(
        f"the {what} changed since the checkpoint was written: {'; '.join(outer)}; resume with the "
        f"same {what}, or start in a new --workdir"
    )
