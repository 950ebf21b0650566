"""Devices that are not here, for what is chosen by the name of a device."""

import contextlib
from types import SimpleNamespace
from unittest import mock

from moe_embed_jax import mesh


@contextlib.contextmanager
def device_named(platform: str, kind: str):
    """The device in context is one that only has a name."""
    device = SimpleNamespace(platform=platform, device_kind=kind)
    with mock.patch.object(mesh, "device_in_context", lambda: device):
        yield
