"""From a prepared folder of pairs with hard negatives to tokens, batches and a trained model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import metric, unfinished_copy
from helpers import synthetic_data
from helpers.forked import run_forked

from moe_embed_jax import config as config_module
from moe_embed_jax.data.batches import PairBatches
from moe_embed_jax.data.buckets import MAX_BUCKETS
from moe_embed_jax.data.data_spec import token_store_path, vocabulary_path
from moe_embed_jax.data.schedule import Schedule, mixture_groups
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.embedder import Embedder
from moe_embed_jax.errors import UserError
from moe_embed_jax.losses.reference import dense_infonce
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.models.encoder import init_params
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.preparation import tokenize as prepare
from moe_embed_jax.stages.pair_data import (
    describe_hard_negatives,
    open_teaching,
    pair_batches,
)
from moe_embed_jax.tokenizers.vocabulary import (
    DOCUMENT_PREFIX,
    QUERY_PREFIX,
    Vocabulary,
    content_ids,
)
from moe_embed_jax.training import workdir
from moe_embed_jax.training.run_config import LossConfig, RunConfig

CONFIG = {
    "vocabulary": {"kind": "train", "size": 512},
    "query_length": 16,
    "document_length": 24,
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> PairFolder:
    return synthetic_data.write_pairs(tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture(scope="module")
def prepared(pairs, tmp_path_factory):
    """(config, data_dir, store)"""
    data_dir = tmp_path_factory.mktemp("data")
    config = {**CONFIG, "pairs": str(pairs.folder)}
    return config, data_dir, TokenStore.open(prepare.prepare(config, data_dir))


def test_the_store_holds_every_text(pairs, prepared):
    config, data_dir, store = prepared
    vocabulary = Vocabulary.load(vocabulary_path(config, data_dir))
    assert vocabulary.size == 512
    assert store.spec["pairs"] == pairs.content_hash and "mixture" not in store.spec
    assert len(store) == len(pairs)
    assert [(g["task"], g["language"]) for g in store.groups] == list(pairs.groups)
    texts = store.read(range(len(store)))
    total = 0
    for row, (pair, found) in enumerate(zip(pairs.read(range(len(pairs))), texts, strict=True)):
        negatives = [text for text in pair.negatives if text != "\u0007"]
        own_score, *scores = pair.scores or [np.nan] * (1 + len(pair.negatives))
        scores = [s for s, t in zip(scores, pair.negatives, strict=True) if t != "\u0007"]
        expected = [
            vocabulary.encode_text(QUERY_PREFIX + pair.query, 16),
            vocabulary.encode_text(DOCUMENT_PREFIX + pair.document, 24),
            *(vocabulary.encode_text(DOCUMENT_PREFIX + text, 24) for text in negatives),
        ]
        assert [ids.tolist() for ids in found] == [list(ids) for ids in expected]
        start, stop = store.negative_starts[row : row + 2]
        assert stop - start == len(negatives)
        if negatives:
            np.testing.assert_array_equal(store.negative_ids[start:stop], content_ids(negatives))
        np.testing.assert_array_equal(
            store.content_ids[row], content_ids([pair.query, pair.document])
        )
        np.testing.assert_array_equal(store.document_scores[row], np.float32(own_score))
        np.testing.assert_array_equal(store.negative_scores[start:stop], np.float32(scores))
        total += len(negatives)
    assert store.negative_starts[-1] == total == len(store.negative_lengths) > 300
    # A second call finds it; rates that name no source are refused.
    assert prepare.prepare(config, data_dir) == store.folder
    with pytest.raises(UserError, match=r"unknown task 'web'; .* has descriptions, trans"):
        prepare.prepare({**config, "rates": {"web": 1.0}}, data_dir)


def test_single_rows_equal_batches(pairs, prepared):
    import seqio

    from moe_embed_jax.preparation import tasks

    config, data_dir, store = prepared
    vocabulary = Vocabulary.load(vocabulary_path(config, data_dir))
    tasks.register_pairs(pairs, vocabulary, 16, 24)
    task = seqio.TaskRegistry.get("descriptions")
    empty = vocabulary.encode_text(DOCUMENT_PREFIX, 24)
    start, _ = pairs.groups["descriptions", "cc"]
    expected = store.read(range(start, start + 33))
    for row, texts in zip(task.get_dataset(split="train", shuffle=False), expected, strict=True):
        assert row["query"].numpy().tolist() == texts[0].tolist()
        negatives = [ids for ids in row["negatives"].to_list() if len(ids) > len(empty)]
        assert negatives == [ids.tolist() for ids in texts[2:]]


@pytest.mark.parametrize(("negatives", "chunk_rows"), [(0, 0), (2, 0), (4, 3), (7, 0)])
def test_batches_hold_the_first_negatives_of_every_pair(prepared, negatives, chunk_rows):
    _, _, store = prepared
    schedule = Schedule(mixture_groups(store.groups, None), 16, 40, seed=0)
    slots = 6
    batches = PairBatches(
        store, schedule, single_device_mesh(), 48, slots, 1, chunk_rows, negatives
    )
    assert len(batches.buckets) <= MAX_BUCKETS
    ragged = False
    for step in (0, 3, 39):
        batch = batches.at(step)
        rows = schedule.rows(step)
        arrays = {name: np.asarray(array) for name, array in vars(batch.arrays).items()}
        assert arrays["document_slot_BM"].shape == arrays["valid_BM"].shape == (16, 1 + negatives)
        length = arrays["token_CRL"].shape[2]
        token_RL = arrays["token_CRL"].reshape(-1, length)
        index_RL = arrays["text_index_CRL"].reshape(-1, length)
        assert batch.tokens == (index_RL >= 0).sum()
        seen = set()
        for pair, row in enumerate(rows):
            sequences = store.read([row])[0]
            start, stop = store.negative_starts[row : row + 2]
            count = min(negatives, stop - start)
            ragged |= count != negatives
            assert arrays["valid_BM"][pair].tolist() == [True] * (1 + count) + [False] * (
                negatives - count
            )
            ids = [store.content_ids[row, 1], *store.negative_ids[start : start + count]]
            np.testing.assert_array_equal(arrays["document_id_BM2"][pair, : 1 + count], ids)
            used = [arrays["query_slot_B"][pair], *arrays["document_slot_BM"][pair, : 1 + count]]
            for slot, expected in zip(used, sequences[: 2 + count], strict=True):
                packed_row, index = divmod(int(slot), slots)
                mine = index_RL[packed_row] == index
                np.testing.assert_array_equal(token_RL[packed_row, mine], expected)
                seen.add(int(slot))
        assert len(seen) == 32 + arrays["valid_BM"][:, 1:].sum()
    assert ragged or negatives in (0,)


def run_config(data_dir, pairs) -> dict:
    scope: dict = {}
    exec(synthetic_data.config_text(data_dir, steps=2, log_every=1, checkpoint_every=1), scope)
    values = scope["get_config"]()
    values["model"] |= {"num_layers": 2, "num_experts": 2}  # seconds to compile
    values["optimizer"]["warmup_steps"] = 1
    values["data"] |= {"pairs": str(pairs), "negatives": 3}
    values["loss"] = {"distillation": {"scores": 0.5, "teacher_temperature": 0.25}}
    return values


def dense_losses(pairs, data_dir, values: dict):
    """Of a run's first batch, from the texts of the folder: with and without hard negatives."""
    run = config_module.build(RunConfig, values)
    vocabulary = Vocabulary.load(vocabulary_path(run.data.preparation(), data_dir))
    store = TokenStore.open(token_store_path(run.data.preparation(), data_dir))
    groups = mixture_groups(store.groups, run.data.rates)
    batch = pairs.read(Schedule(groups, run.batch_size, run.steps, run.seed).rows(0))
    params = jax.jit(init_params, static_argnums=0)(run.model, jax.random.key(run.seed))
    lengths = {"query": run.data.query_length, "document": run.data.document_length}
    embedder = Embedder(run.model, params, vocabulary, lengths, single_device_mesh())

    negatives = run.data.negatives
    documents, valid = [], []
    for pair in batch:
        given = [text for text in pair.negatives if text != "\u0007"][:negatives]
        documents += [pair.document, *given, *[""] * (negatives - len(given))]
        valid += [True] * (1 + len(given)) + [False] * (negatives - len(given))
    queries, shape = [pair.query for pair in batch], (len(batch), 1 + negatives)
    query_BD = jnp.asarray(embedder.encode(queries, "query"))
    document_BMD = jnp.asarray(embedder.encode(documents, "document")).reshape(*shape, -1)
    query_id_B2 = jnp.asarray(content_ids(queries))
    document_id_BM2 = jnp.asarray(content_ids(documents)).reshape(*shape, 2)
    valid_BM = jnp.asarray(valid).reshape(shape)
    return [
        dense_infonce(
            run.loss,
            query_BD,
            document_BMD[:, :m],
            query_id_B2,
            document_id_BM2[:, :m],
            valid_BM[:, :m],
        )
        for m in (1 + negatives, 1)
    ]


@pytest.fixture(scope="module")
def trained(pairs, prepared, tmp_path_factory):
    """(command without --workdir, work directory, what it printed)"""
    _, data_dir, _ = prepared
    folder = tmp_path_factory.mktemp("trained")
    page = folder / "config.py"
    page.write_text(f"def get_config(v):\n    return {run_config(data_dir, pairs.folder)!r}\n")
    command, run = ["launch/train.py", f"--config={page}"], folder / "run"
    result = run_forked([*command, f"--workdir={run}"])
    assert result.returncode == 0, result.stderr
    return command, run, result.stdout


def test_training_end_to_end(trained):
    _, run, out = trained
    assert "up to 48 hard negatives, 3 of its own" in out
    assert (
        "hard        of 164 pairs 64 (39.0%) have 3 or more, 33 (20.1%) have 2, 33 (20.1%) have 1, "
        "34 (20.7%) have none\n"
    ) in out
    assert (
        "teacher     scores of 43 of 164 pairs from the pairs; the loss is 1 x contrastive + 0.5 x "
        "divergence of scores\n"
    ) in out
    taught = metric(run, "distillation_scores")
    assert taught[0] > 0.05
    total = np.add(metric(run, "contrastive_loss"), np.multiply(0.5, taught))
    np.testing.assert_allclose(metric(run, "loss"), total + metric(run, "balance"), rtol=1e-5)
    assert "there are no held-out sets" in out
    losses = metric(run, "contrastive_loss")
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert (run / "report.png").is_file()
    assert (run / "results.json").read_text() == "{}\n"  # the run is finished


def test_the_loss_of_a_run_counts_its_hard_negatives(pairs, prepared, trained):
    _, data_dir, _ = prepared
    _, run, _ = trained
    expected, without = dense_losses(pairs, data_dir, run_config(data_dir, pairs.folder))
    assert expected.loss - without.loss > 0.3  # about 40 documents instead of 16
    assert metric(run, "contrastive_loss")[0] == pytest.approx(float(expected.loss), abs=1e-5)
    assert metric(run, "masked_candidates")[0] == pytest.approx(float(expected.masked))


def test_a_run_with_hard_negatives_resumes_on_other_devices(trained, tmp_path):
    command, whole, _ = trained
    run = tmp_path / "run"
    unfinished_copy(whole, run, 2)
    result = run_forked([*command, f"--workdir={run}", "--config.mesh.expert=2"], devices=4)
    assert result.returncode == 0, result.stderr
    assert "data=2 x fsdp=1 x expert=2 on 4 cpu device(s)" in result.stdout
    assert "after step 1" in result.stdout
    for name in ("contrastive_loss", "distillation_scores", "masked_candidates", "grad_norm"):
        np.testing.assert_allclose(metric(run, name), metric(whole, name), atol=1e-5, rtol=1e-5)


def test_batches_say_which_sources_stand_alone(prepared):
    config, data_dir, store = prepared
    values = run_config(data_dir, config["pairs"])
    values["loss"] = {"hard_negatives_only": "descriptions"}
    run = config_module.build(RunConfig, values | {"steps": 12})
    batches = pair_batches(store, run, single_device_mesh(), 1)
    alone = set()
    for step in range(12):
        batch = batches.at(step)
        is_alone = batch.group.task == "descriptions"
        alone.add(is_alone)
        assert (np.asarray(batch.arrays.in_batch_B) != is_alone).all()
        assert batch.arrays.teacher_query_BW.shape == batch.arrays.teacher_score_BM.shape == (16, 0)
    assert alone == {True, False}
    values["loss"] = {"hard_negatives_only": "descriptions web"}
    run = config_module.build(RunConfig, values)
    with pytest.raises(UserError, match=r"there is no source web; sources: descriptions, transl"):
        pair_batches(store, run, single_device_mesh(), 1)


def test_pairs_without_scores_are_refused(prepared, tmp_path):
    config, data_dir, store = prepared
    values = run_config(data_dir, config["pairs"])
    run = config_module.build(RunConfig, values)
    assert open_teaching(store, run).teacher is None
    assert open_teaching(store, dataclasses.replace(run, loss=LossConfig())) is None
    without = TokenStore.open(store.folder)
    without.document_scores = np.full_like(without.document_scores, np.nan)
    without.negative_scores = np.full_like(without.negative_scores, np.nan)
    message = r"scores=0.5: no pair has scores of two .* by launch/mine.py, or take .*='teacher'"
    with pytest.raises(UserError, match=message):
        open_teaching(without, run)


def test_resuming_refuses_other_pairs(pairs, prepared, tmp_path):
    config, data_dir, store = prepared
    other = synthetic_data.write_pairs(tmp_path / "other", seed=2)
    vocabulary = {"kind": "file", "path": str(vocabulary_path(config, data_dir))}
    folder = prepare.prepare(
        {**CONFIG, "pairs": str(other.folder), "vocabulary": vocabulary}, tmp_path
    )
    run = config_module.build(RunConfig, run_config(data_dir, pairs.folder))
    before, now = (workdir.data_spec(s, run) for s in (store, TokenStore.open(folder)))
    workdir.check_data_spec(before, workdir.data_spec(store, run))
    words = f"pairs: {pairs.content_hash[:12]} -> {other.content_hash[:12]}"
    with pytest.raises(UserError, match=words):
        workdir.check_data_spec(before, now)
    fewer = dataclasses.replace(run, data=dataclasses.replace(run.data, negatives=2))
    with pytest.raises(UserError, match="negatives: 3 -> 2"):
        workdir.check_data_spec(before, workdir.data_spec(store, fewer))


def test_a_run_says_how_many_pairs_have_how_many_negatives(prepared):
    config, data_dir, _ = prepared
    store = TokenStore.open(token_store_path(config, data_dir))

    def said(rates, negatives):
        schedule = Schedule(mixture_groups(store.groups, rates), 16, 4, seed=0)
        batches = PairBatches(store, schedule, single_device_mesh(), 48, 6, 1, 0, negatives)
        return describe_hard_negatives(batches)

    counts = np.diff(store.negative_starts[:34])  # the first group
    expected = ", ".join(
        f"{(counts == n).sum()} ({(counts == n).mean():.1%}) have {n or 'none'}"
        for n in (3, 2, 1, 0)
    )
    more = f"{(counts >= 4).sum()} ({(counts >= 4).mean():.1%}) have 4 or more"
    assert said({"descriptions": 1.0}, 4) == f"of 33 pairs {more}, {expected}"
    assert "have 5" not in said({"descriptions": 1.0}, 9)
    store.negative_starts = np.zeros_like(store.negative_starts)
    assert said(None, 4).startswith("WARNING: none of the 164 pairs has a hard negative")


def test_negatives_need_pairs(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(synthetic_data.config_text(tmp_path))
    flags = [f"--config={config}", f"--workdir={tmp_path / 'run'}", "--config.data.negatives=2"]
    result = run_forked(["launch/train.py", *flags])
    assert result.returncode == 2 and "needs data.pairs" in result.stderr
    flags[-1] = "--config.data.pairs=nowhere"
    result = run_forked(["launch/train.py", *flags])
    assert result.returncode == 2 and "nowhere/manifest.json is missing" in result.stderr
