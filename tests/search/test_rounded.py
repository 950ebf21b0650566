"""The bound on products of rounded vectors: it holds, and it is not much too wide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed_jax.search import cpu
from moe_embed_jax.search.rounded import rounded


def off_and_bound(query_BD, document_nD, dtype):
    query, document = (rounded(jnp.asarray(x), dtype) for x in (query_BD, document_nD))
    assert query.x_ND.dtype == dtype
    product_Bn = np.asarray(cpu._product(query.x_ND, document.x_ND)).astype(np.float64)
    exact_Bn = query_BD.astype(np.float64) @ document_nD.T.astype(np.float64)
    slope_B1, size_B1 = (
        np.asarray(x_B, np.float64)[:, None] for x_B in (query.slope_N, query.size_N)
    )
    return abs(product_Bn - exact_Bn), slope_B1 * document.size_N + size_B1 * document.residue_N


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-18, 1.0, 1e15])
def test_bound_holds(scale, dtype):
    rng = np.random.default_rng(0)
    for D in (1, 7, 384):
        query_BD = rng.normal(size=(50, D)).astype(np.float32)
        # Between two numbers of bfloat16, all on one side: the error is as large as it gets.
        query_BD = query_BD if D == 7 else np.full_like(query_BD, 1 + 0.49 / 128)
        document_nD = (query_BD * rng.uniform(0.99, 1.01, (50, 1)) * scale).astype(np.float32)
        off_Bn, bound_Bn = off_and_bound(query_BD, document_nD, dtype)
        assert (off_Bn <= bound_Bn).all()
        if dtype == jnp.bfloat16 and scale == 1:
            assert off_Bn.max() > bound_Bn.max() / 4


def test_bound_of_unit_vectors_is_narrow():
    x_ND = np.random.default_rng(0).normal(size=(300, 384)).astype(np.float32)
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    _, bound_Bn = off_and_bound(x_ND[:50], x_ND, jnp.bfloat16)
    assert bound_Bn.max() < 0.005
    _, bound_Bn = off_and_bound(x_ND[:50], x_ND, jnp.float32)
    assert bound_Bn.max() < 2e-4


def test_too_large_vectors_have_no_bound():
    large = np.full((1, 4), 1e30, np.float32)
    _, bound_Bn = off_and_bound(np.ones((1, 4), np.float32), large, jnp.bfloat16)
    assert np.isinf(bound_Bn).all()


def test_inside_another_program_it_is_refused():
    """XLA would find a residue of 0."""
    with pytest.raises(TypeError, match="do not call it inside"):
        jax.jit(rounded, static_argnums=1)(np.ones((1, 4), np.float32), jnp.bfloat16)
