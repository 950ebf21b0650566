"""Reads .npz files so that all damage is found.

NumPy checks the CRC-32 of an array when it has read the last of its bytes, and believes what stands
before them. A damaged shape may end the array early, and then nothing is checked.
"""

import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np

# What NumPy and zipfile say of a damaged file.
UNREADABLE = (
    *(ValueError, LookupError, EOFError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, SyntaxError, TokenError, MemoryError),
)


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of these names.

    Raises `OSError` where the file cannot be read, and `ValueError` where it is damaged, or lacks
    an array.
    """
    data = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            if (member := file.testzip()) is not None:
                raise ValueError(f"the CRC-32 of {member} differs")
        with np.load(io.BytesIO(data)) as arrays:
            found = {name: arrays[name] for name in names}
        for name, array in found.items():
            if not isinstance(array, np.ndarray):  # bytes, of a member whose size became 0
                raise ValueError(f"{name} is no array")
        return found
    except (*UNREADABLE, OSError) as error:  # OSError: of seeking in damaged archives
        raise ValueError(str(error) or repr(error)) from error
