"""Files about prepared texts: whole, or named."""

import pytest

from moe_embed_jax.errors import UserError
from moe_embed_jax.preparation.builders import statistics


def test_a_changed_file_about_the_texts_is_named(tmp_path):
    path = tmp_path / "groups.json"
    statistics.write_json(path, {"train": {"a/en": [0, 3]}, "test": {}})
    assert statistics.read_json(path) == {"train": {"a/en": [0, 3]}, "test": {}}
    for old, new in (("3", "4"), ("train", "tram"), ("[", '["')):
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(UserError, match=r"groups\.json.*delete it and run again"):
            statistics.read_json(path)
        statistics.write_json(path, {"train": {"a/en": [0, 3]}, "test": {}})
    path.unlink()
    assert statistics.read_json(path) == {}
