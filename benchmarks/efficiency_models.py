"""The models that benchmarks/efficiency.py compares, each in a separate process.

    ours               the model, Embedder, float32 weights
    ours, bfloat16     the same folder, Embedder.load(weights="bfloat16")
    ours, int8         the same folder, Embedder.load(weights="int8")
    dense twin         Embedder; random weights, no experts, as many parameters in total
    sentence-transformers   the model exported, float32, PyTorch

The dense twin has the model's depth and width; its feed-forward layers are so much wider that it
has the parameters of all experts, and uses all of them for every token.
"""

import dataclasses
import os
import pathlib
import shutil
import time

import contestants

from moe_embed_jax.errors import UserError

OURS, BFLOAT16, INT8 = "ours", "ours, bfloat16", "ours, int8"
DENSE, PEER = "dense twin", "sentence-transformers"
SHAPES = {"nomic-v2": {}}  # arguments of EncoderConfig, whose defaults are the published model's
SIDES = ("query", "document")


def resident() -> dict[str, int]:
    """Bytes of this process in memory: now, and the most so far."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        raise UserError("memory is read from /proc/self/status: run this on Linux") from None
    values = dict(line.split(":", 1) for line in lines)
    kilobytes = {"now": values["VmRSS"], "peak": values["VmHWM"]}
    return {name: int(value.split()[0]) << 10 for name, value in kilobytes.items()}


def take_turns(turns, encode, work: dict, memory: dict, **about) -> None:
    """All turns of a contestant. `encode(texts, side)`; a turn is one encoding of all documents,
    then of each query by itself. The seconds of a turn are those of the documents."""

    def latencies() -> list[float]:
        result = []
        for query in work["queries"]:
            start = time.perf_counter()
            encode([query], "query")
            result.append(time.perf_counter() - start)
        return result

    documents = encode(work["documents"], "document")
    latencies()  # every shape is compiled
    memory |= {"used": resident()["now"], "peak": resident()["peak"]}
    result = {"memory": memory, "embeddings": documents, **about}
    while True:
        turns.wait(result)
        encode(work["documents"], "document")
        result = turns.seconds()
        result["latencies"] = latencies()


def ours(turns, folder: str, weights: str, prompts: dict, work: dict):
    from moe_embed_jax import Embedder
    from moe_embed_jax.mesh import single_device_mesh

    mesh = single_device_mesh()
    memory = {"imported": resident()["now"]}
    embedder = Embedder.load(folder, mesh=mesh, weights=weights)
    memory["loaded"] = resident()["now"]
    tokens = sum(len(ids) for ids in embedder.tokenize(work["documents"], prompts["document"]))

    def encode(texts, side):
        return embedder.encode(texts, prompts[side])

    take_turns(turns, encode, work, memory, tokens=tokens)


def peer(turns, folder: str, prefixes: dict, lengths: dict, sizes: list[int], work: dict):
    """With the fastest of the batch sizes on the documents themselves."""
    contestants.quiet_torch()
    from sentence_transformers import SentenceTransformer

    memory = {"imported": resident()["now"]}
    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    memory["loaded"] = resident()["now"]

    def encode(texts, side, batch_size=sizes[0]):
        model.max_seq_length = lengths[side]
        return model.encode(
            texts, prompt=prefixes[side], batch_size=batch_size, show_progress_bar=False
        )

    trials = {}
    for size in sizes if len(sizes) > 1 else ():
        start = time.perf_counter()
        encode(work["documents"], "document", size)
        trials[size] = time.perf_counter() - start
    best = min(trials, key=trials.get, default=sizes[0])

    def encode_best(texts, side):
        return encode(texts, side, best)

    take_turns(turns, encode_best, work, memory, batch_size=best, trials=trials)


def dense_twin(model):
    """`model` without experts and with as many parameters, to a multiple of 8 hidden units; None
    for a model that has no experts."""
    from moe_embed_jax.models.encoder import count_params

    if not model.num_moe_layers:
        return None
    total = count_params(model)[0]
    dense = dataclasses.replace(
        model, moe_every=0, shared_expert_width=0, remat_rows=0, ffn_width=8
    )
    smallest, next_one = (
        count_params(dataclasses.replace(dense, ffn_width=width))[0] for width in (8, 16)
    )
    steps = round((total - smallest) / (next_one - smallest))
    return dataclasses.replace(dense, ffn_width=8 * (1 + steps))


def describe(model: str, prompts: dict) -> dict:
    """What the parts need to know of a model folder."""
    from moe_embed_jax.model_folder import open_model
    from moe_embed_jax.models.encoder import count_params

    opened = open_model(model)
    if opened.vocabulary_path is None:
        raise UserError(f"{model} has no tokenizer: texts cannot be encoded")
    twin = dense_twin(opened.model)
    prefixes = {side: opened.prompts.get(prompts[side], prompts[side]) for side in SIDES}
    return {
        "parameters": count_params(opened.model),
        "twin": twin and dataclasses.asdict(twin),
        "twin_parameters": twin and count_params(twin),
        "vocabulary": str(opened.vocabulary_path),
        "prompts": opened.prompts,
        "prefixes": prefixes,
        "lengths": opened.max_lengths,
    }


def make_random(turns, target: str, fields: dict, vocabulary: str, prompts, lengths, seed: int):
    """A contestant of no turn: a model folder with random weights."""
    import jax

    from moe_embed_jax.model_folder import LoadedModel, save_model
    from moe_embed_jax.models.encoder import EncoderConfig, init_params
    from moe_embed_jax.tokenizers.files import load_tokenizer

    model = EncoderConfig(**fields)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(seed))
    tokenizer = load_tokenizer(pathlib.Path(vocabulary))
    loaded = LoadedModel(model, params, None, tokenizer, prompts, lengths)
    save_model(pathlib.Path(target), loaded, "random numbers")
    turns.wait(None)


def make_export(turns, model: str, target: str):
    """A contestant of no turn: the folder for PyTorch."""
    from moe_embed_jax.conversion import export_model

    export_model(model, target)
    turns.wait(None)


def made_once(folder: pathlib.Path, make, **settings) -> str:
    """`folder`, made by `make(turns, target=..., **settings)` where it is not there; whole or not
    at all."""
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.parent.mkdir(parents=True, exist_ok=True)
        contestants.call(make, target=str(partial), **settings)
        os.replace(partial, folder)
    return str(folder)
