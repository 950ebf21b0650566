"""Exact search over vectors, and vectors on disk."""

from moe_embed_jax.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")  # of vectors on disk
FLOAT32, INT8, BINARY = FORMS = ("float32", "int8", "binary")  # of vectors in an index


def check_dtype(dtype: str) -> str:
    """`dtype`, if vectors are stored in it; `UserError` for others."""
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: choose one of {', '.join(DTYPES)}")
    return dtype
