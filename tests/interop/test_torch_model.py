"""The PyTorch file of an exported folder: its numbers, tracing it, loading it, being refused."""

import importlib.util
import json
import math
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from moe_embed_jax.models import attention

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # everything is tiny: threads only get in each other's way

SOURCE = ROOT / "moe_embed_jax" / "interop" / "torch_model.py"
FIXTURE = ROOT.parent / "shared" / "fixtures" / "nomic_moe_tiny"
SMALL = {
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 4,
    "n_head": 2,
    "n_inner": 24,
    "n_positions": 32,
    "num_experts": 4,
    "moe_top_k": 2,
    "moe_every_n_layers": 2,
    "rotary_emb_base": 100,
}
LEARNED = {"rotary_emb_fraction": 0, "type_vocab_size": 2}


def load_source():
    """As an application sees it: one file, without this package and without JAX."""
    if "modeling_moe_embed" not in sys.modules:
        spec = importlib.util.spec_from_file_location("modeling_moe_embed", SOURCE)
        sys.modules["modeling_moe_embed"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["modeling_moe_embed"])
    return sys.modules["modeling_moe_embed"]


source = load_source()


def make_model(seed=0, **changes):
    """Small, with weights large enough that tokens differ in their experts."""
    torch.manual_seed(seed)
    model = source.NomicBertModel(source.NomicBertConfig(**(SMALL | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model.eval()


def make_batch(lengths=(9, 4, 1), width=9, seed=0):
    ids = torch.randint(4, 40, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return ids.where(mask.bool(), 1), mask


# ---- an independent implementation: one text, float64, one token at a time ------------------


def reference(model, ids):
    """Token states [L, D] of one text without padding."""
    c = model.config
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    half = c.n_embd // c.n_head // 2

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        scaled = (x - x.mean()) / math.sqrt(x.var() + c.layer_norm_epsilon)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x):
        return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])

    def turn(x, position):
        if not c.rotary_emb_fraction:
            return x
        z = x[:half] + 1j * x[half:]
        z = z * np.exp(1j * position * c.rotary_emb_base ** (-np.arange(half) / half))
        return np.concatenate([z.real, z.imag])

    def attend(x, name):
        q, k, v = np.moveaxis(linear(x, f"{name}.Wqkv").reshape(len(x), 3, c.n_head, -1), 1, 0)
        rows = np.zeros_like(q)
        for head in range(c.n_head):
            for i in range(len(x)):
                query = turn(q[i, head], i)
                score = [query @ turn(k[j, head], j) / math.sqrt(2 * half) for j in range(len(x))]
                weight = np.exp(np.array(score) - max(score))
                rows[i, head] = weight / weight.sum() @ v[:, head]
        return linear(rows.reshape(len(x), -1), f"{name}.out_proj")

    def experts(x, name):
        probability = np.exp(weights[f"{name}.router.layer.weight"] @ x)
        probability /= probability.sum()
        chosen = np.argsort(-probability)[: c.moe_top_k]
        total = probability[chosen].sum() if c.moe_normalize_expert_weights else 1.0
        y = weights[f"{name}.experts.bias"].copy()
        for e in chosen:
            rows = slice(e * c.n_inner, (e + 1) * c.n_inner)
            hidden = weights[f"{name}.experts.mlp.w1"][rows] @ x
            if c.moe_expert_bias:
                hidden += weights[f"{name}.experts.mlp.b1"][rows]
            y += probability[e] / total * gelu(hidden) @ weights[f"{name}.experts.mlp.w2"][rows]
        return y

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.token_type_embeddings.weight"][0]
    if not c.rotary_emb_fraction:
        x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = np.array([norm(row, "emb_ln") for row in x])
    for i in range(c.n_layer):
        name = f"encoder.layers.{i}"
        attended = attend(x, f"{name}.attn")
        x = np.array([norm(a + b, f"{name}.norm1") for a, b in zip(attended, x, strict=True)])
        y = np.zeros_like(x)
        if f"{name}.mlp.router.layer.weight" in weights:
            y += [experts(row, f"{name}.mlp") for row in x]
        if f"{name}.mlp.fc1.weight" in weights:
            y += [linear(gelu(linear(row, f"{name}.mlp.fc1")), f"{name}.mlp.fc2") for row in x]
        x = np.array([norm(a + b, f"{name}.norm2") for a, b in zip(y, x, strict=True)])
    return x


@pytest.mark.parametrize(("head", "base"), [(16, 100), (32, 10_000), (64, 10_000), (64, 500_000)])
def test_far_positions_turn_by_the_same_angles_as_ours(head, base):
    """A frequency that is one rounding off turns position 2,000 by 1e-4 more."""
    positions = np.arange(2048)[None]
    tables = load_source().rotary_tables(torch.from_numpy(positions), head, base)
    ours = jax.jit(attention.rotation, static_argnums=(1, 2))(jnp.asarray(positions), head, base)
    exact = np.float32(float(base) ** (-np.arange(head // 2) / (head // 2)))
    angle = positions[..., None].astype(np.float32) * exact
    for table, our, function, sign in zip(tables, ours, (np.cos, np.sin), (1, -1), strict=True):
        expected = function(angle.astype(np.float64))
        np.testing.assert_allclose(table[0], expected, atol=5e-7)
        np.testing.assert_allclose(our[..., head // 2 :], expected, atol=5e-7)
        np.testing.assert_allclose(our[..., : head // 2], sign * expected, atol=5e-7)


@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [
        ({}, [1, 3]),
        ({"moe_normalize_expert_weights": True, "moe_top_k": 3}, [1, 3]),
        ({"moe_expert_bias": True}, [1, 3]),
        ({"moe_shared_expert_width": 24}, [1, 3]),
        (LEARNED, [1, 3]),
        ({"n_layer": 3}, [1]),
        ({"moe_every_n_layers": 1, "n_layer": 2}, [0, 1]),
        ({"moe_every_n_layers": 3}, [1]),
        ({"moe_every_n_layers": 0, "n_inner": None, "n_layer": 1}, []),
    ],
)
def test_equals_the_reference(changes, moe_layers):
    model = make_model(**changes)
    assert [i for i, x in enumerate(model.encoder.layers) if hasattr(x.mlp, "router")] == moe_layers
    ids, mask = make_batch()
    with torch.no_grad():
        states = model(ids, mask).last_hidden_state.numpy()
        pooled = model.embed(ids, mask, normalize=False).numpy()
    for row, length in enumerate(mask.sum(dim=1)):
        expected = reference(model, ids[row, :length].numpy())
        np.testing.assert_allclose(states[row, :length], expected, atol=2e-5)
        np.testing.assert_allclose(pooled[row], expected.mean(axis=0), atol=2e-5)


def test_equals_the_fixture():
    if not FIXTURE.is_dir():
        pytest.skip("needs the shared fixture nomic_moe_tiny")
    load_file = pytest.importorskip("safetensors.torch").load_file
    config = source.NomicBertConfig(**json.loads((FIXTURE / "config.json").read_text()))
    model = source.NomicBertModel(config).eval()
    model.load_state_dict(load_file(FIXTURE / "model.safetensors"))
    expected = np.load(FIXTURE / "expected.npz")
    ids, mask = (torch.tensor(expected[name]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        states = model(ids, mask).last_hidden_state.numpy()
        pooled = model.embed(ids, mask, normalize=False).numpy()
        embedding, quarter = (model.embed(ids, mask, dim=dim).numpy() for dim in (None, 16))
    real = mask.numpy() > 0
    assert np.abs(states - expected["last_hidden_state"])[real].max() < 2e-5
    assert np.abs(pooled - expected["mean_pooled"]).max() < 1e-5
    assert np.abs(embedding - expected["embedding"]).max() < 2e-6
    assert np.abs(quarter - expected["embedding_quarter"]).max() < 2e-6


def test_the_released_size_has_the_published_tensors():
    config = source.NomicBertConfig(num_experts=8, moe_top_k=2)
    with torch.device("meta"):
        model = source.NomicBertModel(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = {
        "embeddings.word_embeddings.weight": (250048, 768),
        "embeddings.token_type_embeddings.weight": (1, 768),
        "emb_ln.weight": (768,),
        "emb_ln.bias": (768,),
    }
    for i in range(12):
        layer = {"attn.Wqkv": (2304, 768), "attn.out_proj": (768, 768), "norm1": (), "norm2": ()}
        if i % 2 == 0:
            layer |= {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
        else:
            name = f"encoder.layers.{i}.mlp"
            expected[f"{name}.router.layer.weight"] = (8, 768)
            expected[f"{name}.experts.mlp.w1"] = (24576, 768)
            expected[f"{name}.experts.mlp.w2"] = (24576, 768)
            expected[f"{name}.experts.bias"] = (768,)
        for name, shape in layer.items():
            expected[f"encoder.layers.{i}.{name}.weight"] = shape or (768,)
            expected[f"encoder.layers.{i}.{name}.bias"] = shape[:1] or (768,)
    assert shapes == expected
    assert len(shapes) == 148
    assert sum(math.prod(shape) for shape in shapes.values()) == 475_292_928
    assert not list(model.buffers())


def test_padding_content_and_width_cannot_matter():
    model = make_model()
    ids, mask = make_batch(lengths=(5, 0), width=6)
    wide = torch.nn.functional.pad(ids, (0, 3), value=7)
    other = wide.where(torch.nn.functional.pad(mask, (0, 3)).bool(), 33)
    with torch.no_grad():
        expected = model.embed(ids, mask)
        for padded in (wide, other):
            found = model.embed(padded, torch.nn.functional.pad(mask, (0, 3)))
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(model.embed(ids[:1, :5]), expected[:1], atol=1e-6, rtol=0)
    assert expected[1].abs().max() == 0  # a text without tokens


def test_token_type_and_return_dict():
    model = make_model(**LEARNED)
    ids, mask = make_batch()
    with torch.no_grad():
        absent = model(ids, mask, return_dict=False)[0]
        zeros = model(ids, mask, torch.zeros_like(ids)).last_hidden_state
        ones = model(ids, mask, torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(absent, zeros)
    assert (absent - ones).abs().max() > 0.1


def test_embed_cuts_features_after_pooling():
    model = make_model()
    ids, mask = make_batch()
    with torch.no_grad():
        whole, cut = model.embed(ids, mask, normalize=False), model.embed(ids, mask, dim=6)
    torch.testing.assert_close(cut, torch.nn.functional.normalize(whole[:, :6], dim=-1))


def test_gradients_reach_every_parameter():
    model = make_model(moe_expert_bias=True, moe_normalize_expert_weights=True).train()
    ids, mask = make_batch(lengths=(24, 20, 16), width=24)
    states = model(ids, mask).last_hidden_state
    (states * torch.randn_like(states)).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


class Embedding(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model.embed(ids, mask)


def assert_follows_other_batches(program, model):
    """The routing, the batch and the length are not those it was traced with."""
    for lengths, width in (((9, 4, 1), 9), ((17, 3, 17, 8, 1), 17), ((1,), 1)):
        batch = make_batch(lengths, width, seed=width)
        with torch.no_grad():
            torch.testing.assert_close(program(*batch), model(*batch), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore")  # jit.trace is deprecated and says so at length
def test_jit_trace_is_independent_of_the_traced_batch():
    model = Embedding(make_model(moe_expert_bias=True))
    assert_follows_other_batches(torch.jit.trace(model, make_batch()), model)


@pytest.mark.filterwarnings("ignore")
def test_export_has_dynamic_batch_and_length():
    model = Embedding(make_model(n_layer=2))
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, make_batch(), dynamic_shapes=(axes, axes))
    assert_follows_other_batches(program.module(), model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_function", "swiglu"),
        ("prenorm", True),
        ("rotary_emb_interleaved", True),
        ("rotary_emb_scale_base", 512),
        ("rotary_scaling_factor", 2.0),
        ("rotary_emb_fraction", 0.5),
        ("expert_choice_router", True),
        ("num_shared_experts", 1),
        ("qkv_proj_bias", False),
        ("n_embd", 15),
    ],
)
def test_unsupported_architecture_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        source.NomicBertConfig(**{name: value})


# ---- the exported folder ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Saved by the class itself, as after fine-tuning; nothing of it is imported yet."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code")
    )
    path = tmp_path / "exported"
    model = make_model()
    model.save_pretrained(path)
    shutil.copy(SOURCE, path / "modeling_moe_embed.py")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_moe_embed.NomicBertConfig",
        "AutoModel": "modeling_moe_embed.NomicBertModel",
    }
    (path / "config.json").write_text(json.dumps(config))
    return path, model


def test_a_folder_loads_offline_and_survives_saving(folder, tmp_path):
    path, model = folder
    batch = make_batch()
    for name in ("exported", "saved_again"):
        loaded, report = transformers.AutoModel.from_pretrained(
            tmp_path / name, trust_remote_code=True, local_files_only=True, output_loading_info=True
        )
        assert type(loaded).__module__.startswith("transformers_modules.")
        assert not report["missing_keys"] and not report["unexpected_keys"]
        torch.testing.assert_close(loaded.embed(*batch), model.embed(*batch), atol=0, rtol=0)
        loaded.save_pretrained(tmp_path / "saved_again")
    again = json.loads((tmp_path / "saved_again" / "config.json").read_text())
    assert again["model_type"] == "nomic_bert"
    assert again["auto_map"] == json.loads((path / "config.json").read_text())["auto_map"]
    assert "max_position_embeddings" not in again  # a duplicate of n_positions stops other readers


@pytest.mark.parametrize("trust", [None, False])
def test_forgetting_trust_remote_code_is_an_error(folder, trust, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "n")  # transformers may ask
    with pytest.raises(Exception, match="trust_remote_code=True"):
        transformers.AutoModel.from_pretrained(folder[0], trust_remote_code=trust)
