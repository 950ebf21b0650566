"""The smoke variant of every config trains, evaluates and reports, on synthetic data."""

import json
import pathlib
import re

import pytest
from conftest import ROOT, metric
from helpers import synthetic_data
from helpers.forked import run_forked

from moe_embed_jax.conversion import export_model
from moe_embed_jax.evaluation.retrieval import mean_over_languages

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
for no_page_of_training in ("recipe", "evaluation"):  # test_recipe.py, test_suite.py
    CONFIGS.remove(no_page_of_training)


@pytest.fixture(scope="module")
def smoke_run(data_dir, tmp_path_factory):
    """name of a config -> work directory of its smoke variant, with what it printed."""
    done: dict[str, pathlib.Path] = {}

    def run(name: str) -> pathlib.Path:
        if name not in done:
            workdir = tmp_path_factory.mktemp(name)
            flags = ["launch/train.py", f"--config=configs/{name}.py:smoke", f"--workdir={workdir}"]
            result = run_forked([*flags, *flags_of(name)])
            assert result.returncode == 0, result.stderr
            (workdir / "stdout.txt").write_text(result.stdout)
            done[name] = workdir
        return done[name]

    def flags_of(name: str) -> list[str]:
        flags = [f"--config.data.dir={data_dir}"]
        small = ["--config.data.vocabulary.size=512", "--config.model.vocab_size=512"]
        if name == "mlm":
            return [*flags, *small]
        flags.append("--config.data.rates=None")
        if name == "finetune":  # from stage 2, with lengths of its own
            pairs = synthetic_data.write_pairs(tmp_path_factory.mktemp("pairs") / "mined").folder
            flags += [f"--config.init.source={run('pretrain')}", f"--config.data.pairs={pairs}"]
            return [*flags, "--config.data.query_length=20", "--config.data.document_length=40"]
        lengths = ["--config.data.query_length=16", "--config.data.document_length=24"]
        return [*flags, *small, *lengths]

    return run


@pytest.mark.parametrize("name", CONFIGS)
def test_smoke_variant_runs(smoke_run, name):
    workdir = smoke_run(name)
    results = json.loads((workdir / "results.json").read_text())
    start = "before" if name == "finetune" else "untrained"
    assert set(results) - {"BM25"} == {start, "trained"}
    of_set, measure = ("translations/aa", "ndcg_at_10")
    if name == "mlm":
        of_set, measure = ("held_out/aa", "accuracy")
    assert 0 <= results["trained"][of_set][measure] <= 1
    assert (metric(workdir, "utilisation") > 0.6).all()
    # What was trained can be used by the other commands.
    texts = workdir / "texts.jsonl"
    texts.write_text('"one"\n{"text": ""}\n"three"\n')
    output = workdir / "emb.npy"
    flags = [f"--model={workdir}", f"--input={texts}", f"--output={output}", "--prompt=query"]
    result = run_forked(["launch/embed.py", *flags, "--dim=8"])
    assert result.returncode == 0, result.stderr
    assert output.stat().st_size == 128 + 3 * 8 * 4


def test_the_trained_quickstart_beats_the_untrained_one(smoke_run):
    """Across languages, where the README's table promises it; four steps are enough."""
    results = json.loads((smoke_run("quickstart") / "results.json").read_text())
    means = {name: mean_over_languages(sets)["translations"] for name, sets in results.items()}
    assert means["trained"]["languages"] == 3
    assert means["trained"]["ndcg_at_10"] > means["untrained"]["ndcg_at_10"] + 0.02


def test_fine_tuning_goes_on_from_stage_2_in_its_own_way(smoke_run, tmp_path):
    before, after = smoke_run("pretrain"), smoke_run("finetune")
    cards = [json.loads((run / "config.json").read_text()) for run in (before, after)]
    assert cards[0]["model"] == cards[1]["model"]  # remat_rows is the same in both
    lengths = [(card["data"]["query_length"], card["data"]["document_length"]) for card in cards]
    assert lengths == [(16, 24), (20, 40)]
    export_model(after, tmp_path / "exported")
    settings = json.loads((tmp_path / "exported" / "sentence_bert_config.json").read_text())
    assert settings["max_seq_length"] == 40
    out = (after / "stdout.txt").read_text()
    assert "up to 3 hard negatives of its own" in out
    assert "hard        of 164 pairs 64 (39.0%) have 3 or more, " in out
    # The first loss is that of the trained model, not of random numbers, at both widths.
    assert metric(after, "loss_at_48")[0] > 0 and metric(after, "loss_at_16")[0] > 0
    rates = metric(after, "learning_rate")
    assert rates[1] == pytest.approx(2e-5) and (rates[2:] < rates[1:-1]).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "init.source is empty, .* give --config.init.source=MODEL"),
        (["--config.init.source=x"], "data.pairs is empty, .* give --config.data.pairs=FOLDER"),
        (["--config.data.pairs=x"], "init.source is empty"),
    ],
)
def test_fine_tuning_says_what_it_needs(flags, message, tmp_path):
    command = ["launch/train.py", "--config=configs/finetune.py", f"--workdir={tmp_path / 'run'}"]
    result = run_forked([*command, *flags])
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(f"error: {message}", result.stderr), result.stderr
