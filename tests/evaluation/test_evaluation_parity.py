"""benchmarks/evaluation_parity.py: what it compares, and when it fails."""

import sys

import pytest
from conftest import load_benchmark
from helpers.evaluation_data import table, write

from moe_embed_jax.errors import UserError

SCORES = {("T", "de", "f1"): 0.5, ("T", "de", "accuracy"): 0.25, ("T", "de", "pairs"): 9}


@pytest.fixture
def parity():
    return load_benchmark("evaluation_parity")


def test_compares_scores_and_not_counts(parity):
    rows = parity.compare(SCORES, {**SCORES, ("T", "de", "f1"): 0.502})
    assert [row[2] for row in rows] == ["f1", "accuracy"]
    assert parity.largest(rows) == pytest.approx(0.002)
    page = parity.markdown(rows, {"T": "f1"})
    assert "2 scores; largest difference 0.002000 (T de f1); 1 differ by more than 0.001" in page
    assert "| T | f1 | 1 | 0.500000 | 0.502000 | 2 | 0.002000 |" in page
    assert "| T | de | accuracy | 0.250000 | 0.250000 | 0.000000 |" in page
    with pytest.raises(ValueError, match="9 and 8"):
        parity.compare(SCORES, {**SCORES, ("T", "de", "pairs"): 8})
    with pytest.raises(ValueError, match=r"scores of one encoder only: \[\('T', 'de', 'f1'\)\]"):
        parity.compare(SCORES, {k: v for k, v in SCORES.items() if k[2] != "f1"})


@pytest.mark.parametrize(("difference", "status"), [(0.0009, 0), (0.0011, 1)])
def test_exit_status(parity, monkeypatch, tmp_path, capsys, difference, status):
    page = "{'tasks': {'T': dict(kind='sts', path='{subset}.tsv')}}"
    write(tmp_path / "page.py", f"def get_config(v):\n    return {page}\n")
    write(tmp_path / "de.tsv", table((1, "a", "b"), header=("score", "sentence1", "sentence2")))
    write(tmp_path / "model/tokenizer.json", "{}")

    def all_scores(name, *_):
        moved = 0.5 + difference * name.startswith("sentence-transformers:")
        return {("T", "de", "cosine_spearman"): moved, ("T", "de", "pairs"): 9}

    monkeypatch.setattr(parity, "all_scores", all_scores)
    flags = [f"--model={tmp_path / 'model'}", f"--data={tmp_path}", f"--output={tmp_path / 'out'}"]
    flags.append(f"--suite={tmp_path / 'page.py'}")
    monkeypatch.setattr(sys, "argv", ["evaluation_parity.py", *flags])
    assert parity.run() == status
    assert (tmp_path / "out/parity.md").read_text() in capsys.readouterr().out


def test_the_reference_needs_a_tokenizer(parity, tmp_path):
    with pytest.raises(UserError, match=r"has neither tokenizer\.json nor sentencepiece"):
        parity.reference_folder(tmp_path, tmp_path / "reference")


def test_the_reference_reads_text_as_we_do(parity, e5_small, tmp_path):
    transformers = pytest.importorskip("transformers")
    from moe_embed_jax.tokenizers.vocabulary import Vocabulary

    folder = parity.reference_folder(e5_small, tmp_path / "reference")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    texts = ["query: hello", "passage: Zażółć  gęślą", "日本語のテスト", "ＦＵＬＬ", ""]
    vocabulary = Vocabulary.load(e5_small / "sentencepiece.bpe.model")
    ours = vocabulary.encode_texts(texts, 512)
    assert [list(ids) for ids in ours] == [theirs(text).input_ids for text in texts]
