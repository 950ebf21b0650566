"""config.json of our own folders: a change is named, until its checksum is taken out."""

import dataclasses
import json
import shutil

import pytest
from helpers import saved_model

from moe_embed_jax.card import save_card
from moe_embed_jax.errors import UserError
from moe_embed_jax.model_folder import open_model
from moe_embed_jax.models.encoder_config import EncoderConfig

MODEL = EncoderConfig(vocab_size=64, num_layers=2, width=16, num_heads=2, ffn_width=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "ours"
    folder.mkdir()
    saved_model.write(folder, MODEL, query_length=8, document_length=16)
    card = json.loads((folder / "config.json").read_text())
    save_card(folder / "config.json", card | {"prompts": {"query": "q: ", "document": ""}})
    return folder


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("model", {"rotary_base": 100.0}),
        ("model", {"pooling": "cls"}),
        ("data", {"query_length": 7}),
        ("prompts", {"query": "x: "}),
        ("prompts", {"other": "q: "}),
    ],
)
def test_a_change_is_named(section, change, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    card = json.loads(path.read_text())
    card[section] |= change
    path.write_text(json.dumps(card))
    with pytest.raises(UserError) as error:
        open_model(tmp_path / "ours")
    assert str(error.value) == (
        f"{path} was changed (its CRC-32 differs): bring it back, or remove its key "
        '"crc32" if you meant to change it'
    )
    del card["crc32"]
    path.write_text(json.dumps(card))
    opened = open_model(tmp_path / "ours")
    found = {
        "model": dataclasses.asdict(opened.model),
        "data": {f"{side}_length": length for side, length in opened.max_lengths.items()},
        "prompts": opened.prompts,
    }
    assert found[section].items() >= change.items()


def test_order_and_white_space_are_no_change(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(card.items()))))
    assert open_model(tmp_path / "ours").model == MODEL
