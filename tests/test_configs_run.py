"""The smoke variant of every config trains, evaluates and reports, on synthetic data."""

import json
import pathlib

import pytest
from conftest import ROOT, run_python

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
PAIRS = (
    "--config.data.query_length=16",
    "--config.data.document_length=24",
    "--config.data.rates=None",
)
OF_OBJECTIVE = {"mlm": ()}
METRICS = {"mlm": ("held_out/aa", "accuracy")}


@pytest.fixture(scope="module")
def smoke_run(data_dir, tmp_path_factory):
    def run(name: str) -> pathlib.Path:
        workdir = tmp_path_factory.mktemp(name)
        result = run_python(
            [
                "launch/train.py",
                f"--config=configs/{name}.py:smoke",
                f"--workdir={workdir}",
                f"--config.data.dir={data_dir}",
                "--config.data.vocabulary.size=512",
                "--config.model.vocab_size=512",
                *OF_OBJECTIVE.get(name, PAIRS),
            ]
        )
        assert result.returncode == 0, result.stderr
        return workdir

    return run


@pytest.mark.parametrize("name", CONFIGS)
def test_smoke_variant_runs(smoke_run, name):
    workdir = smoke_run(name)
    results = json.loads((workdir / "results.json").read_text())
    of_set, metric = METRICS.get(name, ("translations/aa", "ndcg_at_10"))
    assert 0 <= results["trained"][of_set][metric] <= 1
    # What was trained can be used by the other commands.
    texts = workdir / "texts.jsonl"
    texts.write_text('"one"\n{"text": ""}\n"three"\n')
    output = workdir / "emb.npy"
    flags = [f"--model={workdir}", f"--input={texts}", f"--output={output}", "--prompt=query"]
    result = run_python(["launch/embed.py", *flags, "--dim=8"])
    assert result.returncode == 0, result.stderr
    assert output.stat().st_size == 128 + 3 * 8 * 4
