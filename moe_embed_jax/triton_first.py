"""Imports triton, where it is installed, before TensorFlow can be imported.

PyTorch for CUDA brings triton, and imports it late: for example when transformers is imported.
If TensorFlow is in the process by then, the import of triton is a segmentation fault
(TensorFlow 2.21, triton 3.7); the other order works. So each module of this package that imports
TensorFlow, seqio or TFDS imports this one before (tests/preparation/test_import_order.py).
"""

import importlib.util
import sys

from moe_embed_jax.errors import UserError


def _can_be_imported() -> bool:
    return "triton" not in sys.modules and importlib.util.find_spec("triton") is not None


def before_torch() -> None:
    """To be called before PyTorch or a library on top of it is imported.

    Raises `UserError` where the import of triton would end the process.
    """
    if not _can_be_imported():
        return
    if "tensorflow" in sys.modules:
        raise UserError(
            "TensorFlow was imported before PyTorch, whose triton would now crash this process: "
            "write `import triton` before the first import of TensorFlow, seqio or TFDS"
        )
    import triton  # noqa: F401


if _can_be_imported() and "tensorflow" not in sys.modules:
    import triton  # noqa: F401
