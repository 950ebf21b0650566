"""Tensors of a checkpoint folder: safetensors only, one file or several with an index.

Nothing is ever unpickled: a folder that holds pickle files only is refused with the remedy.
"""

import pathlib
from collections.abc import Iterable

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.finite import all_finite
from moe_embed_jax.json_file import printable, read_object

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def write_tensors(path: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a safetensors file on a disk, which PyTorch's libraries read.

    Its mode is that of any new file: the library renames a temporary one that only its owner may
    read.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors}
    path.touch()
    mode = path.stat().st_mode
    safetensors.numpy.save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(mode)


class Tensors:
    """Names, shapes and values of the tensors in `folder`; values are read when asked for.

    Attributes:
      names: {name: name in the file}; a common prefix of the encoder's tensors can be dropped.
      origin: what messages call the files.
    """

    def __init__(self, folder: pathlib.Path):
        """Raises `UserError`: no weights, pickle files only, a damaged or incomplete file."""
        self._handles = {}
        single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
        if storage.has_entry(single):
            self.origin = str(single)
            files = {name: single for name in self._open(single).keys()}  # noqa: SIM118
        elif storage.has_entry(index):
            self.origin = str(index)
            files = self._indexed(index)
        else:
            raise UserError(_why_no_weights(folder))
        self._files = files
        self.names = {name: name for name in files}

    def _open(self, path: pathlib.Path):
        if path not in self._handles:
            local = storage.local_copy(path)
            try:
                self._handles[path] = safetensors.safe_open(local, framework="numpy")
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{path} is not a readable safetensors file: {error}") from None
        return self._handles[path]

    def _indexed(self, index: pathlib.Path) -> dict[str, pathlib.Path]:
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} is not an index of safetensors files: it has no weight_map")
        files = {}
        for name, file in weight_map.items():
            plain = isinstance(file, str) and pathlib.PurePath(file).name == file
            if not plain or not file.endswith(".safetensors") or not file.isprintable():
                raise UserError(
                    f"{index}: {printable(name)} is said to be in {file!r:.80}, which is not the "
                    "name of a .safetensors file beside it"
                )
            path = index.parent / file
            if not path.is_file():
                raise UserError(
                    f"{path} is missing: {index.name} says that it holds {printable(name)}"
                )
            if name not in self._open(path).keys():  # noqa: SIM118
                raise UserError(f"{path} does not hold {printable(name)}, as {index.name} says")
            files[name] = path
        return files

    def drop_prefix(self, prefixes: Iterable[str], landmark: str) -> None:
        """Drops the first prefix with which `landmark` is in the file from all names that have it.

        Wrappers put their encoder under a name of their own (`bert.`, `roberta.`, `trunk.`).
        """
        prefix = next((p for p in prefixes if p + landmark in self._files), "")
        self.rename(lambda name: name.removeprefix(prefix))

    def rename(self, change) -> None:
        self.names = {change(name): file_name for name, file_name in self.names.items()}

    def discard(self, name: str) -> None:
        del self.names[name]

    def shape(self, name: str) -> tuple[int, ...]:
        file_name = self.names[name]
        return tuple(self._open(self._files[file_name]).get_slice(file_name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """float32 values. Raises `UserError` for another kind of number and for NaN or infinity."""
        file_name = self.names[name]
        path = self._files[file_name]
        kind = self._open(path).get_slice(file_name).get_dtype()
        if kind not in DTYPES:
            raise UserError(f"{path}: {file_name} is of type {kind}; weights must be floats")
        try:
            array = np.asarray(self._open(path).get_tensor(file_name))
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: {file_name} cannot be read: {error}") from None
        if array.dtype != DTYPES[kind]:  # safetensors hands out bfloat16 as raw 16-bit words
            array = array.view(DTYPES[kind])
        array = array.astype(np.float32, copy=False)
        if not all_finite(array):
            bad = np.unravel_index(int(np.argmin(np.isfinite(array))), array.shape)
            raise UserError(
                f"{path}: {file_name} holds {array[bad]} at {[int(i) for i in bad]}: the weights "
                "are damaged, or training diverged"
            )
        return array


def _why_no_weights(folder: pathlib.Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if not pickles:
        return f"{folder} holds no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}"
    return (
        f"{folder}/{pickles[0]} is a pickle file, which can run code when it is read, and is never "
        f"opened here: save the model as {WEIGHTS_FILE} first (in transformers: "
        "model.save_pretrained(folder, safe_serialization=True))"
    )
