import dataclasses
import os
import zipfile

import pytest
from helpers import synthetic_wheels

from moe_embed_jax.errors import UserError
from moe_embed_jax.hashes import file_hash
from moe_embed_jax.preparation.builders import wheels

NAMES = ("homeassistant", "botocore", "google-api-python-client")


@pytest.fixture
def wheels_dir(tmp_path, monkeypatch):
    """A folder of synthetic wheels, which are the pinned ones during the test."""
    monkeypatch.delenv(wheels.WHEELS_DIR_VARIABLE, raising=False)
    table = synthetic_wheels.write_wheels(tmp_path / "given")
    for name, wheel in table.items():
        monkeypatch.setitem(wheels.WHEELS, name, wheel)
    return tmp_path / "given"


@pytest.fixture
def no_pip(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pip was called")

    monkeypatch.setattr(wheels.subprocess, "Popen", refuse)


def test_table_pins_the_three_wheels():
    assert tuple(wheels.WHEELS) == NAMES
    assert {w.requirement for w in wheels.WHEELS.values()} == {
        "homeassistant==2026.2.3",
        "botocore==1.44.5",
        "google-api-python-client==2.202.0",
    }
    assert all(len(w.sha256) == 64 and w.licence == "Apache-2.0" for w in wheels.WHEELS.values())


def test_given_folder_is_used_without_pip(wheels_dir, tmp_path, no_pip):
    found = wheels.fetch(NAMES, tmp_path / "cache", wheels_dir, progress=False)
    assert {name: path.parent for name, path in found.items()} == dict.fromkeys(NAMES, wheels_dir)
    assert not (tmp_path / "cache").exists()


def test_folder_from_the_environment(wheels_dir, tmp_path, monkeypatch, no_pip):
    monkeypatch.setenv(wheels.WHEELS_DIR_VARIABLE, str(wheels_dir))
    found = wheels.fetch(["botocore"], tmp_path / "cache", progress=False)
    assert found["botocore"].parent == wheels_dir


def test_cache_is_used_without_pip(wheels_dir, tmp_path, no_pip):
    wheels_dir.rename(tmp_path / "cache")
    found = wheels.fetch(NAMES, tmp_path / "cache", progress=False)
    assert all(path.parent == tmp_path / "cache" for path in found.values())


def test_missing_folder_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"wheels_dir=.*nowhere: no such folder"):
        wheels.fetch(NAMES, tmp_path, tmp_path / "nowhere")
    monkeypatch.setenv(wheels.WHEELS_DIR_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"MOE_EMBED_WHEELS=.*nowhere: no such folder"):
        wheels.fetch(NAMES, tmp_path)


def test_checksum_mismatch_names_file_expected_and_actual(wheels_dir, tmp_path, no_pip):
    wheel = wheels.WHEELS["botocore"]
    path = wheels_dir / wheel.file_name
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError) as error:
        wheels.fetch(["botocore"], tmp_path / "cache", wheels_dir, progress=False)
    for part in (str(path), wheel.sha256, file_hash(path)):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_pip_downloads_by_the_users_configuration(wheels_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels_dir))
    cache = tmp_path / "cache"
    cache.mkdir()
    damaged = cache / wheels.WHEELS["botocore"].file_name
    damaged.write_bytes(b"half of a download")
    found = wheels.fetch(["botocore"], cache, progress=False)
    assert found == {"botocore": damaged}
    assert file_hash(damaged) == wheels.WHEELS["botocore"].sha256
    assert [path.name for path in cache.iterdir()] == [damaged.name]


def test_progress_survives_folders_that_pip_removes(tmp_path, monkeypatch):
    (tmp_path / "pip-unpack-1").mkdir()
    (tmp_path / "done.whl").write_bytes(b"12345")
    scandir = os.scandir

    def scan_what_has_just_been_removed(path):
        if os.fspath(path).endswith("pip-unpack-1"):
            (tmp_path / "pip-unpack-1").rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan_what_has_just_been_removed)
    assert wheels._bytes_in(tmp_path) == 5
    assert not (tmp_path / "pip-unpack-1").exists()


def test_other_content_from_pip_is_refused(wheels_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels_dir))
    other = dataclasses.replace(wheels.WHEELS["botocore"], sha256="0" * 64)
    monkeypatch.setitem(wheels.WHEELS, "botocore", other)
    with pytest.raises(UserError, match=r"sha256 is .*, expected 0{64} for botocore==1.44.5"):
        wheels.fetch(["botocore"], tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_unreachable_index_says_what_to_do(wheels_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    for variable in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError) as error:
        wheels.fetch(["homeassistant", "botocore"], tmp_path / "cache", progress=False)
    message = str(error.value)
    assert message.startswith("could not download homeassistant==2026.2.3: pip said: ERROR: ")
    assert "--python-version 3.14 -d wheels homeassistant==2026.2.3 botocore==1.44.5`" in message
    assert "--wheels_dir=wheels or MOE_EMBED_WHEELS=wheels" in message
    assert "\n" not in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_zip_is_named(tmp_path):
    path = tmp_path / "broken.whl"
    path.write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(UserError, match=r"broken\.whl: not readable as a zip file"):
        wheels.open_wheel(path)


def test_open_wheel_lists_members(wheels_dir):
    with wheels.open_wheel(wheels_dir / wheels.WHEELS["botocore"].file_name) as archive:
        assert isinstance(archive, zipfile.ZipFile)
        assert "botocore/data/service0/2020-02-02/service-2.json" in archive.namelist()
