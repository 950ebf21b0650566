"""The work directory of a run: whose it is, its model card, its data."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

from moe_embed_jax import config as config_page
from moe_embed_jax.config import differences, save_json
from moe_embed_jax.data.data_spec import (
    describe_spec_difference,
    planned_store_path,
    token_store_path,
    vocabulary_path,
)
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.data.tokenizer_json import TokenizerJson, open_vocabulary
from moe_embed_jax.data.vocabulary import Vocabulary
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.source import MODEL_CARD
from moe_embed_jax.training.run_config import PAGES, MaskedRunConfig, Run, RunConfig

RESULTS_FILE = "results.json"  # appears when the run is finished
# A run may move to another mesh, folder, chunk size, rhythm of reports, way to compute the same
# experts, or idea of when to stop; everything else changes its numbers.
FREE_KEYS = (
    "mesh",
    "log_every",
    "eval_every",
    "eval_languages",
    "checkpoint_every",
    "keep_checkpoints",
    "health",
)
FREE_DATA_KEYS = ("dir", "wheels_dir", "chunk_rows", "pairs", "texts")
FREE_LOSS_KEYS = ("predictions_at_once",)
FREE_MODEL_KEYS = ("expert_backend", "expert_exchange", "capacity_factor", "remat_rows")


def identity(card: dict) -> dict:
    """What of a run's page (as a dict) decides its numbers."""
    kept = {key: value for key, value in card.items() if key not in FREE_KEYS}
    data = {k: v for k, v in card["data"].items() if k not in FREE_DATA_KEYS}
    kept["model"] = {k: v for k, v in card["model"].items() if k not in FREE_MODEL_KEYS}
    kept["loss"] = {k: v for k, v in card["loss"].items() if k not in FREE_LOSS_KEYS}
    # Where vocabulary and pairs lie is free; their content is part of the data spec.
    kept["data"] = data | {"vocabulary": data["vocabulary"] | {"path": ""}}
    return kept


def claim(workdir: pathlib.Path, config: Run, write: bool) -> None:
    """Makes `workdir` this run's, or refuses if another config trained there.

    Raises `UserError` naming every key that differs.
    """
    path = workdir / MODEL_CARD
    card = dataclasses.asdict(config)
    if path.exists():
        saved = json.loads(path.read_text())
        objective = saved.get("objective", RunConfig.objective)
        if objective != config.objective:
            raise UserError(
                f"work directory {workdir} belongs to another run (objective: {objective} -> "
                f"{config.objective}); use a new --workdir"
            )
        saved = config_page.build(PAGES[objective], saved)  # new keys: defaults
        lines = differences(identity(dataclasses.asdict(saved)), identity(card))
        if lines:
            raise UserError(
                f"work directory {workdir} belongs to another config ({'; '.join(lines)}); "
                "use a new --workdir, or the old values to resume"
            )
    if write:
        save_json(path, card)


def open_data(
    workdir: pathlib.Path, config: Run, write: bool
) -> tuple[TokenStore, Vocabulary | TokenizerJson]:
    """The prepared token store (prepared now if need be) and the vocabulary, copied to `workdir`.

    Preparation runs in a process of its own: it needs TensorFlow, which training must not load.
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
        shutil.copyfile(source, workdir / source.name)
    if vocabulary.size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the vocabulary "
            f"({vocabulary.size} ids in {source}); raise it, best to a multiple of 64"
        )
    return store, vocabulary


def prepare(config: Run) -> None:
    """Runs the preparation of `config.data` in a subprocess; its output goes to the terminal.

    SIGTERM ends it and this process, with status 0: the same command starts it again.
    """
    command = [
        sys.executable,
        "-m",
        "moe_embed_jax.data.prepare",
        f"--config_json={json.dumps(config.data.preparation())}",
        f"--data_dir={config.data.dir}",
    ]
    if config.data.wheels_dir:
        command.append(f"--wheels_dir={config.data.wheels_dir}")
    with _ended_by_sigterm():
        status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise UserError("preparation of the data failed; its message stands above")


@contextlib.contextmanager
def _ended_by_sigterm():
    """SIGTERM raises SystemExit(0) meanwhile, and `subprocess.run` then kills its process.

    Preparation may take hours, a preempted machine has seconds, and a run without data has nothing
    to save.
    """

    def end(signum, frame):
        del signum, frame
        # Not print: a signal may arrive in the middle of one, which cannot be entered twice.
        os.write(2, b"SIGTERM: nothing to save yet; the same command prepares the data\n")
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def data_spec(store: TokenStore, config: RunConfig) -> dict:
    """What decides the batches: checkpoints hold it, a resumed run must match it."""
    return {
        "store": store.spec,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "language_exponent": config.data.language_exponent,
        "rates": config.data.rates,
        **({"negatives": config.data.negatives} if config.data.negatives else {}),
    }


def documents_spec(store: TokenStore, config: MaskedRunConfig) -> dict:
    """`data_spec` of masked language modelling."""
    keys = ("language_exponent", "one_language", "row_length", "across_documents")
    return {
        "store": store.spec,
        "batch_size": config.batch_size,
        "seed": config.seed,
        **{key: getattr(config.data, key) for key in keys},
    }


def check_data_spec(saved: dict, current: dict) -> None:
    """Refuses to resume on other data, naming the difference."""
    if saved == current:
        return
    outer = differences(
        {k: v for k, v in saved.items() if k != "store"},
        {k: v for k, v in current.items() if k != "store"},
    )
    if saved["store"] != current["store"]:
        outer.append(describe_spec_difference(saved["store"], current["store"]))
    raise UserError(
        f"the data changed since the checkpoint was written: {'; '.join(outer)}; resume with the "
        "same data, or start in a new --workdir"
    )
