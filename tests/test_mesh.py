"""What is known of a device: by itself where it is, else by its name."""

from types import SimpleNamespace
from unittest import mock

import jax
import pytest
from helpers.other_devices import device_named

from moe_embed_jax.data.data_config import DataConfig, VocabularyConfig
from moe_embed_jax.embedder import Embedder
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import compute_capability, single_device_mesh
from moe_embed_jax.models.encoder_config import EncoderConfig
from moe_embed_jax.training.loop import train
from moe_embed_jax.training.run_config import RunConfig

BFLOAT16 = EncoderConfig(dtype="bfloat16")
REFUSED = r"model\.dtype='bfloat16' needs GPUs .* Tesla T4 has 7\.5: set model\.dtype='float32'"


@pytest.mark.parametrize(
    ("platform", "kind", "expected"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", (9, 0)),
        ("gpu", "NVIDIA A100-SXM4-80GB", (8, 0)),
        ("gpu", "NVIDIA A10", (8, 6)),
        ("gpu", "NVIDIA L4", (8, 9)),
        ("gpu", "Tesla V100-SXM2-16GB", (7, 0)),
        ("gpu", "AMD Instinct MI300X", None),
        ("tpu", "TPU v5 lite", None),
    ],
)
def test_compute_capability_of_a_device_that_is_elsewhere(platform, kind, expected):
    with device_named(platform, kind):
        assert compute_capability() == expected


@pytest.mark.parametrize(("says", "expected"), [("12.0", (12, 0)), ("gfx942", None)])
def test_a_device_that_is_here_says_its_compute_capability(says, expected):
    here = SimpleNamespace(platform="gpu", device_kind="Some Card", compute_capability=says)
    with device_named("gpu", "Some Card"), mock.patch.object(jax, "local_devices", lambda: [here]):
        assert compute_capability() == expected


def test_bfloat16_is_refused_on_gpus_that_cannot_compute_in_it(tmp_path):
    """In training before anything is written."""
    mesh = single_device_mesh()
    data = DataConfig(vocabulary=VocabularyConfig(kind="train"))
    config = RunConfig(model=BFLOAT16, data=data)
    with device_named("gpu", "Tesla T4"):
        with pytest.raises(UserError, match=REFUSED):
            Embedder(BFLOAT16, None, None, {}, mesh)
        with pytest.raises(UserError, match=REFUSED):
            train(config, tmp_path / "run")
        Embedder(EncoderConfig(), None, None, {}, mesh)
    with device_named("gpu", "NVIDIA L4"):
        Embedder(BFLOAT16, None, None, {}, mesh)
    assert not (tmp_path / "run").exists()
