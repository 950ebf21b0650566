import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_embed_jax.data.data_spec import describe_spec_difference
from moe_embed_jax.data.token_records import (
    MAGIC,
    Negatives,
    decode_record,
    encode_record,
    encode_records,
)
from moe_embed_jax.data.token_store import TokenStore, TokenStoreWriter
from moe_embed_jax.errors import UserError

SPEC = {
    "mixture": "m",
    "vocabulary": {"sha256": "a" * 64, "size": 100},
    "query_length": 8,
    "document_length": 16,
    "prefixes": ["q: ", "d: "],
    "source_checksums": {"x.whl": "b" * 64},
}


def make_rows(count: int, seed: int = 0):
    generator = np.random.default_rng(seed)
    pairs = [
        [
            generator.integers(0, 250002, generator.integers(2, 9)).astype(np.int32),
            generator.integers(0, 250002, generator.integers(2, 17)).astype(np.int32),
        ]
        for _ in range(count)
    ]
    ids = generator.integers(-(2**31), 2**31, (count, 2, 2)).astype(np.int32)
    return pairs, ids


def write_store(folder, count: int = 250, rows_per_shard: int = 100, seed: int = 0, spec=SPEC):
    pairs, ids = make_rows(count, seed)
    with TokenStoreWriter(folder, spec, rows_per_shard) as writer:
        for row in range(count):
            if row == 0:
                writer.start_group("translations", "de", 0.75)
            if row == 120:
                writer.start_group("translations", "empty", 0.75)
                writer.start_group("aws_api", "en", 0.25)
            writer.write(pairs[row], ids[row])
    return pairs, ids


def assert_same(found, expected):
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert [a.dtype for a in left] == [np.int32, np.int32]
        for a, b in zip(left, right, strict=True):
            np.testing.assert_array_equal(a, b)


def test_round_trip_across_shards(tmp_path):
    pairs, ids = write_store(tmp_path / "t")
    names = sorted(path.name for path in (tmp_path / "t").iterdir())
    assert names == [
        "content_ids.npy",
        "lengths.npy",
        *(f"shard-0000{i}-of-00003.array_record" for i in range(3)),
        "spec.json",
    ]
    store = TokenStore.open(tmp_path / "t")
    assert len(store) == store.spec["rows"] == 250
    assert store.lengths.dtype == np.int32 and store.lengths.shape == (250, 2)
    np.testing.assert_array_equal(store.lengths, [[len(q), len(d)] for q, d in pairs])
    np.testing.assert_array_equal(store.content_ids, ids)
    assert store.groups == [
        {"task": "translations", "language": "de", "start": 0, "stop": 120, "rate": 0.75},
        {"task": "aws_api", "language": "en", "start": 120, "stop": 250, "rate": 0.25},
    ]
    assert {key: store.spec[key] for key in SPEC} == SPEC
    assert_same(store.read(np.arange(250)), pairs)


def test_random_access_keeps_order_and_repeats(tmp_path):
    pairs, _ = write_store(tmp_path / "t")
    store = TokenStore.open(tmp_path / "t")
    rows = np.array([249, 0, 100, 99, 0, 7, 200, 249, 101])
    assert_same(store.read(rows), [pairs[row] for row in rows])
    assert store.read(np.array([], dtype=np.int64)) == []
    assert_same(store.read([3]), [pairs[3]])
    for bad in (-1, 250):
        with pytest.raises(UserError, match=r"outside \[0, 250\)"):
            store.read([0, bad])


def test_threads_may_read_together(tmp_path):
    pairs, _ = write_store(tmp_path / "t")
    store = TokenStore.open(tmp_path / "t")
    batches = [np.random.default_rng(i).integers(0, 250, 64) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for rows, found in zip(batches, pool.map(store.read, batches), strict=True):
            assert_same(found, [pairs[row] for row in rows])


def test_same_input_gives_equal_files(tmp_path):
    write_store(tmp_path / "a")
    write_store(tmp_path / "b")
    write_store(tmp_path / "c", seed=1)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    hashes = [TokenStore.open(tmp_path / name).spec["hash"] for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_batches_of_rows_give_the_same_files(tmp_path):
    pairs, ids = write_store(tmp_path / "a")
    lengths = np.array([[len(text) for text in pair] for pair in pairs])
    with TokenStoreWriter(tmp_path / "b", SPEC, 100) as writer:
        for start, stop in ((0, 50), (50, 50), (50, 120), (120, 250)):
            if start != 50:
                writer.start_group(
                    *(("aws_api", "en", 0.25), ("translations", "de", 0.75))[start < 9]
                )
            tokens = [
                np.concatenate([pair[i] for pair in pairs[start:stop]] or [np.empty(0, np.int32)])
                for i in range(2)
            ]
            writer.write_batch(tokens, lengths[start:stop], ids[start:stop])
        assert writer.rows == 250
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_hash_follows_tokens_spec_and_rates_but_not_location(tmp_path):
    write_store(tmp_path / "a")
    write_store(tmp_path / "deep" / "b", spec={**SPEC, "query_length": 9})
    first, second = (TokenStore.open(tmp_path / name).spec for name in ("a", "deep/b"))
    assert first["hash"] != second["hash"]
    assert first["content"] == second["content"]


def test_writer_is_atomic(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        TokenStoreWriter(tmp_path / "t", SPEC) as writer,
    ):
        writer.start_group("a", "en", 1.0)
        writer.write([np.array([0, 2])] * 2, np.zeros((2, 2)))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    write_store(tmp_path / "t", 10)
    before = TokenStore.open(tmp_path / "t").spec["hash"]
    write_store(tmp_path / "t", 20)  # replaces
    store = TokenStore.open(tmp_path / "t")
    assert len(store) == 20 and store.spec["hash"] != before
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_writer_misuse(tmp_path):
    with (
        pytest.raises(RuntimeError, match="start_group"),
        TokenStoreWriter(tmp_path / "t", {}) as w,
    ):
        w.write([np.array([0, 2])] * 2, np.zeros((2, 2)))
    with pytest.raises(UserError, match="no row was written"), TokenStoreWriter(tmp_path / "t", {}):
        pass
    assert list(tmp_path.iterdir()) == []


# ---- Records -------------------------------------------------------------------------------------


def test_record_layout():
    record = encode_record([np.array([0, 9, 2]), np.array([0, 2])])
    words = np.frombuffer(record, "<u4").tolist()
    assert words == [MAGIC, 2, 3, 2, 0, 9, 2, 0, 2]
    assert [s.tolist() for s in decode_record(record)] == [[0, 9, 2], [0, 2]]
    assert [s.tolist() for s in decode_record(encode_record([[], [5]]))] == [[], [5]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "0 bytes"),
        ([1, 2, 3, 2, 0, 9, 2, 0, 2], "instead of"),
        ([MAGIC, 2, 3, 2, 0, 9, 2, 0], "do not match"),
        ([MAGIC, 2, 3, 2, 0, 9, 2, 0, 2, 7], "do not match"),
        ([MAGIC, 2**32 - 1, 3], "do not match"),
        ([MAGIC, 2**31 - 1, 3], "do not match"),
        ([MAGIC, 2, 2**32 - 1, 4, 1, 1, 1], "do not match"),
        ([MAGIC, 0], "do not match"),
    ],
)
def test_bad_records(words, message):
    with pytest.raises(ValueError, match=message):
        decode_record(np.array(words, dtype="<u4").tobytes())


# ---- Damage --------------------------------------------------------------------------------------


def damage(path, offset: int, count: int = 1):
    data = bytearray(path.read_bytes())
    for i in range(offset, offset + count):
        data[i] ^= 0xFF
    path.write_bytes(data)


def test_damaged_record_is_named(tmp_path):
    pairs, _ = write_store(tmp_path / "t")
    path = tmp_path / "t" / "shard-00001-of-00003.array_record"
    damage(path, 400)  # inside the first chunk of 16 records
    store = TokenStore.open(tmp_path / "t")
    assert_same(store.read([0, 99, 150, 249]), [pairs[row] for row in (0, 99, 150, 249)])
    with pytest.raises(UserError) as error:
        store.read([150, 249, 105, 1])
    message = str(error.value)
    assert "shard-00001-of-00003.array_record: record 5 is damaged" in message
    assert "prepare the data again" in message and "\n" not in message
    assert_same(store.read([150]), [pairs[150]])


def test_swapped_record_is_noticed(tmp_path):
    """A record that is sound in itself but does not belong to its row."""
    write_store(tmp_path / "a", seed=0)
    write_store(tmp_path / "b", seed=1)
    name = "shard-00000-of-00003.array_record"
    os.replace(tmp_path / "b" / name, tmp_path / "a" / name)
    store = TokenStore.open(tmp_path / "a")
    with pytest.raises(UserError, match=r"shard-00000.*record \d+ is damaged .*lengths"):
        store.read(np.arange(100))


def test_short_and_missing_files(tmp_path):
    write_store(tmp_path / "t")
    folder = tmp_path / "t"
    shard = folder / "shard-00002-of-00003.array_record"
    content = shard.read_bytes()
    for size in (0, 100, len(content) // 2):
        shard.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"shard-00002.*cut short.*of 50 records"):
            TokenStore.open(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00002-of-00003\.array_record is missing"):
        TokenStore.open(folder)
    shard.write_bytes(content)
    for name in ("lengths", "content_ids"):
        path = folder / f"{name}.npy"
        content = path.read_bytes()
        path.write_bytes(content[:-10])
        with pytest.raises(UserError, match=rf"{name}\.npy cannot be read"):
            TokenStore.open(folder)
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=rf"{name}\.npy is not the one"):
            TokenStore.open(folder)
        path.unlink()
        with pytest.raises(UserError, match=rf"{name}\.npy is missing"):
            TokenStore.open(folder)
        path.write_bytes(content)
    TokenStore.open(folder)


def test_spec_failures(tmp_path):
    with pytest.raises(UserError, match="not a token store; prepare"):
        TokenStore.open(tmp_path)
    write_store(tmp_path / "t")
    path = tmp_path / "t" / "spec.json"
    spec = json.loads(path.read_text())
    for text, message in (
        ("{", "not a token store spec"),
        ("[]", "not a token store spec"),
        ("{}", "not a token store spec"),
        (json.dumps({**spec, "query_length": 99}), "was changed after"),
        (json.dumps({**spec, "format": 7}), "has format 7, this version reads 1"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            TokenStore.open(tmp_path / "t")


# ---- Specs, configurations and paths -------------------------------------------------------------


def test_describe_spec_difference(tmp_path):
    write_store(tmp_path / "a")
    write_store(tmp_path / "b", count=200, seed=1, spec={**SPEC, "query_length": 9})
    a, b = (TokenStore.open(tmp_path / name).spec for name in "ab")
    assert describe_spec_difference(a, a) == ""
    text = describe_spec_difference(a, b)
    assert "\n" not in text
    assert "query_length: 8 -> 9" in text and "rows: 250 -> 200" in text
    assert f"content.records: {a['content']['records'][:12]} -> " in text
    assert (
        "groups: 2 groups with 250 rows -> 2 with 200 "
        "(aws_api/en 130 rows at rate 0.25 -> 80 rows at rate 0.25)"
    ) in text
    other = {**SPEC, "vocabulary": {"sha256": "c" * 64, "size": 200}, "new": [1]}
    assert describe_spec_difference(SPEC, other) == (
        "new: absent -> [1]; vocabulary.sha256: aaaaaaaaaaaa -> cccccccccccc; "
        "vocabulary.size: 100 -> 200"
    )
    many = [
        {"task": "t", "language": str(i), "start": i, "stop": i + 1, "rate": 1} for i in range(9)
    ]
    assert "and 6 more" in describe_spec_difference({}, {"groups": many})
    assert "another order" in describe_spec_difference({"groups": many}, {"groups": many[::-1]})


def test_reading_never_imports_tensorflow(tmp_path):
    write_store(tmp_path / "t", 5)
    code = (
        "import sys; from moe_embed_jax.data import data_spec, token_store;"
        "from moe_embed_jax.tokenizers import vocabulary;"
        f"store = token_store.TokenStore.open({str(tmp_path / 't')!r}); store.read([4, 0]);"
        "vocabulary = {'kind': 'train', 'size': 9};"
        "data_spec.token_store_path({'vocabulary': vocabulary}, '.');"
        "bad = {'tensorflow', 'seqio', 'tensorflow_text'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


texts = st.lists(st.integers(0, 2**31 - 1), max_size=5)


@given(st.lists(st.lists(texts, min_size=2, max_size=6), max_size=6))
def test_batches_of_ragged_records_equal_single_ones(rows):
    def flat(sequences):
        return np.array([token for sequence in sequences for token in sequence], np.int32)

    hard = [text for row in rows for text in row[2:]]
    counts = np.array([len(row) - 2 for row in rows], np.int64)
    lengths = np.array([[len(row[0]), len(row[1])] for row in rows], np.int64).reshape(-1, 2)
    sizes = np.array([len(text) for text in hard], np.int64)
    content = np.arange(2 * len(hard), dtype=np.int32).reshape(-1, 2)
    negatives = Negatives(flat(hard), sizes, content, counts)
    ids = [flat(row[side] for row in rows) for side in range(2)]
    records = encode_records(ids, lengths, negatives)
    assert records == [encode_record([np.array(t, np.int32) for t in row]) for row in rows]
    # Leaving out rows and texts is what it is on lists.
    keep = np.arange(len(rows)) % 2 == 0
    chosen = negatives.of_rows(keep)
    assert chosen.tokens.tolist() == flat(t for row in rows[::2] for t in row[2:]).tolist()
    assert chosen.counts.tolist() == counts[::2].tolist()
    longer = negatives.longer_than(1)
    kept = [[t for t in row[2:] if len(t) > 1] for row in rows]
    assert longer.counts.tolist() == [len(row) for row in kept]
    assert longer.tokens.tolist() == flat(t for row in kept for t in row).tolist()
    assert longer.content_ids.tolist() == content[sizes > 1].tolist()


def test_scores_are_kept_and_damage_to_them_is_noticed(tmp_path):
    scores = np.array([0.25, np.nan], np.float32)
    negatives = Negatives(
        np.arange(3), np.array([1, 2]), np.ones((2, 2), np.int32), np.array([2, 0]), scores[::-1]
    )
    with TokenStoreWriter(tmp_path / "store", {}) as writer:
        writer.start_group("task", "en", 1.0)
        content, lengths = np.zeros((2, 2, 2), np.int32), np.ones((2, 2), np.int64)
        ids = [np.arange(2), np.arange(2)]
        writer.write_batch(ids, lengths, content, negatives, scores)
        writer.write_batch(ids, lengths, content)  # none is known
    store = TokenStore.open(tmp_path / "store")
    np.testing.assert_array_equal(store.document_scores, [0.25, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(store.negative_scores, [np.nan, 0.25])
    path = tmp_path / "store" / "negative_scores.npy"
    np.save(path, np.array([np.nan, 0.2], np.float32))
    with pytest.raises(UserError, match=r"negative_scores\.npy is not the one"):
        TokenStore.open(tmp_path / "store")
