"""Scores of the task families against oracles, and what their readers accept and refuse."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from helpers.evaluation_data import table, text_vectors, write, write_beir
from helpers.stand_in_teacher import StandInTeacher
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.bitext import Bitext, mining_scores
from moe_embed_jax.evaluation.cross_lingual import CrossLingual
from moe_embed_jax.evaluation.probe import Probe, fit_probe, probe_scores
from moe_embed_jax.evaluation.retrieval import evaluate_retrieval
from moe_embed_jax.evaluation.similarity import Similarity, correlations
from moe_embed_jax.evaluation.subsets import find_subsets


def units(seed: int, count: int, width: int = 8) -> np.ndarray:
    x_ND = np.random.default_rng(seed).normal(size=(count, width))
    return (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)).astype(np.float32)


def scores_of(task, root, cache, encoder=None, widths=(None,)):
    vectors = text_vectors(cache, encoder, widths)
    return {found.name: found.scores for found in task.evaluate(root, vectors, "task")}


# Similarity


def test_correlations():
    x_PD, y_PD, gold_P = (
        units(0, 50),
        units(1, 50),
        np.round(np.random.default_rng(2).random(50), 1),
    )
    cosine_P = np.array([x @ y for x, y in zip(x_PD, y_PD, strict=True)], np.float64)
    ranks = [scipy.stats.rankdata(values) for values in (cosine_P, gold_P)]  # ties share a rank
    assert correlations(x_PD, y_PD, gold_P) == {
        "cosine_spearman": pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-5),
        "cosine_pearson": pytest.approx(np.corrcoef(cosine_P, gold_P)[0, 1], abs=1e-5),
        "pairs": 50,
    }
    same = np.tile(units(0, 1), (50, 1))
    assert correlations(same, same, gold_P)["cosine_spearman"] == 0.0


STS_HEAD = ("score", "sentence1", "sentence2")


def test_similarity_of_pooled_files_at_two_widths(tmp_path):
    rows = [(5, "a b", "a b"), (2.5, 'a "b"', "a c"), (0, "x", "y")]
    write(tmp_path / "sts/2013.a.tsv.gz", table(*rows, header=STS_HEAD))
    write(tmp_path / "sts/2013.b.tsv.gz", table((3, "p q r", "p q s"), header=STS_HEAD))
    task = Similarity("sts/2013.*.tsv.gz", languages="en")
    encoder = StandInTeacher()
    found = scores_of(task, tmp_path, tmp_path / "v", encoder, (None, 4))["default"]
    assert found[None] != found[4] and found[None]["pairs"] == 4
    assert found[None]["cosine_spearman"] == pytest.approx(1.0)
    assert encoder.texts == 7  # "a b" once


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table((1, "a"), header=("score", "sentence1")), "tsv:1: column 'sentence2' is missing"),
        (table((1, "a", "b"), ("?", "c", "d"), header=STS_HEAD), "tsv:3: column 'score' must be a"),
        (table((1, "a", "b"), ("nan", "c", "d"), header=STS_HEAD), "tsv:3: column 'score' must be"),
        (table((1, "a", "b"), (1, "c"), header=STS_HEAD), "tsv:3: expected 3 fields .* got 2"),
        (table((1, "a", "b"), (1, "c", "d"), header=STS_HEAD), "all pairs have the same score"),
        (table(header=STS_HEAD), "tsv: empty file, expected lines of score, sentence1, sentence2"),
    ],
)
def test_similarity_refuses(tmp_path, content, message):
    write(tmp_path / "de.tsv", content)
    with pytest.raises(UserError, match=message):
        scores_of(Similarity("{subset}.tsv"), tmp_path, tmp_path / "v")


def test_a_damaged_xz_names_its_line(tmp_path):
    path = write(
        tmp_path / "de.tsv.xz", table(*[(n, "a", "b") for n in range(99)], header=STS_HEAD)
    )
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"de.tsv.xz:\d+: damaged .xz file"):
        scores_of(Similarity("{subset}.tsv.xz"), tmp_path, tmp_path / "v")


# Bitext mining


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_mining_scores_are_those_of_mteb(seed, count):
    x_PD, y_PD = units(seed, count, 3), units(seed + 1, count, 3)
    found_P = (x_PD @ y_PD.T).argmax(axis=1)
    label_P = np.arange(count)
    options = {"average": "weighted", "zero_division": 0}
    assert mining_scores(x_PD, y_PD) == {
        "f1": pytest.approx(sklearn.metrics.f1_score(label_P, found_P, **options)),
        "precision": pytest.approx(sklearn.metrics.precision_score(label_P, found_P, **options)),
        "recall": pytest.approx(sklearn.metrics.recall_score(label_P, found_P, **options)),
        "accuracy": pytest.approx(np.mean(label_P == found_P)),
        "pairs": count,
    }


def test_equal_sentences_are_rows_of_their_own():
    x_PD = np.tile(units(0, 1), (4, 1))
    found = mining_scores(x_PD, x_PD)  # all find the first row
    assert found["accuracy"] == 0.25 and found["f1"] == pytest.approx(0.25 * 2 * 0.25 / 1.25)


def test_layout_table(tmp_path):
    rows = [("fra", "un", "one"), ("deu", "zwei x", "two x"), ("fra", "deux b", "two b")]
    rows += [("deu", "drei y", "three y")]
    write(tmp_path / "t.tsv.xz", table(*rows, header=("lang", "sentence", "eng")))
    encoder = StandInTeacher()
    found = scores_of(Bitext("t.tsv.xz", "table", "eng"), tmp_path, tmp_path / "v", encoder)
    assert [*found] == ["fra-eng", "deu-eng"] and encoder.texts == 8
    assert found["deu-eng"][None]["accuracy"] == 1.0  # "x" and "y" are the same words
    chosen = Bitext("t.tsv.xz", "table", "eng", languages=["deu"])
    assert [*scores_of(chosen, tmp_path, tmp_path / "v", encoder)] == ["deu-eng"]
    assert encoder.texts == 8
    with pytest.raises(UserError, match=r"t.tsv.xz: nothing is in language 'ita'"):
        missing = Bitext("t.tsv.xz", "table", "eng", languages=["ita"])
        scores_of(missing, tmp_path, tmp_path / "v")
    with pytest.raises(UserError, match=r"t.tsv.xz:1: column 'spa' is missing"):
        scores_of(Bitext("t.tsv.xz", "table", "spa"), tmp_path, tmp_path / "v")


def test_layout_aligned(tmp_path):
    head = ("index_id", "split", "text")
    write(tmp_path / "eng_Latn.tsv.xz", table((1, "x", "eins"), (0, "x", "null"), header=head))
    write(tmp_path / "deu_Latn.tsv.xz", table((0, "x", "null"), (1, "x", "eins"), header=head))
    write(tmp_path / "fra_Latn.tsv.xz", table((0, "x", "eins"), (1, "x", "null"), header=head))
    task = Bitext("{subset}.tsv.xz", "aligned", "eng_Latn")
    found = scores_of(task, tmp_path, tmp_path / "v")
    assert found["deu_Latn-eng_Latn"][None]["accuracy"] == 1.0  # by id, not by line
    assert found["fra_Latn-eng_Latn"][None]["accuracy"] == 0.0
    chosen = Bitext("{subset}.tsv.xz", "aligned", "eng_Latn", languages=["fra_Latn"])
    assert [*scores_of(chosen, tmp_path, tmp_path / "v")] == ["fra_Latn-eng_Latn"]
    write(tmp_path / "fra_Latn.tsv.xz", table((0, "x", "a"), (0, "x", "b"), header=head))
    with pytest.raises(UserError, match=r"fra_Latn.tsv.xz:3: column 'index_id' repeats '0'"):
        scores_of(chosen, tmp_path, tmp_path / "v")
    write(tmp_path / "fra_Latn.tsv.xz", table((7, "x", "a"), header=head))
    with pytest.raises(UserError, match="fra_Latn and eng_Latn have no id in common"):
        scores_of(chosen, tmp_path, tmp_path / "v")


def test_layout_columns_without_repeats(tmp_path):
    rows = [("a", "a"), ("a", "b"), ("c", "c"), ("d", "c"), ("e", "e")]
    write(tmp_path / "en-es.tsv.xz", table(*rows))
    for unique, pairs in {False: 5, True: 3}.items():
        task = Bitext("{subset}.tsv.xz", "columns", languages=["en-es"], unique=unique)
        found = scores_of(task, tmp_path, tmp_path / "v")["en-es"][None]
        assert found["pairs"] == pairs and (found["accuracy"] == 1.0) is unique


def test_the_first_pairs_of_a_bitext(tmp_path):
    write(tmp_path / "en-es.tsv.xz", table(("a", "a"), ("a", "b"), ("c", "c"), ("d", "x")))
    task = Bitext("{subset}.tsv.xz", "columns", languages=["en-es"], unique=True, first_pairs=2)
    found = scores_of(task, tmp_path, tmp_path / "v")["en-es"][None]
    assert found["pairs"] == 2 and found["accuracy"] == 1.0  # repeats are not counted
    for wrong in (0, "2"):
        with pytest.raises(UserError, match=f"first_pairs={wrong!r} must be a number above 0"):
            dataclasses.replace(task, first_pairs=wrong)


def test_layout_records(tmp_path):
    lines = ['{"lang": "%s", "id": "%s", "description": "%s"}\n']
    rows = [("en", 1, "a"), ("ko", 2, "b"), ("en", 2, "b"), ("ko", 1, "a"), ("ar", 1, "a")]
    rows += [("ar", 9, "z"), ("en", 3, "c"), ("ar", 3, " ")]
    path = write(tmp_path / "p.jsonl.xz", "".join(lines[0] % row for row in rows))
    task = Bitext("p.jsonl.xz", "records", "en", field="description")
    found = scores_of(task, tmp_path, tmp_path / "v")
    assert {name: f[None]["pairs"] for name, f in found.items()} == {"ko-en": 2, "ar-en": 1}
    write(path, "\n".join([*(lines[0] % row for row in [*rows, rows[0]]), ""]))
    assert scores_of(task, tmp_path, tmp_path / "v") == found  # an equal repeat says nothing new
    write(path, "".join(lines[0] % row for row in [*rows, ("\\ud800", 1, "x")]))
    with pytest.raises(UserError, match=r"p.jsonl.xz:9: field 'lang' is '\\ud800': a name that"):
        scores_of(task, tmp_path, tmp_path / "v")
    write(path, "".join(lines[0] % row for row in [*rows, ("en", 1, "x")]))
    with pytest.raises(UserError, match=r"p.jsonl.xz:9: field 'id' repeats '1' of en"):
        scores_of(task, tmp_path, tmp_path / "v")


# Probe

PROBE_HEAD = ("index_id", "split", "category", "text")


def topics(language: str, words: dict[str, str]) -> list[tuple]:
    """16 texts: a word of the topic, and one of the language."""
    rows = []
    for n in range(16):
        topic = ("sport", "health")[n % 2]
        split = "test" if n >= 12 else "train"
        rows.append((n, split, topic, f"{words[topic]} {language}{n}"))
    return rows


def test_probe_transfers_what_the_vectors_share(tmp_path):
    shared = {"sport": "ball", "health": "pill"}
    swapped = {"sport": "pill", "health": "ball"}
    for language, words in {"eng": shared, "deu": shared, "xxx": swapped}.items():
        write(tmp_path / f"{language}.tsv.xz", table(*topics(language, words), header=PROBE_HEAD))
    task = Probe("{subset}.tsv.xz", "eng")
    encoder = StandInTeacher()
    found = scores_of(task, tmp_path, tmp_path / "v", encoder, (None, 32))
    assert [*found] == ["deu", "eng", "xxx"] and encoder.texts == 48
    for width in (None, 32):
        assert found["deu"][width]["accuracy"] == found["eng"][width]["accuracy"] == 1.0
        assert found["xxx"][width]["accuracy"] == found["xxx"][width]["f1"] == 0.0
        assert found["xxx"][width]["accuracy_in_language"] == 1.0
        assert found["deu"][width]["texts"] == 4


def test_probe_never_sees_the_texts_that_it_is_tested_on(tmp_path):
    """Most texts are of the test, and their labels contradict those of the training texts."""
    rows = [(n, "train", *text) for n, text in enumerate([("a", "ball"), ("b", "pill")] * 2)]
    rows += [(n, "test", *text) for n, text in enumerate([("b", "ball"), ("a", "pill")] * 6, 4)]
    write(tmp_path / "eng.tsv", table(*rows, header=PROBE_HEAD))
    found = scores_of(Probe("{subset}.tsv", "eng"), tmp_path, tmp_path / "v", StandInTeacher())
    scores = found["eng"][None]
    assert scores["accuracy"] == scores["accuracy_in_language"] == 0.0 and scores["texts"] == 12


def test_probe_is_the_optimum_of_logistic_regression():
    """Softmax regression with L2 by plain gradient descent."""
    x_ND, label_N = units(3, 60, 6).astype(np.float64), np.arange(60) % 3
    probe = fit_probe(x_ND, label_N)
    weight_DC, bias_C = np.zeros((6, 3)), np.zeros(3)
    onehot_NC = np.eye(3)[label_N]
    for _ in range(20_000):
        logit_NC = x_ND @ weight_DC + bias_C
        p_NC = np.exp(logit_NC - logit_NC.max(axis=1, keepdims=True))
        error_NC = p_NC / p_NC.sum(axis=1, keepdims=True) - onehot_NC
        weight_DC -= 0.02 * (x_ND.T @ error_NC + weight_DC)
        bias_C -= 0.02 * error_NC.sum(axis=0)
    np.testing.assert_allclose(probe.coef_.T, weight_DC, atol=2e-3)
    test_ND, gold_N = units(4, 40, 6), np.random.default_rng(5).integers(0, 3, 40)
    chosen_N = (test_ND @ weight_DC + bias_C).argmax(axis=1)
    assert probe_scores(probe, test_ND, gold_N)["accuracy"] == np.mean(chosen_N == gold_N)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, "train", "a", "x"), (1, "test", "a", "y")], "deu.tsv: split 'train' must have two"),
        ([(0, "train", "a", "x"), (1, "train", "b", "y")], "deu.tsv: nothing is in split 'test'"),
    ],
)
def test_probe_refuses(tmp_path, rows, message):
    good = topics("eng", {"sport": "a", "health": "b"})
    write(tmp_path / "eng.tsv", table(*good, header=PROBE_HEAD))
    write(tmp_path / "deu.tsv", table(*rows, header=PROBE_HEAD))
    with pytest.raises(UserError, match=message):
        scores_of(Probe("{subset}.tsv", "eng", languages=["deu"]), tmp_path, tmp_path / "v")


# Across languages


def test_every_language_asks_in_every_language(tmp_path):
    words = {"de": "haus baum rot".split(), "en": "house tree rot".split()}  # noqa: SIM905
    for language, of_language in words.items():
        texts = {f"d{n}": f"{word} x{n} y{n}" for n, word in enumerate(of_language)}
        questions = {f"q{n}": word for n, word in enumerate(of_language)}
        judged = [(f"q{n}", f"d{n}", 1) for n in range(3)]
        write_beir(tmp_path / language, texts, questions, judged)
    encoder = StandInTeacher()
    task = CrossLingual("{subset}")
    found = scores_of(task, tmp_path, tmp_path / "v", encoder)
    assert [*found] == ["de-de", "de-en", "en-de", "en-en"] and encoder.texts == 12
    assert found["de-de"][None]["mrr_at_10"] == found["en-en"][None]["mrr_at_10"] == 1.0
    from moe_embed_jax.evaluation.beir import load_beir
    from moe_embed_jax.evaluation.cross_lingual import across

    mixed = across(load_beir(tmp_path / "de"), load_beir(tmp_path / "en"), "en")
    assert mixed.queries[0] == "haus" and mixed.documents[0].startswith("house")
    expected = evaluate_retrieval(encoder.encode, encoder.encode, mixed)
    assert found["de-en"][None] == expected and expected["mrr_at_10"] < 1.0


def test_ids_must_be_the_same_in_all_languages(tmp_path):
    write_beir(tmp_path / "de", {"d0": "a"}, {"q": "a"}, [("q", "d0", 1)])
    write_beir(tmp_path / "en", {"d1": "a"}, {"q": "a"}, [("q", "d1", 1)])
    with pytest.raises(UserError, match=r"en: corpus.jsonl has no document 'd0', which a query of"):
        scores_of(CrossLingual("{subset}"), tmp_path, tmp_path / "v")


# Subsets


def test_subsets(tmp_path):
    for name in ("a/de/x.tsv", "a/pt-BR/x.tsv", "a/de/y.txt"):
        write(tmp_path / name, "")
    path = "a/{subset}/x.tsv"

    def named(languages):
        return [(s.name, s.language) for s in find_subsets(tmp_path, path, languages)]

    assert named(None) == [("de", "de"), ("pt-BR", "pt-BR")]
    assert named("en") == [("de", "en"), ("pt-BR", "en")]
    assert named(["pt-BR"]) == [("pt-BR", "pt-BR")]
    assert named({"pt-BR": "pt"}) == [("pt-BR", "pt")]
    with pytest.raises(UserError, match=r"a/fr/x.tsv: no such file or folder"):
        named(["fr"])
    with pytest.raises(UserError, match="languages must be one code"):
        find_subsets(tmp_path, "a/de/x.tsv", None)
