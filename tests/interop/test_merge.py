"""Merging models: means, arcs, and experts that are the same in another order."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.forked import run_forked
from helpers.published_models import NOMIC, nomic_shapes, random_tensors, write_folder

from moe_embed_jax import Embedder, conversion
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.layers import by_layer, from_layers
from moe_embed_jax.interop.merge import EXPERT_AXIS, match_experts, merge, slerp
from moe_embed_jax.interop.merge_config import MergeConfig, split_step
from moe_embed_jax.interop.upcycle import UpcycleConfig, upcycle
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.model_folder import load_model, place, save_model
from moe_embed_jax.models.encoder import EncoderConfig, init_params

DENSE = NOMIC | dict(num_experts=0)


def shifted(arrays: dict, seed: int, size: float = 0.02) -> dict:
    """As after some training from the same start."""
    rng = np.random.default_rng(seed)
    return {
        path: array + size * array.std() * rng.standard_normal(array.shape).astype(np.float32)
        for path, array in arrays.items()
    }


def permuted(model: EncoderConfig, arrays: dict, orders: dict[int, list[int]]) -> dict:
    result = dict(arrays)
    for layer, order in orders.items():
        for name, axis in EXPERT_AXIS.items():
            path = f"layers/{layer}/moe/{name}"
            result[path] = np.take(arrays[path], order, axis)
    return result


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """(a model with experts that differ and have biases, its folder, another's of one start)."""
    folder = tmp_path_factory.mktemp("models")
    write_folder(folder / "dense", DENSE, random_tensors(nomic_shapes(DENSE)))
    loaded = load_model(folder / "dense", single_device_mesh())
    config = UpcycleConfig("preserving", num_experts=4, moe_every=1, noise=0.5)
    loaded.model, params = upcycle(loaded.model, loaded.params, config)
    arrays = by_layer(loaded.model, params)
    for name, each in (("a", arrays), ("b", shifted(arrays, 1)), ("c", shifted(arrays, 2))):
        save(loaded, each, folder / name)
    return loaded, arrays, folder


def save(loaded, arrays: dict, folder) -> None:
    params = from_layers(loaded.model, arrays.items())
    params = place(params, loaded.model, single_device_mesh())
    save_model(folder, dataclasses.replace(loaded, params=params), "test")


def embeddings(folder) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, 128, (5, 9))
    return Embedder.load(folder).encode_ids(ids, ids >= 0)


@pytest.mark.parametrize("method", ["average", "slerp"])
def test_a_model_merged_with_itself_or_with_its_experts_in_another_order(sparse, tmp_path, method):
    loaded, arrays, folder = sparse
    layers = loaded.model.moe_layers
    orders = {layer: np.roll([2, 0, 1, 3], layer).tolist() for layer in layers}
    save(loaded, permuted(loaded.model, arrays, orders), tmp_path / "other")
    for name, second in (("self", folder / "a"), ("permuted", tmp_path / "other")):
        config = MergeConfig(method)
        assert conversion.merge_models([str(folder / "a"), str(second)], tmp_path / name, config)
        merged = embeddings(tmp_path / name)
        np.testing.assert_allclose(merged, embeddings(folder / "a"), atol=1e-6, rtol=0)
    # Without matching, the mean of different experts is another model.
    config = MergeConfig(method, keep_expert_order=True)
    sources = [str(folder / "a"), str(tmp_path / "other")]
    conversion.merge_models(sources, tmp_path / "mixed", config)
    assert abs(embeddings(tmp_path / "mixed") - embeddings(folder / "a")).max() > 1e-3


def test_experts_are_matched_by_router_and_weights_after_training(sparse):
    loaded, arrays, _ = sparse
    orders = {0: [1, 3, 0, 2], 1: [0, 1, 2, 3]}
    other = permuted(loaded.model, shifted(arrays, 3, 0.3), orders)
    matched, found = match_experts(loaded.model, other, arrays)
    for layer, order in orders.items():
        # Expert e of the result was expert found[e]: that of `orders` that was made of e.
        np.testing.assert_array_equal(np.array(order)[found[layer]], np.arange(4))
    expected = shifted(arrays, 3, 0.3)
    for path in expected:
        np.testing.assert_array_equal(matched[path], expected[path])


def test_equal_experts_keep_their_order():
    """As after upcycling without noise: only the routers tell them apart, or nothing does."""
    model = EncoderConfig(
        vocab_size=16, num_layers=2, width=8, num_heads=2, ffn_width=8, num_experts=4
    )
    arrays = by_layer(model, init_params(model, jax.random.key(0)))
    arrays = {
        path: np.repeat(array[:1], len(array), axis=0) if "moe/w_" in path else array
        for path, array in arrays.items()
    }
    router = f"layers/{model.moe_layers[0]}/moe/router/kernel"
    same = dict(arrays) | {router: np.repeat(arrays[router][:, :1], 4, axis=1)}
    _, orders = match_experts(model, same, same)
    np.testing.assert_array_equal(orders[model.moe_layers[0]], np.arange(4))
    moved = dict(arrays) | {router: arrays[router][:, [3, 2, 1, 0]]}
    _, orders = match_experts(model, moved, arrays)
    np.testing.assert_array_equal(orders[model.moe_layers[0]], [3, 2, 1, 0])


def test_average_is_the_weighted_mean():
    models = [{"w": np.full((2, 3), value, np.float32)} for value in (1.0, 2.0, 6.0)]
    shares = MergeConfig(weights="1,2,1").shares(3)
    np.testing.assert_allclose(merge("average", models, shares)["w"], 2.75)


def test_slerp_is_at_the_point_of_the_second_share():
    models = [{"w": np.array([1.0, 0.0], np.float32)}, {"w": np.array([0.0, 1.0], np.float32)}]
    merged = merge("slerp", models, MergeConfig("slerp", "2,1").shares(2))
    np.testing.assert_allclose(merged["w"], [np.cos(np.pi / 6), np.sin(np.pi / 6)], atol=1e-7)


def test_slerp_keeps_the_length_and_turns_evenly():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4, 5)).astype(np.float32)
    b *= np.linalg.norm(a) / np.linalg.norm(b)
    angle = np.arccos(np.vdot(a, b) / np.vdot(a, a))
    for share in (0.0, 0.3, 1.0):
        c = slerp(a, b, share)
        assert np.linalg.norm(c) == pytest.approx(np.linalg.norm(a), rel=1e-6)
        assert np.arccos(min(np.vdot(a, c) / np.vdot(a, a), 1)) == pytest.approx(
            share * angle, abs=1e-3
        )
    np.testing.assert_array_equal(slerp(a * 0, b, 0.25), b * 0.25)  # no angle: a line


def test_three_models_with_weights_as_a_user_merges_them(sparse, tmp_path):
    loaded, arrays, folder = sparse
    sources = [f"--source={folder / name}" for name in ("a", "b@0", "c")]
    flags = ["launch/convert.py", "merge", *sources, f"--target={tmp_path / 'm'}"]
    result = run_forked([*flags, "--weights=2,1,1", "--dry_run"])
    assert result.returncode == 0 and "checked, nothing written" in result.stdout, result.stderr
    result = run_forked([*flags, "--weights=2,1,1"])
    assert result.returncode == 0, result.stderr
    assert f"0.500       {folder / 'a'}" in result.stdout
    assert "in the first model's order but for 0 layer(s)" in result.stdout
    parts = (arrays, shifted(arrays, 1), shifted(arrays, 2))
    expected = merge("average", list(parts), [0.5, 0.25, 0.25])
    merged = by_layer(loaded.model, load_model(tmp_path / "m", single_device_mesh()).params)
    for path in expected:
        np.testing.assert_array_equal(merged[path], expected[path])
    result = run_forked([*flags, "--weights=2,1,1"])
    assert result.returncode == 0 and "done before" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=A"], "merging needs two or more models"),
        (["--source=A", "--source=none"], "model folder none does not exist"),
        (["--source=A", "--source=A@7"], "has no such checkpoint, only 0"),
        (["--source=A", "--source=A", "--source=A", "--method=slerp"], "merges two models, not 3"),
        (["--source=A", "--source=A", "--method=ties"], "choose from average, slerp"),
        (["--source=A", "--source=A", "--weights=1,0"], "give 2 numbers above 0"),
        (["--source=A", "--source=A", "--weights=1"], "give 2 numbers above 0"),
        (["--source=A", "--source=DENSE"], "cannot be merged, they differ: model.expert_bias"),
    ],
)
def test_refusals_are_one_line(sparse, tmp_path, arguments, message):
    folder = sparse[2]
    names = {"--source=A": f"--source={folder}/a", "--source=DENSE": f"--source={folder}/dense"}
    names["--source=A@7"] = f"--source={folder}/a@7"
    arguments = [names.get(argument, argument) for argument in arguments]
    result = run_forked(["launch/convert.py", "merge", *arguments, f"--target={tmp_path / 'm'}"])
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "m").exists()


def test_a_model_merges_with_its_export(sparse, tmp_path):
    """The export has names for the same prefixes that the model itself has not."""
    folder = sparse[2]
    conversion.export_model(str(folder / "a"), tmp_path / "out")
    sources = [str(folder / "a"), str(tmp_path / "out")]
    assert conversion.merge_models(sources, tmp_path / "m", MergeConfig())
    np.testing.assert_allclose(embeddings(tmp_path / "m"), embeddings(folder / "a"), atol=1e-6)


def test_prompts_must_be_equal(sparse, tmp_path):
    loaded, arrays, folder = sparse
    save(
        dataclasses.replace(loaded, prompts={"query": "q: ", "document": ""}),
        arrays,
        tmp_path / "b",
    )
    with pytest.raises(
        UserError, match=r"differ: prompts.document: search_document: .*prompts.query"
    ):
        conversion.merge_models(
            [str(folder / "a"), str(tmp_path / "b")], tmp_path / "m", MergeConfig()
        )


def test_steps_of_runs_and_revisions_of_the_hub():
    assert split_step("runs/a@1200") == ("runs/a", 1200)
    assert split_step("runs/a") == ("runs/a", None)
    assert split_step("a@b") == ("a@b", None)
    assert split_step("hf://o/n@123") == ("hf://o/n@123", None)
