"""Dense encoders made sparse: what each mode keeps, and its use from a training config."""

import json
import re

import jax
import numpy as np
import pytest
from helpers import synthetic_data
from helpers.forked import run_forked
from helpers.published_models import NOMIC, nomic_shapes, random_tensors, write_folder

from moe_embed_jax import Embedder
from moe_embed_jax import config as config_files
from moe_embed_jax.conversion import export_model
from moe_embed_jax.data.data_spec import vocabulary_path
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.layers import by_layer
from moe_embed_jax.interop.upcycle import UpcycleConfig, upcycle
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.model_folder import load_model, place
from moe_embed_jax.routing.router import route
from moe_embed_jax.tokenizers.files import find_tokenizer
from moe_embed_jax.tokenizers.tokenizer_json import TokenizerJson, open_vocabulary
from moe_embed_jax.training import init, workdir
from moe_embed_jax.training.run_config import RunConfig

LENGTHS = dict(query_length=16, document_length=24)
DENSE = NOMIC | dict(num_experts=0, vocab_size=512)


@pytest.fixture(scope="module", params=["rotary", "learned"])
def dense(request, tmp_path_factory):
    """A dense encoder with biases that matter, and a batch."""
    config = DENSE | dict(rotary_emb_fraction=float(request.param == "rotary"))
    folder = tmp_path_factory.mktemp("dense")
    write_folder(folder, config, random_tensors(nomic_shapes(config)))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 512, (6, 20))
    mask = (np.arange(20) < rng.integers(3, 20, 6)[:, None]).astype(int)
    return load_model(folder, single_device_mesh()), ids, mask


def embed(model, params, ids, mask):
    mesh = single_device_mesh()
    embedder = Embedder(model, place(params, model, mesh), None, {}, mesh)
    return embedder.hidden_states(ids, mask)


@pytest.mark.parametrize(("experts", "top_k", "every"), [(8, 2, 2), (4, 3, 1)])
def test_preserving_keeps_the_output(dense, experts, top_k, every):
    loaded, ids, mask = dense
    config = UpcycleConfig("preserving", experts, top_k, every)
    model, params = upcycle(loaded.model, loaded.params, config)
    assert (model.normalize_gates, model.expert_bias) == (True, True)
    expected = embed(loaded.model, loaded.params, ids, mask)
    np.testing.assert_allclose(embed(model, params, ids, mask), expected, atol=1e-5)


def test_paper_mode_is_the_references(dense):
    """Weights copied, biases dropped, router N(0, 0.02); outputs move away from the dense ones."""
    loaded, ids, mask = dense
    model, params = upcycle(loaded.model, loaded.params, UpcycleConfig("paper"))
    assert (model.normalize_gates, model.expert_bias) == (False, False)
    before, after = by_layer(loaded.model, loaded.params), by_layer(model, params)
    for layer in (1, 3):
        for expert in range(8):
            for name, source in (("w_in", "up"), ("w_out", "down")):
                np.testing.assert_array_equal(
                    after[f"layers/{layer}/moe/{name}"][expert],
                    before[f"layers/{layer}/feed_forward/{source}/kernel"],
                )
        assert not after[f"layers/{layer}/moe/bias"].any()
        router = after[f"layers/{layer}/moe/router/kernel"]
        assert 0.015 < router.std() < 0.025
    kept = [name for name in before if name in after]
    assert len(kept) == len(before) - 2 * 4
    for name in kept:
        np.testing.assert_array_equal(before[name], after[name])
    expected = embed(loaded.model, loaded.params, ids, mask)
    assert np.abs(embed(model, params, ids, mask) - expected).max() > 0.1


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 0.43), (0.67, 0.37)])
def test_the_papers_moe_branch_starts_at_a_fraction_of_the_dense_one(scale, expected):
    """The sum of the two gates at the published width, by the tokens' standard deviation."""
    rng = np.random.default_rng(0)
    x_TD = scale * rng.standard_normal((4096, 768), np.float32)
    router_DE = 0.02 * rng.standard_normal((768, 8), np.float32)
    valid_T = np.ones(4096, bool)
    gate_TK = route(x_TD @ router_DE, valid_T, 2)[1]
    np.testing.assert_allclose(np.asarray(gate_TK).sum(1).mean(), expected, atol=0.01)


def test_noise_makes_experts_differ(dense):
    loaded, ids, mask = dense
    config = UpcycleConfig("preserving", noise=0.01, seed=5)
    model, params = upcycle(loaded.model, loaded.params, config)
    w_in = params["groups"]["block_1"]["moe"]["w_in"][0]
    difference = w_in[0] - w_in[1]
    expected = 0.01 * np.sqrt(2) * by_layer(loaded.model, loaded.params)[
        "layers/1/feed_forward/up/kernel"
    ].std()  # fmt: skip
    np.testing.assert_allclose(difference.std(), expected, rtol=0.1)
    again = upcycle(loaded.model, loaded.params, config)[1]
    jax.tree.map(np.testing.assert_array_equal, params, again)
    moved = np.abs(
        embed(model, params, ids, mask) - embed(loaded.model, loaded.params, ids, mask)
    ).max()
    assert 1e-5 < moved < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="magic"), "upcycling mode 'magic': choose from paper, preserving"),
        (dict(mode="preserving", experts_per_token=1), "the router would learn nothing"),
        (dict(moe_every=0), "moe_every=0"),
        (dict(noise=-1.0), "noise=-1.0 must not be negative"),
    ],
)
def test_bad_upcycling_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        UpcycleConfig(**options)


def test_experts_cannot_be_upcycled_again(dense):
    loaded, _, _ = dense
    model, params = upcycle(loaded.model, loaded.params, UpcycleConfig())
    with pytest.raises(UserError, match="has experts already"):
        upcycle(model, params, UpcycleConfig())


### From a training config


@pytest.fixture(scope="module")
def source(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "dense"
    write_folder(folder, DENSE, random_tensors(nomic_shapes(DENSE)))
    vocabulary = vocabulary_path(synthetic_data.PREPARATION, data_dir).read_bytes()
    (folder / "sentencepiece.bpe.model").write_bytes(vocabulary)
    return folder


@pytest.fixture(scope="module")
def page(data_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.py"
    data = synthetic_data.ONE_ROW_COUNT
    text = synthetic_data.config_text(data_dir, steps=4, eval_every=4, data=data, init={})
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def train(page):
    def run(workdir, *flags, **environment):
        arguments = [f"--config={page}", f"--workdir={workdir}", *flags]
        return run_forked(["launch/train.py", *arguments], **environment)

    return run


@pytest.fixture(scope="module")
def prepared(source, data_dir):
    """The synthetic pairs, tokenised with the source's own vocabulary."""
    path = source / "sentencepiece.bpe.model"
    preparation = synthetic_data.PREPARATION | {"vocabulary": {"kind": "file", "path": str(path)}}
    synthetic_data.write_tokens(data_dir, preparation)
    return data_dir


def steps_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_training_starts_from_an_upcycled_model(source, prepared, train, tmp_path):
    """One flag (or line) more; the source decides architecture and vocabulary."""
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    flags = [f"--config.init.source={source}", "--config.init.upcycle=preserving"]
    result = train(sparse, *flags)
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"init +.*dense, upcycled \(preserving\); it decides .*model.width: 768 -> 32",
        result.stdout,
    )
    card = json.loads((sparse / "config.json").read_text())
    assert card["model"]["width"] == 32 and card["model"]["normalize_gates"]
    assert Embedder.load(sparse).encode(["tanara"]).shape == (1, 32)
    # The first step's loss, before any update, is the dense model's.
    result = train(dense, f"--config.init.source={source}")
    assert result.returncode == 0, result.stderr
    losses = [steps_of(run)[0]["contrastive_loss"] for run in (sparse, dense)]
    np.testing.assert_allclose(*losses, atol=1e-4)

    # A resumed run does not need its source any more, nor a card with every key.
    del card["init"]["required"], card["health"], card["crc32"]
    (sparse / "config.json").write_text(json.dumps(card))
    moved = source.rename(source.with_name("moved"))
    result = train(sparse, *flags)
    moved.rename(source)
    assert result.returncode == 0, result.stderr
    assert "resuming" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.init.upcycle=preserving"], "init.upcycle='preserving' needs init.source"),
        (["--config.init.upcycle=magic"], "init.upcycle='magic': choose 'paper'"),
        (["--config.init.source=nowhere"], "model folder nowhere does not exist"),
    ],
)
def test_bad_init_is_one_line(train, tmp_path, flags, message):
    result = train(tmp_path, *flags)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr


def test_a_source_without_a_tokenizer_cannot_train(train, tmp_path):
    write_folder(tmp_path / "bare", DENSE, random_tensors(nomic_shapes(DENSE)))
    result = train(tmp_path / "run", f"--config.init.source={tmp_path / 'bare'}")
    assert result.returncode == 2
    assert "has no tokenizer" in result.stderr


def test_a_tokenizer_json_can_be_trained_on(source, data_dir, tmp_path):
    """Sources that bring only that file, as BERT folders do: data and work directory keep it."""
    folder = tmp_path / "source"
    export_model(source, folder)
    find_tokenizer(folder).unlink()
    path = find_tokenizer(folder)
    assert path.name == "tokenizer.json"
    preparation = synthetic_data.PREPARATION | {"vocabulary": {"kind": "file", "path": str(path)}}
    synthetic_data.write_tokens(data_dir, preparation)
    page = {"init": {"source": str(folder)}, "data": {"dir": str(data_dir), **LENGTHS}}
    config, changed = init.apply_source(config_files.build(RunConfig, page), tmp_path / "run")
    assert "data.vocabulary.path" in " ".join(changed)
    (tmp_path / "run").mkdir()
    _, vocabulary = workdir.open_data(tmp_path / "run", config, write=True)
    # The export's tokenizer_config.json says that markup is text: the copies say it themselves.
    original = open_vocabulary(path)
    assert isinstance(vocabulary, TokenizerJson) and vocabulary.markup_is_text
    assert vocabulary.content_hash == original.content_hash
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == original.model_bytes
    texts = ["tanara <s> nobipo </s>", "<mask>"]
    for ours, theirs in zip(
        vocabulary.encode_texts(texts, 32), original.encode_texts(texts, 32), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


### Real weights


@pytest.mark.network
@pytest.mark.slow
def test_e5_small_upcycled(e5_small, data_dir, train, tmp_path):
    """Step 0 of both modes on multilingual-e5-small, and a training run from it by one flag."""
    loaded = load_model(e5_small, single_device_mesh())
    tokens = loaded.vocabulary.encode_texts(
        ["query: Wo liegt Berlin?", "passage: 東京は首都です"], 64
    )
    mask = np.arange(max(map(len, tokens))) < np.array([len(t) for t in tokens])[:, None]
    ids = np.zeros(mask.shape, int)
    ids[mask] = np.concatenate(tokens)
    expected = embed(loaded.model, loaded.params, ids, mask)
    moved = {}
    for mode in ("preserving", "paper"):
        model, params = upcycle(loaded.model, loaded.params, UpcycleConfig(mode))
        moved[mode] = np.abs(embed(model, params, ids, mask) - expected).max()
    print(f"max-abs change at step 0: {moved}")
    assert moved["preserving"] < 1e-5 and moved["paper"] > 1e-3

    path = e5_small / "sentencepiece.bpe.model"
    preparation = synthetic_data.PREPARATION | {"vocabulary": {"kind": "file", "path": str(path)}}
    synthetic_data.write_tokens(data_dir, preparation)
    flags = [
        "--config.init.upcycle=preserving",
        "--config.steps=2",
        "--config.optimizer.warmup_steps=1",
    ]
    # Optimised programs: the model is large, so computing takes longer than compiling.
    result = train(tmp_path / "run", f"--config.init.source={e5_small}", *flags, XLA_FLAGS="")
    assert result.returncode == 0, result.stderr
    card = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert (card["num_layers"], card["width"], card["positions"]) == (12, 384, "learned")
    assert np.isfinite([record["loss"] for record in steps_of(tmp_path / "run")]).all()
