"""A config states nothing of the model that its source decides, or the same."""

import pathlib

import pytest
from helpers import synthetic_data

from moe_embed_jax import config as config_files
from moe_embed_jax.data.data_config import VocabularyConfig
from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.errors import UserError
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.training import init
from moe_embed_jax.training.run_config import RunConfig

SOURCE = EncoderConfig(num_layers=2, width=96, moe_every=0)


@pytest.fixture(scope="module")
def vocabulary(data_dir) -> str:
    """A file of 512 ids."""
    return str(vocabulary_path(synthetic_data.PREPARATION, data_dir))


def resolved(vocabulary: str, page: dict, overrides: dict) -> RunConfig:
    page = {"init": {"source": "runs/a"}} | page
    config = config_files.fill(RunConfig, page, overrides)
    return init._replaced(config, SOURCE, VocabularyConfig("file", vocabulary))[0]


@pytest.mark.parametrize(
    ("page", "overrides", "message"),
    [
        ({}, {}, None),
        # How it is computed is up to the config.
        (
            {"model": {"dtype": "bfloat16", "remat_rows": 4}},
            {"model.expert_backend": "grouped"},
            None,
        ),
        (
            {"model": {"width": 96}},
            {"data.vocabulary.kind": "train", "data.vocabulary.size": "512"},
            None,
        ),
        ({"model": {"width": 48}}, {}, r"model.width=48 \(the source has 96\); leave them out"),
        # A default that is stated is a statement, too.
        ({}, {"model.width": "768"}, r"model.width=768 \(the source has 96\)"),
        (
            {"model": {"num_layers": 2}},
            {"model.moe_every": "2"},
            r"model.moe_every=2 \(the source has 0",
        ),
        (
            {"data": {"vocabulary": {"kind": "train", "size": 300}}},
            {},
            r"data.vocabulary.size=300 \(the source has 512\)",
        ),
        (
            {},
            {"data.vocabulary.path": "other.model"},
            r"data.vocabulary.path=other.model \(the source h",
        ),
    ],
)
def test_a_config_that_contradicts_its_source_is_refused(vocabulary, page, overrides, message):
    if message is None:
        config = resolved(vocabulary, page, overrides)
        assert (config.model.width, config.data.vocabulary.path) == (96, vocabulary)
        return
    with pytest.raises(UserError, match=rf"init.source=runs/a decides .*{message}") as refused:
        resolved(vocabulary, page, overrides)
    assert "\n" not in str(refused.value)


def test_a_copy_of_the_vocabulary_is_the_same(vocabulary, tmp_path):
    copy = tmp_path / "copy.model"
    copy.write_bytes(pathlib.Path(vocabulary).read_bytes())
    resolved(vocabulary, {}, {"data.vocabulary.path": str(copy)})
    copy.write_bytes(b"another")
    with pytest.raises(UserError, match=r"data\.vocabulary\.path"):
        resolved(vocabulary, {}, {"data.vocabulary.path": str(copy)})


def test_what_a_config_states():
    page = {"steps": 9, "model": {"width": 96}}
    config = config_files.fill(RunConfig, {"init": {"source": "m"}} | page, {"loss.margin": "0.1"})
    assert config_files.stated(config) == {"steps", "model.width", "init.source", "loss.margin"}
    built = RunConfig(steps=9, init=config.init)
    assert config_files.stated(built) == {"steps", "init.source"}
