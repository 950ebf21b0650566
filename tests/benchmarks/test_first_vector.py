"""benchmarks/first_vector.py: parts are of a real process, the ratio is that of the medians."""

import json

import jax
import pytest
from conftest import load_benchmark, skip_without
from helpers import synthetic_data

from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.model_folder import PROMPTS, LoadedModel, save_model
from moe_embed_jax.models.encoder import EncoderConfig, init_params
from moe_embed_jax.tokenizers.vocabulary import Vocabulary

MODEL = EncoderConfig(
    vocab_size=512, num_layers=2, width=48, num_heads=2, ffn_width=96, num_experts=4
)


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    tokenizer = Vocabulary.load(vocabulary_path(synthetic_data.PREPARATION, data_dir))
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    lengths = {"query": 16, "document": 24}
    save_model(folder, LoadedModel(MODEL, params, None, tokenizer, PROMPTS, lengths), "random")
    return folder


def test_a_turn_is_a_process_that_embeds_a_text(folder, tmp_path):
    benchmark = load_benchmark("first_vector")
    turn = benchmark.turn(benchmark.EMBEDDER, str(folder), str(tmp_path / "programs"))
    assert list((tmp_path / "programs").glob("jit__pool_rows-*"))
    assert len(turn["vector"]) == MODEL.width and tuple(turn["parts"]) == benchmark.PARTS
    for scale in ("wall", "cpu"):
        seconds = [part[scale] for part in turn["parts"].values()]
        assert sum(seconds) == pytest.approx(turn[scale]) and min(seconds) >= 0
    assert turn["wall"] > 0.2 < turn["cpu"]


def test_a_turn_that_fails_says_why(folder, tmp_path):
    benchmark = load_benchmark("first_vector")
    with pytest.raises(SystemExit, match=r"(?s)a turn failed:.*no_such_folder"):
        benchmark.turn(benchmark.EMBEDDER, str(tmp_path / "no_such_folder"), "")


def test_the_report(folder, tmp_path, monkeypatch, capsys):
    """Ratios of medians, and of the same vector. The peer needs PyTorch and 10 seconds a turn."""
    skip_without("sentence_transformers")
    benchmark = load_benchmark("first_vector")
    seconds = {"ours": iter([9, 4, 2, 3]), "kept": iter([9, 1, 5, 2]), "peer": iter([9, 8, 30, 12])}

    def turn(script, folder, cache):
        name = "peer" if script == benchmark.SENTENCE_TRANSFORMER else "kept" if cache else "ours"
        wall = next(seconds[name])
        part = {"wall": wall / 4, "cpu": 1.0}
        parts = dict.fromkeys(benchmark.PARTS, part)
        vector = [0.6, 0.8 if name == "peer" else 0.75]
        return {"parts": parts, "vector": vector, "wall": wall, "cpu": 4.0, "others_cpu": 0.0}

    monkeypatch.setattr(benchmark, "turn", turn)
    output = tmp_path / "report.json"
    flags = [f"--model={folder}", "--rounds=3", f"--output={output}"]
    monkeypatch.setattr("sys.argv", ["first_vector.py", *flags])
    benchmark.main()
    report = json.loads(output.read_text())
    assert (report["ratio"], report["ratio_compiling"]) == (6.0, 4.0)
    assert report["largest_difference"] == pytest.approx(0.05)
    assert report["seconds"]["sentence-transformers"] == {"wall": 12, "cpu": 4}
    assert "largest difference of the vectors: 5.0e-02" in capsys.readouterr().out


def test_without_the_peer_nothing_is_measured(folder, monkeypatch, capsys):
    benchmark = load_benchmark("first_vector")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["first_vector.py", f"--model={folder}"])
    monkeypatch.setattr(benchmark, "turn", None)
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "needs sentence_transformers, not installed here: pip install" in capsys.readouterr().err
