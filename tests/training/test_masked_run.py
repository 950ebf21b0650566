"""Whole runs of masked language modelling: resume, meshes, options, and stage 1 into stage 2."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from conftest import metric, run_python
from helpers import synthetic_data
from helpers.two_processes import Together
from test_training_run import assert_refused, assert_same_checkpoint, command, train

from moe_embed_jax import Embedder
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.model_folder import load_model

STEPS = 12


@pytest.fixture(scope="module")
def config(data_dir, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(synthetic_data.masked_config_text(data_dir, steps=STEPS))
    return path


@pytest.fixture(scope="module")
def whole_run(config, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    result = run_python(command(config, workdir))  # with another hash seed than those it equals
    assert result.returncode == 0, result.stderr
    (workdir / "stdout.txt").write_text(result.stdout)
    return workdir


def records(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_tells_what_it_does_and_learns(whole_run):
    out = (whole_run / "stdout.txt").read_text()
    for words in (
        "360 documents in 3 languages",
        "masked      30% of the tokens: 80% / 10% / 10% <mask> / random / kept",
        "attention inside documents",
        "8 rows, one language each",
        "geometric mean of 3",
        "masked: '",
    ):
        assert words in out
    assert (whole_run / "report.png").read_bytes()[:4] == b"\x89PNG"
    found = records(whole_run / "metrics.jsonl")
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert {record["group"] for record in found} == {f"documents/{x}" for x in ("aa", "bb", "cc")}
    # 64 slots a row, all but filled; of the tokens that are no specials 30 % are hidden.
    assert all(0.9 < record["utilisation"] <= 1 for record in found)
    assert all(0.25 < record["predictions"] / record["tokens"] < 0.3 for record in found)
    loss = metric(whole_run, "masked_loss")
    assert loss[-3:].mean() < loss[:3].mean() - 0.2
    evaluations = records(whole_run / "evaluations.jsonl")
    assert [(e["step"], e["complete"]) for e in evaluations] == [(0, True), (6, False), (12, True)]
    assert set(evaluations[0]["sets"]) == {"held_out/aa", "held_out/bb", "held_out/cc"}
    assert len(evaluations[1]["sets"]) == 2
    results = json.loads((whole_run / "results.json").read_text())
    for name, trained in results["trained"].items():
        assert trained["perplexity"] < results["untrained"][name]["perplexity"] < 1000
        assert trained["tokens"] > 400


def test_resume_after_a_loss_of_the_newest_state_is_bitwise(config, whole_run, tmp_path):
    """What is left after a kill between steps 4 and 8: the run ends with the same bits."""
    workdir = tmp_path / "run"
    shutil.copytree(whole_run, workdir)
    for step in (8, 12):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    result = train(config, workdir)
    assert result.returncode == 0, result.stderr
    assert f"resuming    {workdir} after step 4" in result.stdout
    for name in ("metrics.jsonl", "evaluations.jsonl", "results.json"):
        assert (whole_run / name).read_text() == (workdir / name).read_text()
    assert_same_checkpoint(whole_run, workdir, STEPS, ("params", "optimizer", "mlm_head"))


@pytest.mark.slow
def test_eight_devices_in_chunks_equal_one(config, whole_run, tmp_path):
    flags = ("--config.mesh.fsdp=2", "--config.data.chunk_rows=1", "--config.batch_size=8")
    result = train(config, tmp_path, *flags, devices=8)
    assert result.returncode == 0, result.stderr
    one, eight = (metric(path, "masked_loss") for path in (whole_run, tmp_path))
    np.testing.assert_allclose(eight, one, atol=2e-5, rtol=0)
    sets = [records(path / "evaluations.jsonl")[-1]["sets"] for path in (whole_run, tmp_path)]
    for name, found in sets[0].items():
        assert sets[1][name]["perplexity"] == pytest.approx(found["perplexity"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_equal_one_device(config, whole_run, tmp_path):
    flags = ("--config.mesh.fsdp=2", "--config.model.remat_rows=1")
    arguments = ["launch/train.py", f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags]
    together = Together(arguments, tmp_path)
    together.wait()
    one, two = (metric(path, "masked_loss") for path in (whole_run, tmp_path / "run"))
    np.testing.assert_allclose(two, one, atol=2e-5, rtol=0)
    assert "geometric mean of 3" in together.output("out0")
    assert together.output("out1") == ""


def test_all_languages_in_every_batch_across_documents_with_experts(config, tmp_path):
    flags = (
        "--config.data.one_language=False",
        "--config.data.across_documents=True",
        "--config.model.moe_every=2",
        "--config.model.num_experts=4",
        "--config.steps=3",
        "--config.eval_every=0",
    )
    result = train(config, tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    assert "attention across documents" in result.stdout
    assert "all languages in each" in result.stdout
    found = records(tmp_path / "metrics.jsonl")
    assert {record["group"] for record in found} == {"documents/mixed"}
    assert all(record["loss"] > record["masked_loss"] + 0.99 for record in found)
    assert all(record["utilisation"] > 0.97 for record in found)


def test_its_encoder_embeds_and_starts_stage_2(data_dir, whole_run, tmp_path):
    """A dense run of stage 1 becomes the experts of a contrastive run; its head stays behind."""
    embedder = Embedder.load(whole_run)
    assert embedder.max_lengths == {"query": 64, "document": 64}
    assert embedder.prompts["query"] == ""
    vectors = embedder.encode(["kebi labe", "kebi"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)

    config = tmp_path / "config.py"
    source = dict(source=str(whole_run), upcycle="paper")
    config.write_text(synthetic_data.config_text(data_dir, steps=1, init=source))
    # The store of pairs is named by the vocabulary: tokenise them with that of stage 1.
    synthetic_data.write_tokens(data_dir, with_vocabulary_of(whole_run, synthetic_data.PREPARATION))
    flags = ("--config.optimizer.warmup_steps=0", "--config.optimizer.peak_learning_rate=0.0")
    result = train(config, tmp_path / "run", *flags)
    assert result.returncode == 0, result.stderr
    assert "upcycled (paper)" in result.stdout
    dense = load_model(whole_run, single_device_mesh())
    sparse = load_model(tmp_path / "run", single_device_mesh())
    assert dense.mlm_head is not None and sparse.mlm_head is None
    assert (dense.model.num_moe_layers, sparse.model.num_moe_layers) == (0, 1)
    word = sparse.params["embeddings"]["token"]
    np.testing.assert_allclose(word, dense.params["embeddings"]["token"])
    w_in = sparse.params["groups"]["block_1"]["moe"]["w_in"][0]
    up = dense.params["groups"]["block_0"]["feed_forward"]["up"]["kernel"][1]
    for expert in w_in:
        np.testing.assert_allclose(expert, up)


def with_vocabulary_of(run: pathlib.Path, preparation: dict) -> dict:
    return preparation | {"vocabulary": {"kind": "file", "path": str(run / "sentencepiece.model")}}


def test_a_run_goes_on_from_another_with_its_head(data_dir, config, whole_run, tmp_path):
    synthetic_data.write_documents(
        data_dir, with_vocabulary_of(whole_run, synthetic_data.DOCUMENTS_PREPARATION)
    )
    flags = (f"--config.init.source={whole_run}", "--config.steps=3", "--config.eval_every=0")
    result = train(config, tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    before, after = (
        json.loads((path / "results.json").read_text()) for path in (whole_run, tmp_path)
    )
    assert after["before"] == before["trained"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.data.query_length=16"], "unknown config key data.query_length"),
        (["--config.objective=contrastive"], "this config is 'masked_lm'"),
        (["--config.loss.mask_rate=1.5"], "loss.mask_rate=1.5 must be between 0 and 1"),
        (["--config.loss.random_share=0.4"], "add up to at most 1"),
        (["--config.batch_size=9"], "batch_size=9 is not divisible by the 8 devices"),
    ],
)
def test_bad_config_is_one_line(config, tmp_path, flags, message):
    result = train(config, tmp_path, *flags, devices=8)
    assert_refused(result, message)


def test_a_work_directory_of_another_objective_is_refused(data_dir, whole_run, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(synthetic_data.config_text(data_dir))
    result = train(config, whole_run)
    assert_refused(result, "belongs to another run .objective: masked_lm -> contrastive.")
