"""Exact search against a NumPy oracle, on one device and on eight fake ones."""

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.forked import run_forked

from moe_embed_jax.mesh import MeshConfig, make_mesh
from moe_embed_jax.search import cpu, knn, rounded
from moe_embed_jax.search.knn import top_k


def oracle(query_BD, document_ND, k):
    """All scores, then a stable sort: equal scores stay in index order."""
    score_BN = query_BD.astype(np.float64) @ document_ND.astype(np.float64).T
    index_Bk = np.argsort(-score_BN, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(score_BN, index_Bk, axis=1), index_Bk


def whole_numbers(count, width=8, seed=0):
    """Small integers: scores are exact in float32 and full of ties."""
    return np.random.default_rng(seed).integers(-2, 3, (count, width)).astype(np.float32)


def check_against_oracle(mesh):
    check_loads(mesh)
    for B, N, k, block in [
        (1, 1, 1, 8192),
        (3, 7, 10, 8192),  # k > N
        (70, 300, 100, 8192),
        (5, 1000, 400, 64),  # k > block
        (9, 2500, 7, 256),
        (1100, 513, 101, 8192),  # more than one block of queries
        (4, 9, 9, 1),
    ]:
        query_BD, document_ND = whole_numbers(B, seed=B), whole_numbers(N, seed=N + 1)
        score_Bk, index_Bk = top_k(query_BD, document_ND, k, mesh, block=block)
        expected_score, expected_index = oracle(query_BD, document_ND, k)
        assert score_Bk.dtype == np.float32 and index_Bk.dtype == np.int32
        assert score_Bk.shape == index_Bk.shape == (B, min(k, N))
        np.testing.assert_array_equal(score_Bk, expected_score)
        np.testing.assert_array_equal(index_Bk, expected_index)


def check_loads(mesh):
    """Documents that come in several loads; real numbers, to the last index."""
    rng = np.random.default_rng(5)
    query_BD, document_ND = rng.normal(size=(33, 24)), rng.normal(size=(5000, 24))
    expected_score, expected_index = oracle(query_BD, document_ND, 40)
    for block, load in [(256, 300), (8192, None)]:
        score_Bk, index_Bk = top_k(query_BD, document_ND, 40, mesh, block, load)
        np.testing.assert_allclose(score_Bk, expected_score, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(index_Bk, expected_index)
    query_BD, document_ND = whole_numbers(33), whole_numbers(3000, seed=1)
    _, expected_index = oracle(query_BD, document_ND, 40)
    for block, load in [(64, 64), (1, 50)]:
        _, index_Bk = top_k(query_BD, document_ND, 40, mesh, block, load)
        np.testing.assert_array_equal(index_Bk, expected_index)


@pytest.fixture(params=["of CPUs", "of other devices"])
def walk(request, monkeypatch):
    """Both walks over the documents, whatever this machine has."""
    if request.param == "of other devices":
        monkeypatch.setattr(knn, "runs_on_cpu", lambda mesh: False)


def test_equals_oracle_with_ties(walk):
    check_against_oracle(None)


def adversarial():
    """Orders of documents in which a shortcut would miss neighbours: name -> scores [N]."""
    N = 4096
    rising = np.arange(N, dtype=np.float32)
    rng = np.random.default_rng(0)
    peaks = np.zeros(N, np.float32)
    peaks[rng.choice(N, 60, replace=False)] = 1  # single peaks, in more groups than `FEW`
    cluster = np.zeros(N, np.float32)
    cluster[2000:2100] = rng.permutation(100) + 1  # all neighbours side by side
    steps = np.zeros(N, np.float32)
    steps[:16] = steps[160:176] = 1
    steps[175] = 2  # a neighbourhood with a higher peak, behind one with equal scores
    late = rng.normal(size=N).astype(np.float32)
    late[-70:] += 100
    return {
        "rising": rising,
        "falling": -rising,
        "equal": np.ones(N, np.float32),
        "few values": rng.integers(0, 3, N).astype(np.float32),
        "peaks": peaks,
        "cluster": cluster,
        "steps": steps,
        "late": late,
        "sawtooth": rising % 97,
        "all negative": -1 - rng.random(N).astype(np.float32),
    }


@pytest.mark.parametrize("name", adversarial())
def test_equals_oracle_whatever_the_order(name, walk):
    document_ND = adversarial()[name][:, None]
    query_BD = np.array([[1.0], [-1.0], [0.0], [0.5]], np.float32)
    for k, block, load in [(50, 512, 1024), (1, 256, 8192), (600, 512, 2048), (40, 8192, None)]:
        score_Bk, index_Bk = top_k(query_BD, document_ND, k, block=block, load=load)
        expected_score, expected_index = oracle(query_BD, document_ND, k)
        np.testing.assert_array_equal(index_Bk, expected_index)
        np.testing.assert_array_equal(score_Bk, expected_score)


class Watched:
    """Documents that are not in memory: counts how often each row is read."""

    def __init__(self, x_ND):
        self.x_ND, self.shape, self.reads = x_ND, x_ND.shape, np.zeros(len(x_ND), int)

    def __getitem__(self, rows):
        self.reads[rows] += 1
        return self.x_ND[rows]


def test_documents_are_read_once_in_slices():
    documents = Watched(whole_numbers(1000))
    found = top_k(whole_numbers(2100, seed=3), documents, 5, block=64, load=256)
    expected = top_k(whole_numbers(2100, seed=3), documents.x_ND, 5)
    np.testing.assert_array_equal(found[1], expected[1])
    assert (documents.reads == 1).all()


def test_a_failing_read_is_raised():
    class Broken(Watched):
        def __getitem__(self, rows):
            if rows.start > 0:
                raise OSError("disk gone")
            return super().__getitem__(rows)

    with pytest.raises(OSError, match="disk gone"):
        top_k(whole_numbers(3), Broken(whole_numbers(1000)), 5, block=64, load=256)


def test_half_precision_documents_are_scored_in_float32(walk):
    document_ND = np.random.default_rng(0).normal(size=(300, 8)).astype(ml_dtypes.bfloat16)
    query_BD = np.random.default_rng(1).normal(size=(5, 8))
    score_Bk, index_Bk = top_k(query_BD, document_ND, 7)
    expected_score, expected_index = oracle(query_BD, document_ND, 7)
    np.testing.assert_allclose(score_Bk, expected_score, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(index_Bk, expected_index)


def test_recall_is_approximate_on_tpus_only():
    query_BD, document_ND = whole_numbers(20), whole_numbers(2000, seed=1)
    found = top_k(query_BD, document_ND, 9, block=256, load=512, recall=0.9)
    np.testing.assert_array_equal(found[0], oracle(query_BD, document_ND, 9)[0])
    jaxpr = str(
        jax.make_jaxpr(lambda *x: knn.search(*x, 256, 0.9, knn.single_device_mesh()))(
            query_BD, document_ND[:256], 0, 2000, knn.empty_top_k(20, 9)
        )
    )
    assert "approx_top_k" in jaxpr and "recall_target=0.9" in jaxpr


def test_equals_oracle_on_real_numbers(walk):
    rng = np.random.default_rng(0)
    query_BD, document_ND = rng.normal(size=(20, 96)), rng.normal(size=(3000, 96))
    score_Bk, index_Bk = top_k(query_BD, document_ND, 50, block=512)
    expected_score, expected_index = oracle(query_BD, document_ND, 50)
    np.testing.assert_allclose(score_Bk, expected_score, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(index_Bk, expected_index)


def test_ties_take_the_lowest_index_across_blocks(walk):
    _, index_Bk = top_k(np.ones((2, 4)), np.ones((1000, 4)), 300, block=64)
    np.testing.assert_array_equal(index_Bk, np.tile(np.arange(300), (2, 1)))


def test_negative_scores_are_not_displaced_by_padding(walk):
    score_Bk, index_Bk = top_k(-np.ones((1, 4)), np.ones((5, 4)), 100)
    np.testing.assert_array_equal(index_Bk, [[0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(score_Bk, np.full((1, 5), -4.0))


def test_overflowing_scores_are_not_displaced_by_padding(walk):
    huge = np.full((3, 4), 1e30, np.float32)
    _, index_Bk = top_k(-huge[:1], huge, 3)
    np.testing.assert_array_equal(index_Bk, [[0, 1, 2]])


@pytest.mark.parametrize(("B", "N"), [(0, 5), (5, 0), (0, 0)])
def test_empty(B, N):
    score_Bk, index_Bk = top_k(np.zeros((B, 4)), np.zeros((N, 4)), 3)
    assert score_Bk.shape == index_Bk.shape == (B, min(3, N))


def test_many_small_sets_share_compilations():
    functions = (rounded._converted, rounded._sizes, cpu._products, cpu._peaks)
    before = [function._cache_size() for function in functions]
    for N in range(90, 1000, 45):
        top_k(whole_numbers(N % 200 + 1, 16), whole_numbers(N, 16), 101)
    for function, count in zip(functions, before, strict=True):
        assert function._cache_size() - count <= 4, function


@pytest.mark.parametrize(
    ("query_shape", "document_shape", "k", "message"),
    [
        ((2, 3), (2, 4), 1, r"queries \(2, 3\) and documents \(2, 4\)"),
        ((3,), (2, 3), 1, r"query array must be \[count, width\], got shape \(3,\)"),
        ((2, 3), (2, 3), 0, "k=0"),
    ],
)
def test_refuses(query_shape, document_shape, k, message):
    with pytest.raises(ValueError, match=message):
        top_k(np.zeros(query_shape), np.zeros(document_shape), k)


@pytest.mark.parametrize("recall", [0.0, 1.0, -0.5])
def test_refuses_a_recall_that_is_no_share(recall):
    with pytest.raises(ValueError, match=f"recall={recall} must be between 0 and 1"):
        top_k(np.zeros((2, 3)), np.zeros((2, 3)), 1, recall=recall)


def test_refuses_values_that_are_not_finite():
    document_ND = np.zeros((4, 3))
    document_ND[2, 1] = np.nan
    with pytest.raises(ValueError, match="document 2 holds a value that is not finite"):
        top_k(np.zeros((1, 3)), document_ND, 1)


def test_eight_devices():
    result = run_forked([__file__], devices=8, timeout=120)
    assert result.returncode == 0, result.stderr


if __name__ == "__main__":
    assert jax.device_count() == 8
    check_loads(make_mesh(MeshConfig()))
    knn.runs_on_cpu = lambda mesh: False
    check_against_oracle(make_mesh(MeshConfig()))
    check_loads(make_mesh(MeshConfig(data=2, fsdp=2, expert=2)))
