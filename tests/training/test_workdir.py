"""Whose a work directory is, what a resumed run may change, a damaged config.json, and runs without
a loss."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
from helpers import synthetic_data

from moe_embed_jax import config as config_files
from moe_embed_jax.data.schedule import Group
from moe_embed_jax.errors import Interrupted, UserError
from moe_embed_jax.stages.pair_data import groups_without_negatives
from moe_embed_jax.training import workdir
from moe_embed_jax.training.run_config import MaskedRunConfig, RunConfig
from moe_embed_jax.training.workdir import (
    check_data_spec,
    check_or_create,
    data_spec,
    read_run_config,
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """page(**overrides): the config of the tests' runs, with keys as on the command line."""
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(synthetic_data.config_text("data"))

    def load(overrides: dict) -> RunConfig:
        texts = {key: str(value) for key, value in overrides.items()}
        return config_files.load(RunConfig, str(path), texts)

    return load


CAPACITY = {"model.expert_backend": "capacity"}
ALL_TO_ALL = {"model.expert_exchange": "all_to_all", "mesh.expert": 2}


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        # Dropless ways to compute the same experts, on other meshes, in other pieces.
        ({}, {"model.expert_backend": "grouped"}, None),
        ({"model.expert_backend": "grouped"}, {"model.expert_backend": "blocked"}, None),
        ({}, {"mesh.expert": 2, "data.chunk_rows": 4, "model.remat_rows": 2}, None),
        ({}, {"model.capacity_factor": 2.0}, None),
        ({}, {"model.expert_exchange": "all_to_all"}, None),  # one shard: nothing is exchanged
        # With cells of fixed size other tokens are dropped.
        ({}, CAPACITY, "model.expert_backend: auto -> capacity"),
        (CAPACITY, {}, "model.expert_backend: capacity -> auto"),
        (CAPACITY, CAPACITY | {"model.capacity_factor": 2.0}, "model.capacity_factor: 1.25 -> 2.0"),
        (CAPACITY, CAPACITY | {"data.chunk_rows": 4}, "data.chunk_rows: 0 -> 4"),
        (CAPACITY, CAPACITY | {"model.remat_rows": 4}, "model.remat_rows: 0 -> 4"),
        (CAPACITY, CAPACITY | {"mesh.fsdp": 2}, "mesh.fsdp: 1 -> 2"),
        (CAPACITY, CAPACITY | {"log_every": 9}, None),
        ({"mesh.expert": 2}, ALL_TO_ALL, "model.expert_exchange: ring -> all_to_all"),
        (ALL_TO_ALL, ALL_TO_ALL | {"mesh.expert": 4}, "mesh.expert: 2 -> 4"),
        (
            CAPACITY | {"model.moe_every": 0},
            {"model.moe_every": 0},  # there are no experts
            None,
        ),
        ({}, {"model.dtype": "bfloat16"}, "model.dtype: float32 -> bfloat16"),
        ({"model.dtype": "bfloat16"}, {}, "model.dtype: bfloat16 -> float32"),
        ({}, {"health.window": 9, "data.dir": "elsewhere", "keep_checkpoints": 9}, None),
        ({}, {"loss.margin": 0.1}, "loss.margin: None -> 0.1"),
    ],
)
def test_a_resumed_run_may_change_what_is_rounding(tmp_path, page, before, after, refused):
    check_or_create(tmp_path, page(before), write=True)
    check_or_create(tmp_path, page(before), write=False)
    if refused is None:
        check_or_create(tmp_path, page(after), write=False)
        return
    with pytest.raises(UserError) as error:
        check_or_create(tmp_path, page(after), write=False)
    assert f"belongs to another config ({refused})" in str(error.value)


def leaves(section, prefix=""):
    """The key of every leaf of a nested dict; an empty dict is one."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


RHYTHM = {"log_every", "eval_every", "eval_languages", "checkpoint_every", "keep_checkpoints"}
HEALTH = {"health.stop_on_collapse", "health.least_spread", "health.window"}
PLACES = {"data.dir", "data.cache_dir", "data.wheels_dir", "data.vocabulary.path"}
EXPERTS = {"model.expert_backend", "model.expert_exchange", "model.capacity_factor"}
MESH = {"mesh.slice", "mesh.data", "mesh.fsdp", "mesh.expert"}
MEMORY = MESH | {"model.remat_rows", "data.chunk_rows"}


@pytest.mark.parametrize(
    ("cls", "own", "own_if_dropless"),
    [
        (RunConfig, {"data.pairs", "data.teacher"}, {"data.row_buckets"}),
        (MaskedRunConfig, {"data.texts", "loss.predictions_at_once"}, set()),
    ],
)
def test_free_fields(cls, own, own_if_dropless):
    """Every other field, and every new one, is refused."""
    config = config_files.build(cls, {"init": {"source": "model"}})
    free, dropless = (
        set(leaves(config_files.select(config, kind)))
        for kind in (config_files.FREE, config_files.FREE_IF_DROPLESS)
    )
    assert free == RHYTHM | HEALTH | PLACES | own
    assert dropless == EXPERTS | MEMORY | own_if_dropless
    fixed = set(leaves(workdir.identity(config))) - {"data.vocabulary.path"}
    assert fixed | free | dropless == set(leaves(dataclasses.asdict(config)))
    assert {"seed", "model.dtype", "loss.balance", "optimizer.b2", "init.source"} <= fixed


class Store:
    spec = {"groups": []}  # noqa: RUF012


@pytest.mark.parametrize("override", [{}, CAPACITY, {"loss.balance_over": "device"}])
def test_the_number_of_devices_is_free_where_it_changes_no_number(monkeypatch, page, override):
    before = data_spec(Store(), page(override)) | {"records": {"of": "the checkpoint"}}
    check_data_spec(before, data_spec(Store(), page(override)))
    monkeypatch.setattr("jax.device_count", lambda: 8)
    after = data_spec(Store(), page(override))
    if not override:
        check_data_spec(before, after)
        return
    with pytest.raises(UserError, match=r"the devices or data changed .*: devices: 1 -> 8; resume"):
        check_data_spec(before, after)


def damaged(text: str):
    """(what is wrong, the damaged file) for each kind of damage to a config.json."""
    card = json.loads(text)
    yield "was changed (its CRC-32 differs)", json.dumps(card | {"steps": card["steps"] + 1})
    del card["crc32"]  # as of a file that a user changed on purpose
    yield "is not JSON", ""
    yield "is not JSON", text[: len(text) // 2]
    yield "is not JSON", "\0" * len(text)
    yield "must be a JSON object", "[]"
    yield "is none of contrastive, masked_lm", json.dumps(card | {"objective": ["masked_lm"]})
    yield "model=7 must be a section", json.dumps(card | {"model": 7})
    yield "loss=None must be a section", json.dumps(card | {"loss": None})
    yield "steps='9' is a str", json.dumps(card | {"steps": "9"})
    yield "data.rates=5 must be a section", json.dumps(card | {"data": card["data"] | {"rates": 5}})
    yield "unknown config key stepz", json.dumps(card | {"stepz": 9})
    yield "steps=-9 must be at least 1", json.dumps(card | {"steps": -9})


def test_a_damaged_config_is_named(tmp_path, page):
    assert read_run_config(tmp_path) is None
    check_or_create(tmp_path, page({}), write=True)
    assert dataclasses.asdict(read_run_config(tmp_path)) == dataclasses.asdict(page({}))
    path = tmp_path / "config.json"
    for message, content in damaged(path.read_text()):
        path.write_text(content)
        with pytest.raises(UserError) as error:
            check_or_create(tmp_path, page({}), write=False)
        line = str(error.value)
        assert line.startswith(f"{path} is damaged (") and message in line, line
        assert "\n" not in line and "put the right file back" in line
        assert line.count(str(path)) == 1


@pytest.mark.parametrize(
    ("name", "error", "line"),
    [
        ("INT", Interrupted, ""),
        ("TERM", SystemExit, "SIGTERM: nothing to save yet; the same command prepares the data\n"),
    ],
)
def test_a_signal_ends_the_preparation_and_its_process(
    tmp_path, page, monkeypatch, capfd, name, error, line
):
    script = f"echo $$ > {tmp_path}/pid; kill -{name} $PPID; exec sleep 99"
    monkeypatch.setattr(workdir, "ends_with_parent", lambda command: ["/bin/sh", "-c", script])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(error) as raised:
        workdir.prepare(page({}))
    if error is SystemExit:
        assert raised.value.code == 0
    assert capfd.readouterr().err == line
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_batch_of_one_pair_is_refused(page):
    with pytest.raises(UserError, match=r"batch_size=1 and data.negatives=0: .*loss is always 0"):
        page({"batch_size": 1})
    page({"batch_size": 1, "data.negatives": 2, "data.pairs": "pairs"})


def test_sources_with_hard_negatives_only_need_some(page):
    with pytest.raises(UserError, match=r"hard_negatives_only='faq' and data\.negatives=0: these"):
        page({"loss.hard_negatives_only": "faq"})
    keys = {"loss.hard_negatives_only": "faq", "data.negatives": 2, "data.pairs": "pairs"}
    assert page(keys).loss.is_full and not page({}).loss.is_full


class Pairs:
    """The index of a token store: groups of 3 pairs of texts, which letters stand for."""

    def __init__(self, *groups: str, hard_negatives: int = 0):
        texts = np.array([ord(letter) for group in groups for letter in group], np.int32)
        self.content_ids = np.stack([np.ones_like(texts), texts], axis=-1).reshape(-1, 2, 2)
        self.negative_starts = np.arange(len(self.content_ids) + 1) * hard_negatives
        self.groups = [Group("task", f"{i}", 3 * i, 3 * i + 3, 1.0) for i, _ in enumerate(groups)]

    def constant(self, batch_size: int, hard_negatives: int = 0, alone=()) -> str:
        found = groups_without_negatives(self, self.groups, batch_size, hard_negatives, alone)
        return "".join(group.language for group in found)


def test_groups_whose_loss_is_always_zero_are_found():
    groups = ("aAbBcC", "aAbAcA", "aAaBaC", "aAbBaA", "AAABBA")
    assert Pairs(*groups).constant(batch_size=16) == "12"
    assert Pairs(*groups).constant(batch_size=1) == "01234"
    assert Pairs(*groups, hard_negatives=1).constant(batch_size=1) == "01234"  # not used
    assert Pairs(*groups, hard_negatives=1).constant(batch_size=1, hard_negatives=2) == ""
    assert Pairs(*groups).constant(batch_size=16, hard_negatives=2, alone=["task"]) == "01234"
    assert Pairs(*groups).constant(batch_size=16, hard_negatives=2, alone=["x"]) == "12"
