"""Which experts texts take: counts against NumPy routing, information against its definition."""

import dataclasses
import math
import sys

import jax
import numpy as np
import pytest
from helpers import published_models
from helpers.forked import run_forked
from helpers.labelled_model import CONFIG, labelled, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from moe_embed_jax.embedder import Embedder
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation import expert_use
from moe_embed_jax.evaluation.expert_use import (
    count_choices,
    inspect_routing,
    most_information,
    mutual_information,
    shuffled_information,
    sum_by_label,
)
from moe_embed_jax.evaluation.labelled_texts import LabelledText
from moe_embed_jax.evaluation.routing_report import pictures, tables, write_report
from moe_embed_jax.mesh import MeshConfig, make_mesh

LAYERS, EXPERTS, CHOICES = 2, 4, 2


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("published") / "model", data_dir)


@pytest.fixture(scope="module")
def embedder(folder):
    return Embedder.load(folder)


@pytest.fixture(scope="module")
def counts_NMKE(embedder):
    return count_choices(embedder, [text.text for text in labelled()], "document")


@pytest.fixture(scope="module")
def report(embedder):
    return inspect_routing(embedder, labelled(), shuffles=20)


# ---- Information ---------------------------------------------------------------------------------


def entropy(weight) -> float:
    share = np.ravel(weight) / np.sum(weight)
    return -sum(p * math.log2(p) for p in share if p > 0)


@given(
    st_numpy.arrays(np.int64, st.tuples(*[st.integers(1, 5)] * 3), elements=st.integers(0, 50)),
    st.randoms(),
)
@settings(deadline=None, max_examples=60)
def test_information_is_what_its_definition_says(counts_AME, random):
    counts_AME = counts_AME + (counts_AME.sum(axis=(0, 2), keepdims=True) == 0)  # no empty layer
    found_M = mutual_information(counts_AME)
    for layer, found in enumerate(found_M):
        joint_AE = counts_AME[:, layer]
        apart = entropy(joint_AE.sum(axis=0)), entropy(joint_AE.sum(axis=1))
        assert found == pytest.approx(sum(apart) - entropy(joint_AE), abs=1e-9)
        assert 0 <= found <= min(apart) + 1e-9
    order = list(range(len(counts_AME)))
    random.shuffle(order)
    np.testing.assert_allclose(mutual_information(counts_AME[order] * 3), found_M, atol=1e-9)


def test_an_expert_for_each_language():
    for languages in (2, 3, 8):
        counts_AME = 7 * np.eye(8, dtype=np.int64)[:languages, None]
        assert mutual_information(counts_AME) == pytest.approx([math.log2(languages)])
        assert most_information(counts_AME.sum(axis=(1, 2)), 8, 1) == pytest.approx(
            math.log2(languages)
        )


def test_languages_count_as_often_as_they_are():
    """Two experts, and a language of 3/4 of the tokens with an expert of its own."""
    counts_AME = np.array([[[300, 0]], [[0, 100]]])
    assert mutual_information(counts_AME) == pytest.approx([0.811278], abs=1e-6)


@given(st.integers(1, 6), st.integers(0, 10), st.integers(1, 5), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_choices_of_a_token_bound_the_information(choices, more, languages, seed):
    """Random sets of K different experts, any of which may be a language's favourites."""
    rng = np.random.default_rng(seed)
    experts = choices + more
    counts_AME = np.zeros((languages, 1, experts), np.int64)
    for language in range(languages):
        taste_E = rng.exponential(size=experts) * 3
        for _ in range(rng.integers(1, 9)):
            token_E = np.argsort(rng.random(experts) - taste_E)[:choices]
            counts_AME[language, 0, token_E] += 1
    most = most_information(counts_AME.sum(axis=(1, 2)), experts, choices)
    assert mutual_information(counts_AME)[0] <= most + 1e-9


def test_languages_of_disjoint_pairs_reach_the_bound():
    counts_AME = np.kron(np.eye(4, dtype=np.int64), [5, 5])[:, None]
    assert mutual_information(counts_AME) == pytest.approx([2])
    assert most_information(counts_AME.sum(axis=(1, 2)), 8, 2) == pytest.approx(2)


def texts_of_their_own(rng, count: int) -> np.ndarray:
    """Counts of texts each of which has experts that it likes, whatever its labels."""
    share_NE = rng.dirichlet([0.3] * 8, count)
    return np.array([rng.multinomial(40, share) for share in share_NE])[:, None]


def test_independent_labels_stay_within_the_shuffled_ones():
    """The tokens of a text are alike, so that few texts tell much by chance alone; a baseline that
    shuffles tokens would take it for specialisation."""
    rng = np.random.default_rng(0)
    counts_NME, label_N = texts_of_their_own(rng, 60), rng.permutation(60) % 4
    bits = mutual_information(sum_by_label(counts_NME, label_N, 4))
    shuffled = shuffled_information(counts_NME, label_N, np.arange(60), 300, seed=1)
    assert shuffled.shape == (300, 1)
    assert np.quantile(shuffled, 0.01) < bits < np.quantile(shuffled, 0.99)
    expert_T = np.repeat(np.tile(np.arange(8), 60), counts_NME.reshape(-1))
    tokens = np.eye(8, dtype=np.int64)[expert_T][:, None]
    label_T = np.repeat(label_N, 40)
    of_tokens = shuffled_information(tokens, label_T, np.arange(len(tokens)), 20, seed=1)
    assert bits > 5 * of_tokens.max()
    assert shuffled.mean() > 5 * of_tokens.max()


def test_translations_keep_their_topic_together():
    """Ten languages of 30 sentences: as far as topics go that is 30 texts, not 300. Topics without
    any meaning are found significant as often as the level says, and always if shuffled by text."""
    sentence_N, topic_N = np.tile(np.arange(30), 10), np.tile(np.arange(30) % 3, 10)
    as_extreme = []
    for seed in range(20):
        counts_NME = np.tile(texts_of_their_own(np.random.default_rng(seed), 30), (10, 1, 1))
        bits = mutual_information(sum_by_label(counts_NME, topic_N, 3))
        together = shuffled_information(counts_NME, topic_N, sentence_N, 40, seed)
        apart = shuffled_information(counts_NME, topic_N, np.arange(300), 40, seed)
        assert bits > apart.max()
        as_extreme.append((together >= bits).mean())
    assert 0.3 < np.mean(as_extreme) < 0.7
    assert np.mean(np.array(as_extreme) < 0.1) < 0.25


def test_shuffles_depend_on_the_seed_alone():
    rng = np.random.default_rng(4)
    arguments = texts_of_their_own(rng, 12), np.arange(12) % 3, np.arange(12), 5
    one, two, other = (shuffled_information(*arguments, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


# ---- Counts --------------------------------------------------------------------------------------


def test_counts_are_those_of_a_router_in_numpy(folder, embedder, counts_NMKE):
    tensors = published_models.random_tensors(published_models.nomic_shapes(CONFIG))
    texts = [text.text for text in labelled()]
    chosen = embedder.expert_choices(texts, "document")
    sequences = embedder.tokenize(texts, "document")
    assert len({len(s) for s in sequences}) > 8
    for ids, expert_MTK, counts_MKE in zip(sequences, chosen, counts_NMKE, strict=True):
        _, expected = published_models.nomic_forward(CONFIG, tensors, ids)
        np.testing.assert_array_equal(expert_MTK, np.array(expected))
        assert counts_MKE.shape == (LAYERS, CHOICES, EXPERTS)
        assert (counts_MKE.sum(axis=2) == len(ids)).all()
        for layer, best_TK in enumerate(expected):
            for k in range(CHOICES):
                expected_E = np.bincount(best_TK[:, k], minlength=EXPERTS)
                np.testing.assert_array_equal(counts_MKE[layer, k], expected_E)


def test_neither_packing_nor_chunks_nor_remat_matter(embedder, counts_NMKE, monkeypatch):
    texts = [text.text for text in labelled()]
    for i in (0, 11):
        alone = count_choices(embedder, [texts[i]], "document")
        np.testing.assert_array_equal(alone[0], counts_NMKE[i])
    monkeypatch.setattr(expert_use, "TEXTS_AT_ONCE", 7)
    np.testing.assert_array_equal(count_choices(embedder, texts, "document"), counts_NMKE)
    pieces = Embedder(
        dataclasses.replace(embedder.model, remat_rows=2),
        embedder.params,
        embedder.vocabulary,
        embedder.max_lengths,
        embedder.mesh,
        embedder.prompts,
    )
    np.testing.assert_array_equal(count_choices(pieces, texts, "document"), counts_NMKE)


def test_counts_add_up_to_the_shares_of_the_batch(embedder, counts_NMKE):
    expected_ME = embedder.expert_shares([text.text for text in labelled()])
    assigned_ME = counts_NMKE.sum(axis=(0, 2))
    share_ME = assigned_ME / assigned_ME.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(share_ME, expected_ME, atol=1e-6)


def test_no_texts(embedder):
    assert count_choices(embedder, [], None).shape == (0, LAYERS, CHOICES, EXPERTS)
    assert embedder.expert_choices([]) == []


def test_eight_devices_equal_one(folder, counts_NMKE, tmp_path):
    np.save(tmp_path / "counts.npy", counts_NMKE)
    result = run_forked([__file__, folder, tmp_path / "counts.npy"], devices=8, timeout=300)
    assert result.returncode == 0, result.stderr


def check_on_eight_devices(folder: str, expected: str) -> None:
    assert jax.device_count() == 8
    texts = [text.text for text in labelled()]
    for config in (MeshConfig(), MeshConfig(data=2, fsdp=2, expert=2)):
        embedder = Embedder.load(folder, mesh=make_mesh(config))
        np.testing.assert_array_equal(
            count_choices(embedder, texts, "document"), np.load(expected), err_msg=str(config)
        )


# ---- The report ----------------------------------------------------------------------------------


def test_the_report_counts_everything_once(report, counts_NMKE, embedder):
    tokens = sum(map(len, embedder.tokenize([t.text for t in labelled()], "document")))
    assert report["tokens"] == tokens and report["texts"] == 24
    assert report["moe_layers"] == [1, 3] and report["prefix"] == "search_document: "
    for label, names in (("language", ["aa", "bb"]), ("topic", [f"topic {i}" for i in range(3)])):
        groups = report[label]["groups"]
        assert list(groups) == names
        assert sum(group["tokens"] for group in groups.values()) == tokens
        assert sum(group["texts"] for group in groups.values()) == 24
    load_E = counts_NMKE[:12].sum(axis=(0, 2))[1] / counts_NMKE[:12].sum(axis=(0, 2))[1].sum() * 4
    layer = report["language"]["groups"]["aa"]["layers"][1]
    assert (layer["load_max"], layer["load_min"]) == pytest.approx((load_E.max(), load_E.min()))
    np.testing.assert_allclose(layer["share"], load_E / 4)
    assert math.log2(layer["effective_experts"]) == pytest.approx(entropy(load_E))


@pytest.mark.parametrize("label", ["language", "topic"])
def test_the_report_compares_with_shuffled_labels(report, counts_NMKE, label):
    of_text = [getattr(text, label) for text in labelled()]
    names = sorted(set(of_text))
    label_N = np.array([names.index(name) for name in of_text])
    # Topics move from sentence to sentence, in both languages at once.
    unit_N = np.arange(24) if label == "language" else np.tile(np.arange(12), 2)
    for first in (False, True):
        counts_NME = counts_NMKE[:, :, 0] if first else counts_NMKE.sum(axis=2)
        bits_M = mutual_information(sum_by_label(counts_NME, label_N, len(names)))
        shuffled_SM = shuffled_information(counts_NME, label_N, unit_N, 20, seed=0)
        for m, layer in enumerate(report[label]["information"]):
            found = layer["first_choice"] if first else layer
            shuffled_S = shuffled_SM[:, m]
            assert found["bits"] == pytest.approx(bits_M[m])
            assert found["shuffled_mean"] == pytest.approx(shuffled_S.mean())
            assert found["shuffled_max"] == pytest.approx(shuffled_S.max())
            assert found["above_shuffled"] == pytest.approx(bits_M[m] - shuffled_S.mean())
            assert found["p"] == pytest.approx((1 + (shuffled_S >= bits_M[m]).sum()) / 21)
            assert found["of_most"] == pytest.approx(found["bits"] / found["most_bits"])
            share_A = sum_by_label(counts_NME, label_N, len(names))[:, 0].sum(axis=1)
            limit = math.log2(EXPERTS / (1 if first else CHOICES))
            assert found["most_bits"] == pytest.approx(min(entropy(share_A), limit))


def test_routers_that_take_all_experts_can_tell_nothing(embedder):
    model = dataclasses.replace(embedder.model, experts_per_token=EXPERTS)
    arguments = embedder.params, embedder.vocabulary, embedder.max_lengths, embedder.mesh
    report = inspect_routing(Embedder(model, *arguments), labelled(4), shuffles=2)
    for layer in report["language"]["information"]:
        assert (layer["bits"], layer["most_bits"], layer["of_most"]) == (pytest.approx(0), 0, None)
        assert layer["first_choice"]["of_most"] is not None


def images(figure) -> list[np.ndarray]:
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


def test_pictures_have_a_cell_for_every_load(report):
    drawn = pictures(report)
    assert set(drawn) == {"by_language.png", "by_topic.png", "by_layer.png"}
    for label in ("language", "topic"):
        (image,) = images(drawn[f"by_{label}.png"])
        groups = report[label]["groups"]
        assert image.shape == (len(groups), LAYERS * EXPERTS)
        for row, group in zip(image, groups.values(), strict=True):
            loads = [EXPERTS * s for layer in group["layers"] for s in layer["share"]]
            np.testing.assert_allclose(row, loads)
        axes = drawn[f"by_{label}.png"].axes[0]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == list(groups)
    (image,) = images(drawn["by_layer.png"])
    expected = [[EXPERTS * s for s in layer["share"]] for layer in report["layers"]]
    np.testing.assert_allclose(image, expected)
    written = [text.get_text() for text in drawn["by_layer.png"].axes[0].texts]
    assert written == [f"{load:.2f}" for load in np.ravel(expected)]
    (bars,) = [axes for axes in drawn["by_layer.png"].axes if axes.patches]
    heights = [patch.get_height() for patch in bars.patches]
    names = "language", "topic"
    assert heights == [layer["bits"] for name in names for layer in report[name]["information"]]


def test_what_texts_do_not_say_is_left_out(embedder, tmp_path):
    texts = [dataclasses.replace(text, topic=None, id=None) for text in labelled(4)]
    report = inspect_routing(embedder, texts, None, shuffles=2)
    assert "topic" not in report and report["prefix"] == ""
    names = [path.name for path in write_report(tmp_path / "out", report)]
    assert names == ["routing.json", "routing.md", "by_language.png", "by_layer.png"]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert "By topic" not in tables(report) and "## By language" in tables(report)


def without(field: str, place: int) -> list[LabelledText]:
    texts = labelled(3)
    texts[place] = dataclasses.replace(texts[place], **{field: None})
    return texts


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no text says of which language or topic it is"),
        ([LabelledText("a", None, None, "1")] * 3, "no text says of which language or topic"),
        (labelled(3)[:3], "all 3 texts are of language 'aa': add texts of another one"),
        (without("language", 4), "1 of 6 texts have no language, the first is number 5"),
        (without("topic", 0), "1 of 6 texts have no topic, the first is number 1"),
        (
            [LabelledText("a", None, topic, "7") for topic in "xy"],
            "texts of id '7' are of topics 'x' and 'y'",
        ),
    ],
)
def test_texts_that_cannot_be_compared(embedder, texts, message):
    with pytest.raises(UserError, match=message):
        inspect_routing(embedder, texts)


def test_a_dense_model_is_refused(embedder):
    dense = Embedder(
        dataclasses.replace(embedder.model, moe_every=0),
        {},
        embedder.vocabulary,
        embedder.max_lengths,
        embedder.mesh,
    )
    for call in (
        lambda: inspect_routing(dense, labelled(2)),
        lambda: dense.expert_choices(["a"]),
        lambda: dense.expert_shares(["a"]),
    ):
        with pytest.raises(UserError, match=r"this model has no experts \(moe_every=0\)"):
            call()


if __name__ == "__main__":
    check_on_eight_devices(*sys.argv[1:])
