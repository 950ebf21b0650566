"""Files about prepared texts: whole, or named."""

import pytest

from moe_embed_jax.errors import UserError
from moe_embed_jax.preparation.builders import statistics


def test_a_changed_file_about_the_texts_is_named(tmp_path):
    path = tmp_path / "groups.json"
    statistics.write_json(path, {"train": {"a/en": [0, 77]}, "test": {}})
    assert statistics.read_json(path) == {"train": {"a/en": [0, 77]}, "test": {}}
    for old, new in (("77", "78"), ("train", "tram"), ("[", '["')):
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(UserError, match=r"groups\.json.*delete it and run again"):
            statistics.read_json(path)
        statistics.write_json(path, {"train": {"a/en": [0, 77]}, "test": {}})
    path.write_text('{"train": {}}')  # as earlier versions wrote it
    assert statistics.read_json(path) == {"train": {}}
    path.unlink()
    assert statistics.read_json(path) == {}
