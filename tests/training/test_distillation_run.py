"""A run that learns from a teacher's vectors, through the launcher."""

import jax
import numpy as np
import pytest
from conftest import metric, unfinished_copy
from helpers import synthetic_data
from helpers.forked import run_forked
from helpers.stand_in_teacher import StandInTeacher

from moe_embed_jax.curation.pair_texts import Embedding, PairTexts, distinct
from moe_embed_jax.data.batches import abstract_batch
from moe_embed_jax.data.data_config import DataConfig, VocabularyConfig
from moe_embed_jax.embedder import Embedder
from moe_embed_jax.errors import UserError
from moe_embed_jax.losses.distillation_config import DistillationConfig
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.models.encoder_config import EncoderConfig
from moe_embed_jax.stages.contrastive import Contrastive
from moe_embed_jax.training.run_config import LossConfig, RunConfig

TEACH = [f"--config.loss.distillation.{key}" for key in ("vectors=2", "batch_scores=0.5")]


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
    result = run_forked([*command, *TEACH, f"--workdir={run}"])
    assert result.returncode == 0, result.stderr
    return command, run, result.stdout


def test_a_run_says_what_it_learns_from_and_learns_it(trained):
    _, run, out = trained
    assert "teacher     vectors of 64 dimensions for the student's 32, by projection" in out
    assert "; scores of all documents of a batch by vectors of 64 dimensions, from" in out
    terms = "1 x contrastive + 2 x (1 - cosine) + 0.5 x divergence over the batch"
    assert f"; the loss is {terms}" in out
    taught = metric(run, "distillation_vectors")
    assert taught[-1] < taught[0] - 0.02
    total = np.add(metric(run, "contrastive_loss"), np.multiply(2, taught))
    total += np.multiply(0.5, metric(run, "distillation_batch_scores"))
    np.testing.assert_allclose(metric(run, "loss"), total + metric(run, "balance"), rtol=1e-5)
    # What is served knows nothing of the teacher's width.
    assert Embedder.load(run).encode(["kaba"], prompt="query").shape == (1, 32)


def test_it_resumes_on_other_devices_and_not_with_another_teacher(trained, tmp_path):
    command, whole, _ = trained
    run = tmp_path / "run"
    unfinished_copy(whole, run, 6)
    other = teacher_of(tmp_path / "other.work", {"translations": (210, 90, 37)})
    command = [*command, *TEACH, f"--workdir={run}"]
    result = run_forked([*command, f"--config.data.teacher={other}"])
    assert result.returncode == 2 and "has no vector of 123 of the 460 queries" in result.stderr
    result = run_forked([*command, "--config.mesh.expert=2"], devices=4)
    assert result.returncode == 0, result.stderr
    assert "after step 3" in result.stdout
    for name in ("distillation_vectors", "distillation_batch_scores", "grad_norm"):
        np.testing.assert_allclose(metric(run, name), metric(whole, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["distillation.vectors=0", "distillation.batch_scores=0"],
            "and loss.distillation reads no vectors: give",
        ),
        (["distillation.scores=1"], "data.negatives=0: a teacher's scores are of a query's own"),
    ],
)
def test_what_is_missing_is_said(trained, tmp_path, flags, message):
    command, _, _ = trained
    more = [f"--workdir={tmp_path / 'run'}", *TEACH, *(f"--config.loss.{f}" for f in flags)]
    result = run_forked([*command, *more])
    assert result.returncode == 2 and message in result.stderr


def test_a_weight_needs_a_teacher():
    with pytest.raises(UserError, match=r"data\.teacher is empty, and loss\.distillation learns"):
        RunConfig(
            data=DataConfig(vocabulary=VocabularyConfig("train", size=512)),
            loss=LossConfig(distillation=DistillationConfig(vectors=1.0)),
        )


@pytest.mark.parametrize(
    ("keys", "widths"),
    [(dict(vectors=1.0), (32, 0)), (dict(scores=1.0), (0, 3)), (dict(batch_scores=1.0), (32, 0))],
)
def test_a_plan_knows_what_comes_with_a_batch(keys, widths, tmp_path):
    """Without a folder yet the teacher's width is taken for the student's."""
    data = DataConfig(
        dir=str(tmp_path),
        pairs=str(tmp_path / "pairs"),
        negatives=2,
        teacher="" if "scores" in keys else str(tmp_path / "t.work"),
        vocabulary=VocabularyConfig("train", size=512),
    )
    model = EncoderConfig(vocab_size=512, num_layers=2, width=32, num_heads=2, ffn_width=64)
    loss = LossConfig(distillation=DistillationConfig(**keys))
    run, mesh = RunConfig(batch_size=8, model=model, data=data, loss=loss), single_device_mesh()
    load = Contrastive.workload(run, mesh, 8, 16)
    batch = abstract_batch(mesh, load.stage.Batch, **load.batch_shapes)
    assert batch.teacher_query_BW.shape == batch.teacher_document_BW.shape == (8, widths[0])
    assert batch.teacher_score_BM.shape == (8, widths[1])
    assert ("projection" in load.stage.extra_params(jax.random.key(0))) == ("vectors" in keys)
