import errno
import re
import threading
import time

import pytest

from moe_embed_jax import checksums, storage
from moe_embed_jax.errors import LostConnection, UserError
from moe_embed_jax.new_folder import UPLOADING, new_folder
from moe_embed_jax.ownership import own
from moe_embed_jax.refusals import refusal_of_system


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    """The same is true of both."""
    if request.param == "disk":
        return tmp_path / "folder"
    return request.getfixturevalue("bucket")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gs://", "the bucket is missing: give gs://BUCKET/FOLDER"),
        ("gs:/b/f", "gs is no storage that can be used: give gs://BUCKET/FOLDER"),
        ("s3://b/f", "s3 is no storage that can be used: give a local path or gs://"),
    ],
)
def test_names_that_are_no_path(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        storage.path(name)


def test_a_path_has_the_methods_of_a_local_one(folder):
    storage.write(folder / "a" / "x.json", "é\n")
    storage.write(folder / "a" / "deep" / "y.bin", b"123")
    path = folder / "a" / "x.json"
    assert path.read_text(encoding="utf-8") == "é\n" and path.stat().st_size == 3
    assert path.exists() and path.is_file() and not path.is_dir()
    assert path.parent.is_dir() and not path.parent.is_file()
    assert (path.name, path.suffix, path.with_name("z").name) == ("x.json", ".json", "z")
    assert [p.name for p in sorted((folder / "a").iterdir())] == ["deep", "x.json"]
    assert [p.name for p in (folder / "a").glob("*.json")] == ["x.json"]
    files = [p for p in (folder / "a").rglob("*") if p.is_file()]
    assert sorted(p.relative_to(folder).as_posix() for p in files) == ["a/deep/y.bin", "a/x.json"]
    with path.open("rb") as file:
        file.seek(2)
        assert file.read() == b"\n"
    assert str(storage.path(str(path))) == str(path) == f"{folder}/a/x.json"
    with pytest.raises(FileNotFoundError) as caught:
        (folder / "none").read_bytes()
    assert caught.value.errno == errno.ENOENT and str(folder / "none") in str(caught.value)
    with pytest.raises(FileExistsError):
        (folder / "a").mkdir()
    (folder / "a").mkdir(exist_ok=True)
    path.unlink()
    path.unlink(missing_ok=True)
    assert not path.exists()
    storage.remove(folder)
    storage.remove(folder)
    assert not folder.exists()


def test_a_file_appears_whole_or_not(folder):
    storage.write(folder / "a", b"old")
    with pytest.raises(RuntimeError), storage.written_whole(folder / "a") as file:
        file.write(b"half")
        raise RuntimeError
    assert (folder / "a").read_bytes() == b"old"
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_of_many_that_create_a_file_one_does(folder):
    folder.mkdir(parents=True, exist_ok=True)
    won = []

    def create(number):
        if storage.create(folder / "lock", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and (folder / "lock").read_bytes() == b"%d" % won[0]


def test_touch_and_now(folder):
    storage.write(folder / "a", b"content")
    before = (folder / "a").stat().st_mtime_ns
    while storage.now(folder) * 1e9 <= before + 2e7:
        pass
    storage.touch(folder / "a")
    assert (folder / "a").stat().st_mtime_ns > before
    assert (folder / "a").read_bytes() == b"content"
    with pytest.raises(FileNotFoundError):
        storage.touch(folder / "none")
    assert not (folder / "none").exists()


def test_appended_files(folder, monkeypatch):
    monkeypatch.setattr(storage, "_PART_BYTES", 100)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    assert storage.read_appended(path) is None
    expected = b""
    for start in (0, 40):  # a second process continues
        file = storage.AppendedFile(path)
        for i in range(start, start + 40):
            file.write(b"line %d\n" % i)
            expected += b"line %d\n" % i
        file.sync()
        assert storage.read_appended(path) == expected
        file.close()
    for size in (300, 100, 99, 0):
        storage.replace_appended(path, expected[:size])
        assert storage.read_appended(path) == expected[:size]


def test_move_and_copy(folder, tmp_path):
    storage.write(folder / "a" / "x", b"1")
    storage.write(folder / "a" / "deep" / "y", b"2")
    storage.move(folder / "a", folder / "b")
    assert not (folder / "a").exists()
    assert (folder / "b" / "x").read_bytes() + (folder / "b" / "deep" / "y").read_bytes() == b"12"
    storage.copy(folder / "b" / "x", folder / "z")
    storage.copy(folder / "z", tmp_path / "down")
    storage.copy(tmp_path / "down", folder / "up")
    assert (folder / "up").read_bytes() == b"1"


def test_local_copies_are_renewed_when_the_object_changes(folder):
    path = folder / "model.safetensors"
    storage.write(path, b"one")
    first = storage.local_copy(path)
    assert first.read_bytes() == b"one" and first.name == path.name
    stamp = first.stat().st_mtime_ns
    assert storage.local_copy(path).stat().st_mtime_ns == stamp  # not copied again
    storage.write(path, b"two")
    assert storage.local_copy(path).read_bytes() == b"two"


def test_new_folders_and_owners(folder):
    target = folder / "result"
    with new_folder(target, last="done") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "a").write_text("a")
        (partial / "done").write_text("")
        with pytest.raises(UserError, match="is in use by process"):
            new_folder(target, last="done").__enter__()
        assert not target.exists()
    assert sorted(path.name for path in target.iterdir()) == ["deep", "done"]
    assert [path.name for path in folder.iterdir()] == ["result"]  # no owner is left
    with pytest.raises(UserError, match="exists and is not empty"):
        new_folder(target, last="done").__enter__()
    with new_folder(target, last="done", replace=True) as partial:
        (partial / "done").write_text("new")
    assert [path.name for path in target.iterdir()] == ["done"]
    with pytest.raises(RuntimeError), new_folder(folder / "other", last="done"):
        raise RuntimeError
    assert not (folder / "other").exists()


def test_an_owner_in_a_bucket(bucket):
    with own(bucket, inside=True, lease=1.0) as owner:
        (file,) = bucket.glob(".owner-*")
        before = file.stat().st_mtime_ns
        while file.stat().st_mtime_ns == before:  # it is renewed
            pass
        with pytest.raises(UserError, match=f"{bucket} is in use by process"):
            own(bucket, inside=True).__enter__()
        owner.check()
        file.write_bytes(file.read_bytes().replace(b'"token": "', b'"token": "0'))
        with pytest.raises(UserError, match="was taken over by another process"):
            owner.check()


def test_an_upload_that_was_killed_is_done_again(bucket):
    for name in (UPLOADING, "half"):
        storage.write(bucket / "result" / name, b"")
    with new_folder(bucket / "result", last="done") as partial:
        (partial / "done").write_text("")
    assert [path.name for path in (bucket / "result").iterdir()] == ["done"]


def test_what_cannot_be_uploaded_is_kept_and_named(tmp_path, bucket, monkeypatch):
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    nowhere = storage.path("gs://no-such-bucket/a")
    with pytest.raises(OSError) as caught, storage.written_whole(nowhere / "x.npy") as file:
        file.write(b"hours of work")
    kept = tmp_path / "cache/not_uploaded/no-such-bucket/a/x.npy"
    assert kept.read_bytes() == b"hours of work"
    missing = "there is no such bucket: create it, or correct its name"
    line = f"{nowhere}/x.npy: {missing}; what was to be uploaded is kept as {kept}"
    assert refusal_of_system(caught.value) == line

    real = storage.copy

    def copy(source, target):
        if target.name == "b":
            raise LostConnection(errno.ENETUNREACH, "no network", str(target))
        real(source, target)

    monkeypatch.setattr(storage, "copy", copy)
    for content in ("old", "new"):
        with (
            pytest.raises(LostConnection) as caught,
            new_folder(bucket / "f", last="b") as partial,
        ):
            (partial / "a").write_text(content)
            (partial / "b").write_text("")
        kept = tmp_path / "cache/not_uploaded" / str(bucket / "f").removeprefix("gs://")
        assert {path.name: path.read_text() for path in kept.iterdir()} == {"a": content, "b": ""}
        line = f"{bucket}/f/b: no network; what was to be uploaded is kept as {kept}"
        assert refusal_of_system(caught.value) == line
    monkeypatch.setattr(storage, "copy", real)
    with new_folder(bucket / "f", last="b") as partial:
        (partial / "b").write_text("")
    assert [path.name for path in (bucket / "f").iterdir()] == ["b"]


def test_a_library_that_waits_for_a_lost_bucket_is_left_alone(bucket, monkeypatch):
    from moe_embed_jax import bucket as client

    monkeypatch.setattr(storage, "_ASKED_EVERY", 0.05)
    end = threading.Event()

    def fails():
        raise RuntimeError("damaged")

    assert storage.read_by_library(bucket, lambda: end.wait(0.2) or "read") == "read"
    with pytest.raises(RuntimeError, match="damaged"):
        storage.read_by_library(bucket, fails)
    monkeypatch.setattr(client, "_lost", (time.monotonic(), "Cloud Storage cannot be reached"))
    for call in (lambda: end.wait(60), fails):
        with pytest.raises(LostConnection, match="cannot be reached"):
            storage.read_by_library(bucket / "x", call)
    end.set()


def test_checksums_where_the_files_go(folder, request, tmp_path):
    storage.write(folder / "a" / "x", b"content")
    expected = checksums.checksums(folder, ["a"])
    assert list(expected) == ["a/x"]
    for place in (folder, tmp_path / "copy", request.getfixturevalue("bucket") / "copy"):
        (place / "a").mkdir(parents=True, exist_ok=True)
        storage.write(place / "a" / "x", b"content")
        assert checksums.find_damage(place, expected) is None
        storage.write(place / "a" / "x", b"contenT")
        assert "was changed" in checksums.find_damage(place, expected)
        storage.write(place / "a" / "x", b"cont")
        assert "has 4 of 7 bytes" in checksums.find_damage(place, expected)


def test_what_a_bucket_refuses_is_one_line(bucket):
    nowhere = storage.path("gs://no-such-bucket/a")
    assert not nowhere.exists()
    for action in (
        lambda: nowhere.write_bytes(b""),
        lambda: storage.create(nowhere, b""),
        lambda: own(nowhere).__enter__(),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            action()
        line = refusal_of_system(caught.value)
        assert line.startswith("gs://no-such-bucket")
        assert line.endswith("there is no such bucket: create it, or correct its name")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("Forbidden: b/x\nno permission"), "gs://b/x: Cloud Storage gives no access (Forb"),
        (ValueError("Bad Request: b/x\ninvalid name"), "gs://b/x: Cloud Storage says: Bad Request"),
        (
            ValueError("PERMISSION_DENIED: gs://b/x"),
            "gs://b/x: Cloud Storage gives no access (PERM",
        ),
        (TimeoutError("after 9 s"), "gs://b/x: Cloud Storage cannot be reached (after 9 s): check"),
    ],
)
def test_what_the_client_says_is_one_line(bucket, error, line, monkeypatch):
    from moe_embed_jax import bucket as client

    monkeypatch.setattr(client, "_lost", None)  # later tests have a connection

    with pytest.raises(OSError) as caught, client.errors_of(storage.path("gs://b/x")):
        raise error
    said = refusal_of_system(caught.value)
    assert said.startswith(line) and "\n" not in said
