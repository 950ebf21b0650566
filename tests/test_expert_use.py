"""Which experts texts take: counts against a router in NumPy, information against its definition,
and launch/inspect_routing.py on published checkpoints.
"""

import dataclasses
import importlib.util
import json
import lzma
import math
import pathlib
import shutil
import sys

import jax
import numpy as np
import published_models
import pytest
import synthetic_data
from conftest import ROOT, SHARED, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from moe_embed_jax import launching
from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.data.labelled_texts import LabelledText, read_labelled, read_sib200
from moe_embed_jax.data.vocabulary import train_vocabulary
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
from moe_embed_jax.evaluation.routing_report import pictures, tables, write_report
from moe_embed_jax.mesh import MeshConfig, make_mesh

CONFIG = published_models.NOMIC | {"vocab_size": 512, "n_positions": 128}
LAYERS, EXPERTS, CHOICES = 2, 4, 2
FIXTURE = SHARED / "fixtures" / "nomic_moe_tiny"
SIB200 = SHARED / "data" / "sib200_flores"


def labelled(count: int = 12) -> list[LabelledText]:
    """Sentences of 3 topics, the same in two languages; of very different lengths."""
    texts = []
    for language in ("aa", "bb"):
        for i, text in enumerate(synthetic_data.documents(language, count, seed=3)):
            texts.append(LabelledText(text[: 9 + 23 * i], language, f"topic {i % 3}", str(i)))
    return texts


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    """A checkpoint in the published layout, with a tokenizer."""
    folder = tmp_path_factory.mktemp("published") / "model"
    tensors = published_models.random_tensors(published_models.nomic_shapes(CONFIG))
    published_models.write_folder(folder, CONFIG, tensors)
    vocabulary = vocabulary_path(synthetic_data.PREPARATION, data_dir)
    shutil.copy(vocabulary, folder / "sentencepiece.model")
    return folder


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
    result = run_python([__file__, folder, tmp_path / "counts.npy"], devices=8, timeout=300)
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


# ---- Reading texts, and the command --------------------------------------------------------------


def write_sib200(folder: pathlib.Path, languages=("aa", "bb", "cc"), count: int = 9):
    folder.mkdir()
    for language in languages:
        rows = ["index_id\tsplit\tcategory\ttext"]
        for i, text in enumerate(synthetic_data.documents(language, count, seed=5)):
            rows.append(f"{i}\ttrain\ttopic/{i % 3}\t{text[:60]}")
        content = lzma.compress(("\n".join(rows) + "\n").encode())
        (folder / f"{language}_Latn.tsv.xz").write_bytes(content)
    return folder


@pytest.fixture
def launch(monkeypatch, tmp_path, folder):
    """launch("--flag=value", ...) -> exit status of launch/inspect_routing.py, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    path = ROOT / "launch" / "inspect_routing.py"
    spec = importlib.util.spec_from_file_location("launch_inspect_routing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments, model=folder):
        flags = [f"--model={model}", "--output=out", "--shuffles=5", *arguments]
        monkeypatch.setattr(sys, "argv", [str(path), *flags])
        return launching.run(module.main)

    return run


def test_the_command_on_tables_of_sib200(launch, tmp_path, embedder, capsys):
    write_sib200(tmp_path / "sib")
    assert launch("--sib200=sib", "--languages=cc_Latn,aa_Latn", "--sentences=6") == 0
    printed = capsys.readouterr().out
    assert "I(expert; language)" in printed and "out: routing.json, routing.md," in printed
    found = json.loads((tmp_path / "out/routing.json").read_text())
    texts = read_sib200(tmp_path / "sib", ["aa_Latn", "cc_Latn"], 6)
    expected = inspect_routing(embedder, texts, shuffles=5)
    assert found["language"]["groups"]["cc_Latn"]["texts"] == 6
    assert list(found["topic"]["groups"]) == ["topic/0", "topic/1", "topic/2"]
    for label in ("language", "topic"):
        for one, other in zip(
            found[label]["information"], expected[label]["information"], strict=True
        ):
            assert one["bits"] == pytest.approx(other["bits"], abs=1e-6)
    for name in ("by_language.png", "by_topic.png", "by_layer.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out/routing.md").read_text()
    bits = found["language"]["information"][0]["bits"]
    assert f"| 1 | all | {bits:.4f} |" in page and "| cc_Latn | 6 |" in page


def test_the_command_on_json_lines(launch, tmp_path):
    rows = [{"text": t.text, "language": t.language} for t in labelled(5)]
    for name, part in (("a.jsonl", rows[:4]), ("b.jsonl", rows[4:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    assert launch("--texts=a.jsonl,b.jsonl", "--prompt=none") == 0
    found = json.loads((tmp_path / "out/routing.json").read_text())
    assert found["texts"] == 10 and found["prefix"] == "" and "topic" not in found
    assert not (tmp_path / "out/by_topic.png").exists()


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="needs the shared fixture nomic_moe_tiny")
def test_the_command_on_the_published_layout(launch, tmp_path):
    """It comes without a tokenizer: one that fits its 320 rows is put beside it."""
    model = tmp_path / "model"
    shutil.copytree(FIXTURE, model)
    texts = write_sib200(tmp_path / "sib")
    sentences = [text.text for text in read_sib200(texts)]
    train_vocabulary(sentences, model / "sentencepiece.model", 160)
    assert launch("--sib200=sib", model=model) == 0
    found = json.loads((tmp_path / "out/routing.json").read_text())
    assert (found["experts"], found["experts_per_token"], found["moe_layers"]) == (4, 2, [1, 3])
    assert sum(group["tokens"] for group in found["topic"]["groups"].values()) == found["tokens"]


@pytest.mark.skipif(not SIB200.is_dir(), reason="needs the shared data sib200_flores")
def test_the_real_tables_are_parallel():
    texts = read_sib200(SIB200, ["eng_Latn", "zho_Hans"])
    assert len(texts) == 2008 and len({text.topic for text in texts}) == 7
    assert [t.id for t in texts[:1004]] == [t.id for t in texts[1004:]]
    assert [t.topic for t in texts[:1004]] == [t.topic for t in texts[1004:]]


def test_labels_of_json_lines(tmp_path):
    rows = [
        {"text": "a", "language": "de", "topic": 3, "id": 7},
        {"text": "b", "language": None, "topic": ""},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_labelled([tmp_path / "t.jsonl"]) == [
        LabelledText("a", "de", "3", "7"),
        LabelledText("b", None, None, None),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "t.jsonl:2: bad JSON at column 2"),
        ('"text"', """t.jsonl:2: expected an object with "text", got 'text'"""),
        ('{"language": "de"}', "t.jsonl:2: field 'text' is missing"),
        ('{"text": "a", "language": ["de"]}', "t.jsonl:2: field 'language' must be a string"),
        ('{"text": "a", "topic": true}', "t.jsonl:2: field 'topic' must be a string, got True"),
    ],
)
def test_bad_lines(launch, tmp_path, capsys, line, message):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "language": "en"}\n' + line + "\n")
    assert launch("--texts=t.jsonl") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"index_id\ttext\n0\ta\n", "de.tsv:1: the header has no column category"),
        (b"index_id\tcategory\ttext\n0\tx\ta\n1\tx\n", "de.tsv:3: 2 columns, the header has 3"),
        (b"index_id\tcategory\ttext\n", "de.tsv: there is no text in this file"),
        (b"", "de.tsv: there is no text in this file"),
    ],
)
def test_broken_tables(tmp_path, content, message):
    (tmp_path / "de.tsv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_sib200(tmp_path)


def test_damaged_xz(tmp_path):
    path = write_sib200(tmp_path / "sib") / "aa_Latn.tsv.xz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"aa_Latn\.tsv\.xz:\d+: damaged \.xz file"):
        read_sib200(tmp_path / "sib")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --texts or --sib200"),
        (["--texts=a.jsonl", "--sib200=sib"], "give either --texts or --sib200"),
        (["--texts=gone.jsonl"], "gone.jsonl: cannot be read: No such file"),
        (["--texts=a.jsonl"], "a.jsonl: there is no text in this file"),
        (["--texts=a.jsonl", "--sentences=3"], "--sentences belongs to --sib200"),
        (["--sib200=gone"], "gone: no such folder"),
        (["--sib200=empty"], "empty holds no SIB-200 tables"),
        (["--sib200=sib", "--languages=aa_Cyrl"], "no language aa_Cyrl: did you mean aa_Latn?"),
        (["--sib200=sib", "--languages=zz"], "no language zz: it has aa_Latn, bb_Latn, cc_Latn (3"),
        (["--sib200=sib", "--languages=aa_Latn"], "all 9 texts are of language 'aa_Latn'"),
        (["--sib200=sib", "--sentences=0"], "--sentences=0 must be at least 1"),
        (["--sib200=sib", "--sentences=1"], "all 3 texts are of topic 'topic/0'"),
        (["--sib200=sib", "--shuffles=0"], "shuffles=0 must be at least 1"),
        (["--sib200=sib", "--prompt=both"], "prompt='both': choose one of"),
        (["--sib200=sib", "--output=sib"], "--output=sib exists"),
        (["--sib200=sib", "--model=empty"], "empty is not a model folder"),
    ],
)
def test_bad_flags(launch, tmp_path, capsys, arguments, message):
    write_sib200(tmp_path / "sib")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jsonl").touch()
    assert launch(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    check_on_eight_devices(*sys.argv[1:])
