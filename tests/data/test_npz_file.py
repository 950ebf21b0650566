"""Every damage of an .npz file is named, or changes nothing."""

import numpy as np
import pytest

from moe_embed_jax.data.npz_file import read_npz

ARRAYS = {"key": np.arange(5), "row": np.ones((2, 3), np.float32), "crc": np.uint32(7)}


@pytest.fixture
def path(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    return tmp_path / "a.npz"


def test_the_arrays_come_back(path):
    for name, array in read_npz(path, ["row", "key"]).items():
        np.testing.assert_array_equal(array, ARRAYS[name])
    with pytest.raises(ValueError, match="other"):
        read_npz(path, ["other"])
    with pytest.raises(FileNotFoundError):
        read_npz(path.with_name("no.npz"), ["key"])


@pytest.mark.parametrize("length", [1, 16, 48])
def test_zeros_and_flipped_bits_anywhere(path, length):
    """NumPy alone takes other shapes and values for some of these."""
    whole = path.read_bytes()
    named = 0
    for begin in range(0, len(whole), 3):
        for changed in (0, whole[begin] ^ 4):
            data = bytearray(whole)
            data[begin : begin + length] = bytes([changed]) * len(data[begin : begin + length])
            path.write_bytes(data)
            try:
                found = read_npz(path, list(ARRAYS))
            except ValueError as error:
                assert str(error)
                named += 1
            else:
                for name, array in found.items():
                    assert array.dtype == ARRAYS[name].dtype
                    np.testing.assert_array_equal(array, ARRAYS[name])
    assert named > len(whole) / 3


def test_a_shape_that_is_damaged_alone(path):
    """The header of an array then has the right length, and NumPy stops before the CRC-32."""
    np.savez(path, key=np.arange(50_000))
    data = path.read_bytes()
    assert data.count(b"'shape': (50000,)") == 1
    path.write_bytes(data.replace(b"'shape': (50000,)", b"'shape': (30000,)"))
    with np.load(path) as arrays:
        assert len(arrays["key"]) == 30_000  # NumPy alone
    with pytest.raises(ValueError, match=r"the CRC-32 of key\.npy differs"):
        read_npz(path, ["key"])
