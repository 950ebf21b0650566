"""Vectors on disk: what is written is read, killed writers continue, and nothing is mixed up."""

import hashlib
import json
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.commands import files_of
from helpers.forked import start_forked

from moe_embed_jax import storage
from moe_embed_jax.errors import LostConnection, UserError
from moe_embed_jax.parts import Part
from moe_embed_jax.search import DTYPES, vector_folder, vectors
from moe_embed_jax.search.knn import top_k
from moe_embed_jax.search.vectors import (
    VectorStore,
    finish_vectors,
    hash_texts,
    write_part,
    write_vectors,
)

WIDTH = 24
TEXTS = [f"text {i}" for i in range(70)]
ENCODER = {"hash": "abc", "prefix": "query: ", "max_length": 512}


def encode(texts):
    x_ND = np.zeros((len(texts), WIDTH), np.float32)
    for row, text in zip(x_ND, texts, strict=True):
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
        row[:] = np.random.default_rng(seed).normal(size=WIDTH)
    return x_ND


class Counting:
    """`encode` that keeps the sizes of its calls and may fail in one of them."""

    def __init__(self, fail_at=None):
        self.sizes = []
        self.fail_at = fail_at

    def __call__(self, texts):
        if texts:
            self.sizes.append(len(texts))
        if len(self.sizes) == self.fail_at:
            raise RuntimeError("device lost")
        return encode(texts)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(vectors, "CHUNK", 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(tmp_path, dtype):
    store = write_vectors(tmp_path / "v", lambda: TEXTS, encode, ENCODER, dtype)
    expected = encode(TEXTS).astype(store.dtype)
    assert store.shape == (70, WIDTH) and store.dtype.name == dtype
    np.testing.assert_array_equal(store[:], expected)
    np.testing.assert_array_equal(VectorStore(tmp_path / "v")[13:35], expected[13:35])
    assert store[70:80].shape == (0, WIDTH)
    about = json.loads((tmp_path / "v" / "about.json").read_text())
    assert about["encoder"] == ENCODER and about["texts"]["count"] == 70
    chunks = [path for path in (tmp_path / "v" / "c").rglob("*") if path.is_file()]
    assert len(chunks) == 5


def test_a_path_that_leads_up(tmp_path, monkeypatch):
    """TensorStore refuses one with ".."."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_vectors("../v", lambda: TEXTS, encode, ENCODER)
    np.testing.assert_array_equal(VectorStore(tmp_path / "v")[:], encode(TEXTS))


def test_no_texts(tmp_path):
    store = write_vectors(tmp_path / "v", lambda: [], encode, ENCODER)
    assert store.shape == (0, WIDTH) and store[:].shape == (0, WIDTH)
    assert write_vectors(tmp_path / "v", lambda: [], encode, ENCODER).shape == (0, WIDTH)


def test_continues_with_the_chunk_that_failed(tmp_path):
    with pytest.raises(RuntimeError, match="device lost"):
        write_vectors(tmp_path / "v", lambda: TEXTS, Counting(fail_at=4), ENCODER)
    with pytest.raises(UserError, match=r"v: 48 of 70 vectors are written"):
        VectorStore(tmp_path / "v")
    second = Counting()
    store = write_vectors(tmp_path / "v", lambda: iter(TEXTS), second, ENCODER)
    assert second.sizes == [16, 6]
    np.testing.assert_array_equal(store[:], encode(TEXTS))
    third = Counting()
    write_vectors(tmp_path / "v", lambda: TEXTS, third, ENCODER)
    assert third.sizes == []


def test_kill_9_and_resume(tmp_path):
    process = start_forked([__file__, tmp_path / "v", 0.2])
    for _ in range(600):
        if list(tmp_path.glob("v/chunks/*.json")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = 16 * len(list(tmp_path.glob("v/chunks/*.json")))
    assert 16 <= done < 70
    counting = Counting()
    store = write_vectors(tmp_path / "v", lambda: TEXTS, counting, ENCODER)
    assert sum(counting.sizes) == 70 - done
    np.testing.assert_array_equal(store[:], encode(TEXTS))


def write(folder, part, encode=encode):
    return write_part(folder, lambda: iter(TEXTS), encode, ENCODER, "float32", part)


def finish(folder):
    return finish_vectors(folder, lambda: TEXTS, encode, ENCODER, "float32")


@pytest.mark.parametrize("count", [1, 3, 7])
def test_parts_that_start_at_once_write_the_bytes_of_one_process(tmp_path, count):
    with ThreadPoolExecutor(count) as pool:
        parts = [Part(index, count) for index in range(count)]
        shapes = list(pool.map(lambda part: write(tmp_path / "v", part), parts))
    assert sum(rows for rows, _ in shapes) == 70 and {width for _, width in shapes} == {WIDTH}
    with pytest.raises(UserError, match="v: 70 of 70 vectors are written"):
        VectorStore(tmp_path / "v")
    np.testing.assert_array_equal(finish(tmp_path / "v")[:], encode(TEXTS))
    write_vectors(tmp_path / "whole", lambda: TEXTS, encode, ENCODER)
    assert files_of(tmp_path / "v") == files_of(tmp_path / "whole")


def test_a_part_that_died_is_taken_over(tmp_path):
    write(tmp_path / "v", Part(0, 2))
    with pytest.raises(RuntimeError, match="device lost"):
        write(tmp_path / "v", Part(1, 2), Counting(fail_at=2))
    with pytest.raises(UserError, match=r"v: 1 of 5 chunks of 16 texts are not done \(numbers 3\)"):
        finish(tmp_path / "v")
    again = Counting()
    assert write(tmp_path / "v", Part(1, 2), again) == (32, WIDTH)
    assert again.sizes == [16]
    np.testing.assert_array_equal(finish(tmp_path / "v")[:], encode(TEXTS))
    with pytest.raises(UserError, match="v holds other vectors"):
        finish_vectors(tmp_path / "v", lambda: TEXTS, encode, ENCODER, "float16")


def test_an_earlier_version_wrote_how_many_rows_there_were(tmp_path):
    with pytest.raises(RuntimeError, match="device lost"):
        write_vectors(tmp_path / "v", lambda: TEXTS, Counting(fail_at=4), ENCODER)
    (tmp_path / "v" / "progress.json").write_text('{"rows": 32}')
    counting = Counting()
    write_vectors(tmp_path / "v", lambda: TEXTS, counting, ENCODER)
    assert counting.sizes == [16, 6]


MADE = [".about.json.partial", "about.json", "zarr.json", ".progress.json.partial"]


@pytest.mark.parametrize("name", MADE)
def test_a_kill_while_the_folder_is_made(tmp_path, name):
    """The folder as a kill leaves it, when `name` was the last file that was written."""
    write_vectors(tmp_path / "whole", lambda: TEXTS, encode, ENCODER)
    folder = tmp_path / "v"
    folder.mkdir()
    for file in MADE[: MADE.index(name) + 1]:
        source = tmp_path / "whole" / file.removeprefix(".").removesuffix(".partial")
        (folder / file).write_bytes(source.read_bytes())
        if file == "about.json":
            (folder / MADE[0]).unlink()
    counting = Counting()
    store = write_vectors(folder, lambda: TEXTS, counting, ENCODER)
    assert sum(counting.sizes) == 70
    np.testing.assert_array_equal(store[:], encode(TEXTS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": lambda: [*TEXTS[:-1], "other"]}, "texts.sha256: "),
        ({"texts": lambda: TEXTS[:-1]}, "texts.count: 70 -> 69"),
        ({"encoder": {**ENCODER, "hash": "abd"}}, "encoder.hash: abc -> abd"),
        ({"encoder": {**ENCODER, "prefix": ""}}, "encoder.prefix: query:  -> "),
        ({"encode": lambda texts: encode(texts)[:, :8]}, "width: 24 -> 8"),
        ({"dtype": "float16"}, "dtype: float32 -> float16"),
    ],
)
def test_other_vectors_are_an_error_that_names_the_difference(tmp_path, change, message):
    asked = {"texts": lambda: TEXTS, "encode": encode, "encoder": ENCODER, "dtype": "float32"}
    write_vectors(tmp_path / "v", **asked)
    with pytest.raises(UserError) as caught:
        write_vectors(tmp_path / "v", **{**asked, **change})
    assert message in str(caught.value) and "v holds other vectors" in str(caught.value)
    np.testing.assert_array_equal(VectorStore(tmp_path / "v")[:], encode(TEXTS))


def test_refuses(tmp_path):
    with pytest.raises(UserError, match="dtype=int8: choose one of float32"):
        write_vectors(tmp_path / "v", lambda: TEXTS, encode, ENCODER, "int8")
    with pytest.raises(UserError, match=r"about\.json is missing: .* holds no vectors"):
        VectorStore(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UserError, match="full holds something else"):
        write_vectors(tmp_path / "full", lambda: TEXTS, encode, ENCODER)

    def broken(texts):
        x_ND = encode(texts)
        x_ND[3:4] = np.nan
        return x_ND

    with pytest.raises(UserError, match="text 3 no finite vector"):
        write_vectors(tmp_path / "v", lambda: TEXTS, broken, ENCODER)
    lists = iter([TEXTS, TEXTS[:40]])
    with pytest.raises(UserError, match="the texts changed meanwhile: 70 before, 40"):
        write_vectors(tmp_path / "w", lambda: next(lists), encode, ENCODER)


@pytest.mark.parametrize("finished", [True, False])
def test_a_chunk_in_the_place_of_another_is_refused(tmp_path, finished):
    """Each has a right CRC-32C of its own."""
    for name, texts in (("v", TEXTS), ("w", TEXTS[::-1])):
        write_vectors(tmp_path / name, lambda texts=texts: texts, encode, ENCODER)
    (tmp_path / "v/c/1/0").write_bytes((tmp_path / "w/c/1/0").read_bytes())
    if not finished:
        (tmp_path / "v/progress.json").unlink()
    expected = r"v holds damaged vectors \(.*v/c/1/0 was changed.*\): delete it, and repeat"
    with pytest.raises(UserError, match=expected):
        write_vectors(tmp_path / "v", lambda: TEXTS, encode, ENCODER)[:]


def test_checksums_of_chunks(tmp_path):
    write_vectors(tmp_path / "v", lambda: TEXTS, encode, ENCODER)
    path = tmp_path / "v/chunks/1.json"
    for text in ("{", "[]", '{"file": 7}', '{"file": "a-b"}', "{}"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"v/chunks/1\.json is damaged \(.*delete .*v, and"):
            VectorStore(tmp_path / "v")[:]
    path.unlink()
    with pytest.raises(UserError, match=r"v/chunks/1\.json is missing"):
        VectorStore(tmp_path / "v")[:]
    shutil.rmtree(path.parent)  # as an earlier version left it
    np.testing.assert_array_equal(VectorStore(tmp_path / "v")[:], encode(TEXTS))


def test_damage_is_named(tmp_path):
    store = write_vectors(tmp_path / "v", lambda: TEXTS, encode, ENCODER)
    store[:]
    path = tmp_path / "v/c/1/0"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"v holds damaged vectors \(.*v/c/1/0 was changed"):
        VectorStore(tmp_path / "v")[:]
    with pytest.raises(UserError, match=r"v holds damaged vectors \(rows 0 to 70: .*v/c/1/0"):
        store[:]  # it has compared the file before: the chunk's own CRC-32C
    path.write_bytes(b"short")
    with pytest.raises(UserError, match=r"v holds damaged vectors \(.*v/c/1/0 has 5 of \d+ bytes"):
        VectorStore(tmp_path / "v")[:]
    (tmp_path / "v" / "c" / "1" / "0").unlink()
    with pytest.raises(UserError, match=r"v holds damaged vectors \(.*v/c/1/0 is missing\)"):
        top_k(encode(["query"]), VectorStore(tmp_path / "v"), 1)
    for text in ("{", "[]", '{"rows": "70"}', '{"rows": 71}', '{"rows": 17}'):
        (tmp_path / "v" / "progress.json").write_text(text)
        with pytest.raises(UserError, match=r"v/progress\.json is damaged \("):
            VectorStore(tmp_path / "v")


@pytest.mark.parametrize("size", [10**30, 2**40, -1, 2.5, None])
@pytest.mark.parametrize("keys", [("width",), ("texts", "count")])
def test_sizes_that_cannot_be_are_named(tmp_path, keys, size):
    """Neither TensorStore nor the memory is asked for them."""
    write_vectors(tmp_path / "v", lambda: TEXTS, encode, ENCODER)
    about = json.loads((tmp_path / "v" / "about.json").read_text())
    place = about
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = size
    (tmp_path / "v" / "about.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"v/about\.json is damaged \(.*shape .* at most"):
        VectorStore(tmp_path / "v")


def test_vectors_without_checksums_are_read_with_a_line(tmp_path, monkeypatch, capsys):
    """As earlier versions wrote them."""
    monkeypatch.setattr(vector_folder, "_CHECKED", vector_folder._CODECS)
    write_vectors(tmp_path / "v", lambda: TEXTS, encode, ENCODER)
    monkeypatch.undo()
    monkeypatch.setattr(vectors, "CHUNK", 16)
    np.testing.assert_array_equal(VectorStore(tmp_path / "v")[:], encode(TEXTS))
    assert f"{tmp_path}/v was written without checksums" in capsys.readouterr().err


def test_the_hash_knows_where_texts_end():
    assert hash_texts(["ab", "c"]) != hash_texts(["a", "bc"])
    assert hash_texts(iter(["\ud800"]))[0] == 1  # half a surrogate pair


@pytest.mark.parametrize("dtype", DTYPES)
def test_search_streams_a_store(tmp_path, dtype):
    store = write_vectors(tmp_path / "v", lambda: TEXTS, encode, ENCODER, dtype)
    query_BD = encode(["one", "two", "three"])
    found = top_k(query_BD, store, 5, block=8, load=16)
    expected = top_k(query_BD, store[:].astype(np.float32), 5)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_array_equal(found[1], expected[1])


if __name__ == "__main__":
    vectors.CHUNK = 16

    def slowly(texts):
        time.sleep(float(sys.argv[2]))
        return encode(texts)

    write_vectors(sys.argv[1], lambda: TEXTS, slowly, ENCODER)


def test_a_lost_connection_is_no_damage_and_loses_nothing(bucket, cloud_server, monkeypatch):
    from moe_embed_jax import bucket as client

    monkeypatch.setattr(storage, "_RETRIES", 1)
    cut_off = Counting()

    def encode_until_cut_off(texts):
        if len(cut_off.sizes) == 2 and texts:
            cloud_server.stop()
        return cut_off(texts)

    try:
        with pytest.raises(LostConnection, match="Cloud Storage cannot be reached") as caught:
            write_vectors(bucket / "v", lambda: TEXTS, encode_until_cut_off, ENCODER)
        assert caught.value.filename == f"{bucket}/v"
        with pytest.raises(LostConnection):
            VectorStore(bucket / "v")
    finally:
        cloud_server.start()
        monkeypatch.setattr(client, "_lost", None)
    resumed = Counting()
    store = write_vectors(bucket / "v", lambda: TEXTS, resumed, ENCODER)
    np.testing.assert_array_equal(store[:], encode(TEXTS))
    assert 0 < sum(resumed.sizes) < len(TEXTS)
