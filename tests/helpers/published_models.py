"""Random checkpoints in the published layouts, and what an encoder must make of them.

Independent of the package: names and shapes are written out here, and the forward pass is plain
NumPy in float64, token by token where it matters.
"""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file
from scipy.special import erf

NOMIC = {
    "model_type": "nomic_bert",
    "architectures": ["NomicBertModel"],
    "activation_function": "gelu",
    "n_layer": 4,
    "n_head": 2,
    "n_embd": 32,
    "n_inner": 64,
    "vocab_size": 128,
    "type_vocab_size": 1,
    "layer_norm_epsilon": 1e-5,
    "n_positions": 64,
    "rotary_emb_base": 10000,
    "rotary_emb_fraction": 1.0,
    "num_experts": 4,
    "moe_top_k": 2,
    "moe_every_n_layers": 2,
    "moe_normalize_expert_weights": False,
    "prenorm": False,
    "ffn_div": 1,
}


def is_moe(config: dict, layer: int) -> bool:
    every = config["moe_every_n_layers"]
    return bool(config["num_experts"] and every) and layer % every == 1 % every


def nomic_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    d, f, e = config["n_embd"], config["n_inner"] or 4 * config["n_embd"], config["num_experts"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], d),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], d),
        "emb_ln.weight": (d,),
        "emb_ln.bias": (d,),
    }
    if not config["rotary_emb_fraction"]:
        shapes["embeddings.position_embeddings.weight"] = (config["n_positions"], d)
    for i in range(config["n_layer"]):
        layer = f"encoder.layers.{i}."
        shapes |= {
            layer + "attn.Wqkv.weight": (3 * d, d),
            layer + "attn.Wqkv.bias": (3 * d,),
            layer + "attn.out_proj.weight": (d, d),
            layer + "attn.out_proj.bias": (d,),
        }
        shapes |= {layer + f"norm{n}.{p}": (d,) for n in (1, 2) for p in ("weight", "bias")}
        if is_moe(config, i):
            shapes |= {
                layer + "mlp.router.layer.weight": (e, d),
                layer + "mlp.experts.mlp.w1": (e * f, d),
                layer + "mlp.experts.mlp.w2": (e * f, d),
                layer + "mlp.experts.bias": (d,),
            }
            if config.get("moe_expert_bias"):
                shapes[layer + "mlp.experts.mlp.b1"] = (e * f,)
        dense = config.get("moe_shared_expert_width", 0) if is_moe(config, i) else f
        if dense:
            shapes |= {
                layer + "mlp.fc1.weight": (dense, d),
                layer + "mlp.fc1.bias": (dense,),
                layer + "mlp.fc2.weight": (d, dense),
                layer + "mlp.fc2.bias": (d,),
            }
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Norm weights around 1, biases and matrices large enough to matter."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape, np.float32)
        is_norm = "norm" in name.lower() or "emb_ln" in name
        if is_norm and name.endswith("weight"):
            x = 1 + 0.2 * x
        elif "router" in name:
            x *= 0.6
        else:
            x *= 0.15
        tensors[name] = x.astype(np.float32)
    return tensors


def write_folder(folder: pathlib.Path, config: dict, tensors: dict) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _norm(x, weight, bias, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * weight + bias


def _gelu(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def _softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def _rotate(x, base):
    """[L, C]: the pair (c, c + C/2) turns by position * base ** (-2c / C)."""
    length, size = x.shape
    angle = np.arange(length)[:, None] * base ** (-np.arange(0, size, 2) / size)
    first, second = x[:, : size // 2], x[:, size // 2 :]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def nomic_forward(config: dict, tensors: dict, ids) -> tuple[np.ndarray, list[np.ndarray]]:
    """One text without padding: last hidden state [L, D] and, per MoE layer, experts [L, K]."""
    t = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    heads, eps = config["n_head"], config["layer_norm_epsilon"]
    x = (
        t["embeddings.word_embeddings.weight"][ids]
        + t["embeddings.token_type_embeddings.weight"][0]
    )
    if not config["rotary_emb_fraction"]:
        x = x + t["embeddings.position_embeddings.weight"][: len(ids)]
    x = _norm(x, t["emb_ln.weight"], t["emb_ln.bias"], eps)
    chosen = []
    for i in range(config["n_layer"]):
        w = {n.split(f"layers.{i}.")[1]: a for n, a in t.items() if f"layers.{i}." in n}
        q, k, v = np.split(x @ w["attn.Wqkv.weight"].T + w["attn.Wqkv.bias"], 3, axis=1)
        context = np.zeros_like(x)
        size = x.shape[1] // heads
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            qh, kh = q[:, part], k[:, part]
            if config["rotary_emb_fraction"]:
                qh, kh = (_rotate(a, config["rotary_emb_base"]) for a in (qh, kh))
            context[:, part] = _softmax(qh @ kh.T / np.sqrt(size)) @ v[:, part]
        attended = context @ w["attn.out_proj.weight"].T + w["attn.out_proj.bias"]
        x = _norm(x + attended, w["norm1.weight"], w["norm1.bias"], eps)
        y = np.zeros_like(x)
        if is_moe(config, i):
            y, experts = _moe(config, w, x)
            chosen.append(experts)
        if "mlp.fc1.weight" in w:  # a dense layer, or a shared expert
            hidden = _gelu(x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
            y = y + hidden @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
        x = _norm(x + y, w["norm2.weight"], w["norm2.bias"], eps)
    return x, chosen


def _moe(config, w, x):
    experts, top_k, ffn = config["num_experts"], config["moe_top_k"], config["n_inner"]
    ffn = ffn or 4 * config["n_embd"]
    w1 = w["mlp.experts.mlp.w1"].reshape(experts, ffn, -1)
    w2 = w["mlp.experts.mlp.w2"].reshape(experts, ffn, -1)
    b1 = w.get("mlp.experts.mlp.b1", np.zeros(experts * ffn)).reshape(experts, ffn)
    probability = _softmax(x @ w["mlp.router.layer.weight"].T)
    best = np.argsort(-probability, axis=1, kind="stable")[:, :top_k]
    y = np.zeros_like(x)
    for token in range(len(x)):
        gates = probability[token, best[token]]
        if config["moe_normalize_expert_weights"]:
            gates = gates / gates.sum()
        for expert, gate in zip(best[token], gates, strict=True):
            y[token] += gate * (_gelu(w1[expert] @ x[token] + b1[expert]) @ w2[expert])
    return y + w["mlp.experts.bias"], best
