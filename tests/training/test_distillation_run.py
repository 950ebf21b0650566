"""A run that learns from a teacher's vectors, through the launcher."""

import shutil

import numpy as np
import pytest
from conftest import metric
from helpers import synthetic_data
from helpers.forked import run_forked
from helpers.stand_in_teacher import StandInTeacher

from moe_embed_jax.curation.pair_texts import Embedding, PairTexts, distinct
from moe_embed_jax.embedder import Embedder

TEACH = "--config.loss.distillation.vectors=2"


def teacher_of(folder, group_rows=synthetic_data.GROUP_ROWS):
    """A work folder as launch/mine.py leaves it, for the pairs of `write_data`."""
    for task, counts in group_rows.items():
        for language, rows in zip(synthetic_data.LANGUAGES, counts, strict=True):
            pairs = synthetic_data.pairs(task, language, rows, seed=1)
            texts = PairTexts(distinct(q for q, _ in pairs), distinct(d for _, d in pairs))
            Embedding(StandInTeacher()).embed(folder / f"{task}-{language}", texts)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(command without --workdir, work directory, what it printed)"""
    folder = tmp_path_factory.mktemp("distilled")
    data_dir, teacher = synthetic_data.write_data(folder / "data"), teacher_of(folder / "t.work")
    shape = dict(vocab_size=512, num_layers=2, width=32, num_heads=2, ffn_width=64, num_experts=2)
    page = folder / "config.py"
    page.write_text(
        synthetic_data.config_text(
            data_dir,
            steps=6,
            log_every=1,
            eval_every=0,
            checkpoint_every=3,
            model=shape,
            data=synthetic_data.ONE_ROW_COUNT | {"teacher": str(teacher)},
        )
    )
    command, run = ["launch/train.py", f"--config={page}"], folder / "run"
    result = run_forked([*command, TEACH, f"--workdir={run}"])
    assert result.returncode == 0, result.stderr
    return command, run, result.stdout


def test_a_run_says_what_it_learns_from_and_learns_it(trained):
    _, run, out = trained
    assert "teacher     vectors of 64 dimensions from " in out
    assert "for the student's 32 by projection; the loss is 1 x contrastive + 2 x (1 - c" in out
    taught = metric(run, "distillation_vectors")
    assert taught[-1] < taught[0] - 0.02
    total = np.add(metric(run, "contrastive_loss"), np.multiply(2, taught))
    np.testing.assert_allclose(metric(run, "loss"), total + metric(run, "balance"), rtol=1e-5)
    # What is served knows nothing of the teacher's width.
    assert Embedder.load(run).encode(["kaba"], prompt="query").shape == (1, 32)


def test_it_resumes_on_other_devices_and_not_with_another_teacher(trained, tmp_path):
    command, whole, _ = trained
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "6")
    (run / "results.json").unlink()
    other = teacher_of(tmp_path / "other.work", {"translations": (210, 90, 37)})
    command = [*command, TEACH, f"--workdir={run}"]
    result = run_forked([*command, f"--config.data.teacher={other}"])
    assert result.returncode == 2 and "has no vector of 123 of the 460 queries" in result.stderr
    result = run_forked([*command, "--config.mesh.expert=2"], devices=4)
    assert result.returncode == 0, result.stderr
    assert "after step 3" in result.stdout
    for name in ("distillation_vectors", "contrastive_loss", "grad_norm"):
        np.testing.assert_allclose(metric(run, name), metric(whole, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flag", ["--config.loss.distillation.vectors=0", "--config.data.teacher="])
def test_a_teacher_needs_a_weight_and_a_weight_needs_a_teacher(trained, tmp_path, flag):
    command, _, _ = trained
    result = run_forked([*command, TEACH, f"--workdir={tmp_path / 'run'}", flag])
    assert result.returncode == 2 and "distillation needs both" in result.stderr
