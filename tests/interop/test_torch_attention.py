"""Attention of the exported PyTorch file through transformers' interface: eager, sdpa, flash
attention and vLLM, whose functions are imitated here because they need a GPU."""

import ast
import inspect
import textwrap

import pytest
from test_torch_model import LEARNED, make_batch, make_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
interface = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS


@pytest.fixture
def register(monkeypatch):
    """Registers an attention function under a name for one test."""
    mapping = dict(type(interface)._global_mapping)
    monkeypatch.setattr(type(interface), "_global_mapping", mapping)
    return mapping.__setitem__


def embed(model, batch, implementation):
    if "flash" in implementation:  # transformers would look for its package
        model.config._attn_implementation = implementation
    else:
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model.embed(*batch)


@pytest.mark.parametrize("changes", [{}, LEARNED], ids=["rotary", "learned"])
def test_eager_and_sdpa_give_the_same(changes):
    model, batch = make_model(**changes), make_batch(lengths=(9, 4, 0))
    assert model.config._attn_implementation == "sdpa"
    expected = embed(model, batch, "sdpa")
    found = embed(model, batch, "eager")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    unpadded = (batch[0][:1], None)
    torch.testing.assert_close(embed(model, unpadded, "eager"), expected[:1], atol=1e-6, rtol=0)


def attend_each(q, k, v, scaling, lengths):
    """Attention inside texts that lie one after the other: [T, H, C]."""
    parts = [x.split(lengths) for x in (q, k, v)]
    outputs = []
    for query, key, value in zip(*parts, strict=True):
        weights = (torch.einsum("qhc,khc->hqk", query, key) * scaling).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khc->qhc", weights, value))
    return torch.cat(outputs)


def test_flash_attention_gets_the_tokens_of_each_text(register):
    """As transformers does for it: padding is cut by a mask [B, L], texts are put together."""

    def attention(module, query, key, value, attention_mask, scaling, dropout, **_):
        assert not module.is_causal and dropout == 0.0
        assert attention_mask.shape == (query.shape[0], query.shape[2])
        q, k, v = (x.transpose(1, 2)[attention_mask] for x in (query, key, value))
        out = torch.zeros_like(query.transpose(1, 2))
        out[attention_mask] = attend_each(q, k, v, scaling, attention_mask.sum(dim=1).tolist())
        return out, None

    register("stand_in_for_flash_attention", attention)
    model, batch = make_model(), make_batch(lengths=(9, 4, 0))
    assert model._supports_flash_attn
    expected = embed(model, batch, "sdpa")
    found = embed(model, batch, "stand_in_for_flash_attention")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_packed_texts_as_vllm_gives_them(register):
    """All texts in one row without a mask, by the arguments of its Transformers backend; its
    function returns [T, H * C] and keeps texts apart itself."""
    lengths = [9, 4, 1]

    def attention(module, query, key, value, attention_mask, scaling, **_):
        assert attention_mask is None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return attend_each(q, k, v, scaling, lengths).flatten(1), None

    register("stand_in_for_vllm", attention)
    # In double precision: processors round float32 products of other shapes differently.
    model, (ids, mask) = make_model(moe_expert_bias=True).double(), make_batch(lengths)
    with torch.no_grad():
        expected = model(ids, mask).last_hidden_state[mask.bool()]
        model.set_attn_implementation("stand_in_for_vllm")
        row = ids[mask.bool()][None]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        arguments = dict(position_ids=positions, use_cache=False, return_dict=False)
        packed = model(input_ids=row, inputs_embeds=None, **arguments)[0][0]
        words = model.get_input_embeddings()(row)
        from_words = model(input_ids=None, inputs_embeds=words, **arguments)[0][0]
    torch.testing.assert_close(packed, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(from_words, packed, atol=0, rtol=0)


def test_what_vllm_looks_for():
    """The conditions of vLLM 0.33 for its Transformers backend, which reads the source."""
    with torch.device("meta"):
        model = make_model.__globals__["source"].NomicBertModel(make_model().config)
    assert model.is_backend_compatible() and model.get_decoder() is model
    assert {"input_ids", "inputs_embeds", "position_ids"} <= set(
        inspect.signature(model.forward).parameters
    )
    config = model.config.get_text_config()
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (16, 2, 4)
    assert (config.intermediate_size, config.max_position_embeddings) == (24, 32)
    layers = [layer.attn for layer in model.encoder.layers]
    assert [attention.layer_idx for attention in layers] == [0, 1, 2, 3]
    assert all(attention.config is model.config for attention in layers)
    assert not any(attention.is_causal for attention in layers)
    # The call of a name that was assigned from ALL_ATTENTION_FUNCTIONS.
    tree = ast.parse(textwrap.dedent(inspect.getsource(type(layers[0]).forward)))
    names = [
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and getattr(node.value.func.value, "id", "") == "ALL_ATTENTION_FUNCTIONS"
    ]
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in names
    ]
    assert len(names) == len(calls) == 1
    scaling = next(word.value for word in calls[0].keywords if word.arg == "scaling")
    assert ast.unparse(scaling) == "self.scaling" and layers[0].scaling == 8**-0.5
