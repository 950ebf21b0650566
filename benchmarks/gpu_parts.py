"""The parts of gpu_check.py that measure this repository.

A part is a generator: (sizes, rows of earlier parts) -> rows, each with `name`, `value`, `unit` and
perhaps a `note`. What it raises becomes a row, too.
"""

import dataclasses
import functools
import math
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from moe_embed_jax import Embedder
from moe_embed_jax import config as config_files
from moe_embed_jax.mesh import has_triton, make_mesh, platform
from moe_embed_jax.model_folder import PROMPTS, LoadedModel, save_model
from moe_embed_jax.models import attention as attentions
from moe_embed_jax.models.encoder import EncoderConfig, init_params
from moe_embed_jax.models.moe import GELU_MLP
from moe_embed_jax.planning.cards import CARDS
from moe_embed_jax.planning.request import PLANNED_CONFIGS
from moe_embed_jax.routing.exchange import Experts
from moe_embed_jax.stages.registry import STAGES
from moe_embed_jax.tokenizers.vocabulary import train_vocabulary
from moe_embed_jax.training.optimizer import make_optimizer
from moe_embed_jax.training.overview import training_flops_per_token
from moe_embed_jax.training.state import create_state
from moe_embed_jax.training.step import jit_train_step

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Largest norm of a difference over the norm of the oracle's array, which is float32.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


class Skipped(Exception):
    """A part that this machine cannot run; the message says why."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """rows: of attention, (how many, slots of each). changes: of the config of the step. dtype: of
    what is timed."""

    product: int
    copied: int  # bytes
    tokens: tuple[int, ...]
    checked_tokens: int
    width: int
    ffn_width: int
    heads: int
    rows: tuple[tuple[int, int], ...]
    config: str
    changes: dict
    texts: int
    encoder: dict
    dtype: str
    calls: int


FULL = Sizes(
    product=8192,
    copied=2**31,
    tokens=(16_384, 65_536),
    checked_tokens=4096,
    width=768,
    ffn_width=3072,
    heads=12,
    rows=((456, 256), (16, 2048)),
    config="configs/pretrain.py",
    changes={"batch_size": "1024"},
    texts=20_000,
    encoder=dict(dtype="bfloat16"),
    dtype="bfloat16",
    calls=10,
)
SMALL = Sizes(
    product=64,
    copied=2**16,
    tokens=(48,),
    checked_tokens=48,
    width=32,
    ffn_width=64,
    heads=2,
    rows=((2, 128),),
    config="configs/pretrain.py:smoke",
    changes={"batch_size": "8", "model.num_layers": "2", "data.chunk_rows": "0"},
    texts=20,
    encoder=dict(num_layers=2, width=32, num_heads=2, ffn_width=64, num_experts=4),
    dtype="float32",  # XLA for CPUs lacks products of the dense oracle in bfloat16
    calls=1,
)


def seconds_of(function, *arguments, calls: int) -> float:
    """Of one call, in the mean, after two that are not timed."""
    for _ in range(2):
        jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    for _ in range(calls):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def guarded(name: str, measure, *arguments) -> dict:
    """The row `name` of what `measure` gives, or of its error: the other rows of a part go on."""
    try:
        return {"name": name, **measure(*arguments)}
    except Exception as error:
        return {"name": name, "error": one_line(error)}


def measured(rows: list[dict], name: str) -> float | None:
    """What an earlier part found."""
    return next((row["value"] for row in rows if row["name"] == name and "value" in row), None)


def share(rate: float, peak: float | None, of: str) -> str:
    return f"{rate / peak:.1%} of {of}" if peak else ""


def card():
    """What NVIDIA says of this card, if planning knows it."""
    kind = jax.devices()[0].device_kind
    return next((card for card in CARDS.values() if card.description == kind), None)


PRODUCTS = "bfloat16 products"


def roofline(sizes: Sizes, rows):
    n, of_card = sizes.product, card()
    x = jax.random.normal(jax.random.key(0), (n, n))
    for name, dtype, precision, peak in (
        (PRODUCTS, jnp.bfloat16, None, of_card and of_card.peak_flops),
        ("float32 products, default", jnp.float32, None, of_card and of_card.tf32_flops),
        ("float32 products, highest", jnp.float32, "highest", of_card and of_card.float32_flops),
    ):
        product = jax.jit(functools.partial(jnp.matmul, precision=precision))
        a = x.astype(dtype)
        rate = 2 * n**3 / seconds_of(product, a, a, calls=sizes.calls)
        note = share(rate, peak, "NVIDIA's peak")
        yield {"name": name, "value": rate / 1e12, "unit": "TFLOP/s", "note": note}
    array = jnp.zeros(sizes.copied // 4, jnp.float32)
    rate = 2 * sizes.copied / seconds_of(jax.jit(lambda a: a + 1), array, calls=sizes.calls)
    note = share(rate, of_card and of_card.hbm_bandwidth, "NVIDIA's bandwidth")
    yield {"name": "memory, read and write", "value": rate / 1e9, "unit": "GB/s", "note": note}


# ---- Against oracles -----------------------------------------------------------------------------


def experts_case(sizes: Sizes, tokens: int, dtype):
    """x, experts, gates and weights of a layer of 8 experts of which each token uses 2."""
    keys = jax.random.split(jax.random.key(1), 5)
    width, ffn, experts = sizes.width, sizes.ffn_width, 8
    w_in = jax.random.normal(keys[1], (experts, width, ffn)) * width**-0.5
    w_out = jax.random.normal(keys[2], (experts, ffn, width)) * ffn**-0.5
    _, expert_TK = jax.lax.top_k(jax.random.normal(keys[3], (tokens, experts)), 2)
    return (
        jax.random.normal(keys[0], (tokens, width)).astype(dtype),
        expert_TK.astype(jnp.int32),
        jax.random.uniform(keys[4], (tokens, 2)),
        {"w_in": w_in.astype(dtype), "bias_in": None, "w_out": w_out.astype(dtype)},
    )


def experts_gradients(backend: str):
    layer = Experts(backend, exchange="ring", capacity_factor=1.25).layer(GELU_MLP)

    def loss(x_TD, expert_TK, gate_TK, weights):
        y_TD, _ = layer(x_TD, expert_TK, gate_TK, weights)
        y_TD = y_TD.astype(jnp.float32)
        return jnp.sum(y_TD * jnp.cos(jnp.arange(y_TD.size)).reshape(y_TD.shape)), y_TD

    return jax.jit(jax.grad(loss, argnums=(0, 2, 3), has_aux=True))


def attention_case(sizes: Sizes, rows: int, length: int, dtype):
    """qkv, texts of 64 slots with padding at the end, and heads."""
    qkv = jax.random.normal(jax.random.key(2), (rows, length, 3 * sizes.width)).astype(dtype)
    index = np.arange(length) // 64
    index[-length // 8 :] = -1
    return qkv, jnp.asarray(np.broadcast_to(index, (rows, length)), jnp.int32)


def attention_gradients(function, heads: int):
    def loss(qkv_RLU, text_index_RL):
        context_RLD = function(qkv_RLU, text_index_RL, None, heads).astype(jnp.float32)
        context_RLD = jnp.where(text_index_RL[..., None] >= 0, context_RLD, 0)
        weight = jnp.cos(jnp.arange(context_RLD.size)).reshape(context_RLD.shape)
        return jnp.sum(context_RLD * weight), context_RLD

    return jax.jit(jax.grad(loss, has_aux=True))


def attention_functions(length: int) -> dict:
    """Those of this device, besides the plain one; interpreted where it is no GPU."""
    interpret = platform() != "gpu"
    found = {
        "triton": functools.partial(attentions.long_triton_attention, interpret=interpret),
        "cudnn": attentions.cudnn_attention,
    }
    if interpret or length > attentions.LONGEST_MASK:
        del found["cudnn"]
    return found


def compare(gradients, case, oracle, dtype) -> dict:
    pairs = zip(jax.tree.leaves(gradients(*case)), jax.tree.leaves(oracle), strict=True)
    worst = max(
        float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) for a, b in pairs
    )
    most = TOLERANCE[dtype]
    row = {"value": worst, "unit": f"difference (at most {most:g})"}
    return row if worst <= most else row | {"error": f"differs from the oracle by {worst:.2g}"}


def kernels_equal_oracles(sizes: Sizes, rows):
    if platform() == "gpu" and not has_triton():
        raise Skipped("this GPU has no Triton kernels")
    with jax.default_matmul_precision("highest"):
        for dtype in TOLERANCE:
            case = experts_case(sizes, sizes.checked_tokens, dtype)
            exact = jax.tree.map(
                lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, case
            )
            oracle = experts_gradients("reference")(*exact)
            gradients = experts_gradients("ragged")
            yield guarded(f"experts: ragged, {dtype}", compare, gradients, case, oracle, dtype)
            for count, length in sizes.rows:
                qkv, index = attention_case(sizes, min(count, 16), length, dtype)
                oracle = attention_gradients(attentions.attention, sizes.heads)(
                    qkv.astype(jnp.float32), index
                )
                for name, function in attention_functions(length).items():
                    if name == "cudnn" and dtype == "float32":
                        continue  # it has none
                    gradients = attention_gradients(function, sizes.heads)
                    label = f"attention: {name}, rows of {length}, {dtype}"
                    yield guarded(label, compare, gradients, (qkv, index), oracle, dtype)


# ---- Against the ideal ---------------------------------------------------------------------------


def against_ideal(gradients, case, calls: int, ideal: float, peak: float | None) -> dict:
    seconds = seconds_of(gradients, *case, calls=calls)
    note = share(ideal / seconds / 1e12, peak, "the measured bfloat16 products")
    return {"value": seconds * 1e3, "unit": "ms", "note": note}


def experts(sizes: Sizes, rows):
    peak = measured(rows, PRODUCTS)
    for tokens in sizes.tokens:
        case = experts_case(sizes, tokens, sizes.dtype)
        ideal = 3 * 2 * 2 * tokens * 2 * sizes.width * sizes.ffn_width
        for backend in ("ragged", "reference", "capacity", "blocked"):
            calls = 1 if backend == "blocked" else sizes.calls
            gradients = experts_gradients(backend)
            name = f"{backend}, {tokens} tokens"
            yield guarded(name, against_ideal, gradients, case, calls, ideal, peak)


def attention(sizes: Sizes, rows):
    peak = measured(rows, PRODUCTS)
    for count, length in sizes.rows:
        case = attention_case(sizes, count, length, sizes.dtype)
        # All scores count, those of other texts too.
        ideal = (2 + 5) * 2 * count * length**2 * sizes.width
        for name, function in {
            "plain": attentions.attention,
            **attention_functions(length),
        }.items():
            gradients = attention_gradients(function, sizes.heads)
            name = f"{name}, {count} rows of {length}"
            yield guarded(name, against_ideal, gradients, case, sizes.calls, ideal, peak)


# ---- The whole -----------------------------------------------------------------------------------


def random_batch(batch_class, shapes: dict, pairs: int, slots: int, vocabulary: int):
    """Pairs of the shapes' rows: as many texts in each row, of equal lengths."""
    rng = np.random.default_rng(0)
    chunks, rows, length = shapes["token_CRL"]
    texts = -(-2 * pairs // (chunks * rows))  # of a row
    size = length // texts
    index = np.minimum(np.arange(length) // size, texts - 1)
    place = np.arange(length) - index * size
    flat = (np.arange(chunks * rows)[:, None] * slots + np.arange(texts)).reshape(-1)[: 2 * pairs]
    ids = rng.integers(-(2**31), 2**31, (2 * pairs, 2))
    arrays = dict(
        token_CRL=rng.integers(5, vocabulary, (chunks, rows, length)),
        text_index_CRL=np.broadcast_to(index, (chunks, rows, length)),
        position_CRL=np.broadcast_to(place, (chunks, rows, length)),
        query_slot_B=flat[:pairs],
        document_slot_BM=flat[pairs:, None],
        query_id_B2=ids[:pairs],
        document_id_BM2=ids[pairs:, None],
        valid_BM=np.ones((pairs, 1), bool),
    )
    as_stored = {k: np.asarray(v, bool if v.dtype == bool else np.int32) for k, v in arrays.items()}
    return batch_class(**as_stored)


def training_step(sizes: Sizes, rows):
    changes = {"data.dir": "none", **sizes.changes}
    config = config_files.load(PLANNED_CONFIGS, str(ROOT / sizes.config), changes)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        load = STAGES[config.objective].workload(config, mesh, 12.0, 90.0)
        optimizer = make_optimizer(config.optimizer, config.steps)
        state = create_state(load.stage, optimizer, mesh, config.seed)
        slots, words = config.data.texts_per_row, config.model.vocab_size
        batch = random_batch(load.stage.Batch, load.batch_shapes, config.batch_size, slots, words)
        step, losses, times = jit_train_step(load.stage, optimizer, mesh), [], []
        for _ in range(3 + sizes.calls):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))  # waits
            times.append(time.perf_counter() - start)
    if not np.isfinite(losses).all():
        raise ValueError(f"the loss is not finite: {losses}")
    seconds, of_card = float(np.median(times[2:])), card()
    rate = load.model_flops / seconds
    tokens = math.prod(load.batch_shapes["token_CRL"])
    yield {"name": "step", "value": seconds * 1e3, "unit": "ms", "note": load.note}
    yield {"name": "loss", "value": losses[-1], "unit": "", "note": f"of {losses[0]:.3f} at first"}
    yield {"name": "rate", "value": tokens / seconds, "unit": "slots/s"}
    peak = of_card.peak_flops / 1e12 if of_card else measured(rows, PRODUCTS)
    if peak:
        of = "of NVIDIA's bfloat16 peak" if of_card else "of the measured products"
        yield {"name": "MFU", "value": rate / 1e12 / peak, "unit": of}
    if memory := jax.devices()[0].memory_stats():
        used = memory["peak_bytes_in_use"] / 2**30
        yield {"name": "peak memory", "value": used, "unit": "GiB", "note": "of the process so far"}


def texts_of(sizes: Sizes) -> tuple[list[str], list[str]]:
    """(texts of 3 to 200 made-up words, the words)."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(2, 8))) for _ in range(2000)]
    counts = np.exp(rng.uniform(np.log(3), np.log(200), sizes.texts)).astype(int)
    return [" ".join(rng.choice(words, count)) for count in counts], words


def save_encoder(sizes: Sizes, folder: pathlib.Path) -> None:
    """A model folder of the paper's model with random weights, and a vocabulary of the words."""
    vocabulary = train_vocabulary(texts_of(sizes)[1], folder / "vocabulary.model", 512)
    model = EncoderConfig(vocab_size=512, **sizes.encoder)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    lengths = {"query": 32, "document": 256}
    loaded = LoadedModel(model, params, None, vocabulary, PROMPTS, lengths)
    save_model(folder / "ours", loaded, "random numbers")


def encoding(sizes: Sizes, rows):
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        save_encoder(sizes, pathlib.Path(folder))
        embedder = Embedder.load(f"{folder}/ours")
    texts, _ = texts_of(sizes)
    tokens = sum(len(ids) for ids in embedder.tokenize(texts, "document"))
    embeddings = embedder.encode(texts, "document")  # compiles
    if not np.isfinite(embeddings).all():
        raise ValueError("embeddings are not finite")
    start = time.perf_counter()
    embedder.encode(texts, "document")
    seconds = time.perf_counter() - start
    rate = training_flops_per_token(embedder.model) / 3 * tokens / seconds / 1e12
    note = share(rate, measured(rows, PRODUCTS), "the measured products")
    yield {"name": "Embedder.encode", "value": tokens / seconds, "unit": "tokens/s", "note": note}


PARTS = {
    "card": roofline,
    "correct": kernels_equal_oracles,
    "experts": experts,
    "attention": attention,
    "step": training_step,
    "encoding": encoding,
}
