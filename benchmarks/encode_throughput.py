"""Encoding throughput on texts of mixed lengths: Embedder against SentenceTransformer.

    python benchmarks/encode_throughput.py [--model=DIR] [--input=texts.txt] [--dtype=bfloat16]
        [--output=FILE.json]

Both load the same weights (`--model`: any model folder; default: a random MoE model) and encode the
same texts with the document prompt, text to unit-norm float32; the embeddings are compared.
sentence-transformers runs on the exported folder, sorts by length by itself, and is measured with
batches of 32 (its default) and with the fastest of --batch_sizes. Both compute in --dtype: float32,
the default of both, or bfloat16 (weights="bfloat16", PyTorch's autocast).

Default texts: queries and documents of the default data, as many of every length (on a logarithmic
scale, 3 to 256 tokens with specials and prefix) as the data allow.

Needs `pip install -e .[pytorch]`.
"""

import argparse
import pathlib
import statistics
import time

import contestants
import numpy as np

OURS, DEFAULT, BEST = "ours", "sentence-transformers, batches of 32", "sentence-transformers, best"
DEFAULT_BATCH = 32
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # largest difference of a component


def ours(turns, folder: str, texts: list[str], dtype: str):
    from moe_embed_jax import Embedder

    embedder = Embedder.load(folder, weights=dtype)
    lengths = [len(ids) for ids in embedder.tokenize(texts, "document")]
    embeddings = embedder.encode(texts, "document")  # compiles every shape
    result = {"embeddings": embeddings, "lengths": lengths}
    while True:
        turns.wait(result)
        embedder.encode(texts, "document")
        result = turns.seconds()


def sentence_transformers(
    turns, folder: str, texts: list[str], length: int, sizes: list[int], dtype: str
):
    """The fastest of `sizes` is chosen on the texts themselves."""
    contestants.quiet_torch()
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    model.max_seq_length = length

    def encode(batch_size: int):
        with contestants.autocast(dtype):
            embeddings = model.encode(
                texts, prompt_name="document", batch_size=batch_size, show_progress_bar=False
            )
        return embeddings.astype(np.float32)

    embeddings = encode(sizes[0])
    trials = {}
    for size in sizes:
        start = time.perf_counter()
        encode(size)
        trials[size] = time.perf_counter() - start
    best = min(trials, key=trials.get)
    result = {"embeddings": embeddings, "trials": trials, "batch_size": best}
    while True:
        turns.wait(result)
        encode(best)
        result = turns.seconds()


def default_texts(arguments) -> list[str]:
    """Texts of the token store, drawn so that the logarithm of the length is spread evenly."""
    from moe_embed_jax.tokenizers.vocabulary import DOCUMENT_PREFIX, QUERY_PREFIX

    store, vocabulary, _ = contestants.open_store(arguments)
    rng = np.random.default_rng(arguments.seed)
    lengths = store.lengths.reshape(-1)  # query, document, query, document, ...
    shuffled = rng.permutation(lengths.size)
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    low, high = np.log(lengths.min()), np.log(lengths.max() + 1)
    wanted = np.exp(rng.uniform(low, high, arguments.texts))
    # The first text of every wanted length, then the second, ...: none twice by choice.
    place = np.searchsorted(lengths[by_length], wanted.astype(int), side="left")
    order = np.argsort(place, kind="stable")
    sorted_place = place[order]
    first = np.r_[True, sorted_place[1:] != sorted_place[:-1]]
    begin = np.maximum.accumulate(np.where(first, np.arange(order.size), 0))
    place[order] = sorted_place + np.arange(order.size) - begin
    chosen = by_length[np.minimum(place, lengths.size - 1)]
    texts = []
    for flat, pair in zip(chosen, store.read(chosen // 2), strict=True):
        side = flat % 2
        prefix = (QUERY_PREFIX, DOCUMENT_PREFIX)[side]
        texts.append(contestants.text_of(vocabulary, pair[side], prefix))
    return texts


def encoder_vocabulary(arguments):
    _, vocabulary, path = contestants.open_store(arguments)
    return vocabulary, path


def export(turns, model: str, folder: str):
    """A contestant of no turn: any model folder as a PyTorch folder."""
    from moe_embed_jax.conversion import export_model
    from moe_embed_jax.model_folder import open_model

    opened = open_model(model)
    export_model(model, f"{folder}/exported")
    turns.wait({"max_length": opened.max_lengths["document"]})


def main():
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    contestants.add_flags(flags)
    flags.add_argument("--model", help="model folder; default: random weights")
    flags.add_argument("--input", help="a text in each line; default: of the default data")
    flags.add_argument("--texts", type=int, default=1024, help="how many")
    flags.add_argument("--batch_sizes", default="8,16,32,64", help="tried by the peer")
    arguments = flags.parse_args()
    contestants.require("pytorch", "torch", "transformers", "sentence_transformers")

    if arguments.input:
        texts = pathlib.Path(arguments.input).read_text(encoding="utf-8").splitlines()
        texts = texts[: arguments.texts]
    else:
        texts = default_texts(arguments)
    length = arguments.document_length
    with contestants.temporary_folder() as folder:
        if arguments.model:
            model = arguments.model
            made = contestants.call(export, model=str(model), folder=folder)
            length = made["max_length"]
        else:
            model = f"{folder}/ours"
            vocabulary, path = encoder_vocabulary(arguments)
            made = contestants.call(
                contestants.random_model,
                folder=folder,
                fields=contestants.model_fields(arguments, vocabulary.size),
                vocabulary=str(path),
                lengths={"query": arguments.query_length, "document": length},
                seed=arguments.seed,
            )
        dtype = arguments.dtype
        theirs = dict(folder=f"{folder}/exported", texts=texts, length=length, dtype=dtype)
        sizes = sorted({DEFAULT_BATCH, *map(int, arguments.batch_sizes.split(","))})
        functions = {
            OURS: (ours, dict(folder=str(model), texts=texts, dtype=dtype)),
            DEFAULT: (sentence_transformers, theirs | {"sizes": [DEFAULT_BATCH]}),
            BEST: (sentence_transformers, theirs | {"sizes": sizes}),
        }
        with contestants.contestants(functions) as started:
            ready = {name: first for name, (_, first) in started.items()}
            embeddings = {name: first.pop("embeddings") for name, first in ready.items()}
            lengths = ready[OURS].pop("lengths")
            difference = {
                name: float(np.abs(embeddings[name] - embeddings[OURS]).max())
                for name in (DEFAULT, BEST)
            }
            print(f"largest difference of the embeddings: {max(difference.values()):.1e}")
            results = contestants.play(started, arguments.rounds)

    for turns in results.values():
        for turn in turns:
            turn |= {"tokens": sum(lengths), "texts": len(texts)}
    table = contestants.rates(results, "tokens")
    report = {
        "ratio": contestants.median_ratio(table, OURS, BEST),
        "compares": "real tokens/s: Embedder.encode / SentenceTransformer.encode with its fastest "
        "batch size, median over rounds",
        "ratio_default_batch": contestants.median_ratio(table, OURS, DEFAULT),
        "ratio_cpu": contestants.median_ratio(table, OURS, BEST, "cpu"),
        "largest_difference": difference,
        "agree": max(difference.values()) < TOLERANCE[arguments.dtype],
        "tokens_per_second": table,
        "texts_per_second": contestants.rates(results, "texts"),
        "texts": len(texts),
        "tokens": sum(lengths),
        "length_quantiles": np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]).tolist(),
        **contestants.circumstances(arguments, results, ready, made),
    }
    contestants.print_table(
        f"Encoding {len(texts)} texts, {sum(lengths):,} tokens, {arguments.dtype}",
        ["", "real tokens/s", "texts/s", "tokens per CPU second", "ours is faster by"],
        [
            [
                f"{name} ({ready[name]['batch_size']})" if name == BEST else name,
                table[name]["wall"]["median"],
                statistics.median(report["texts_per_second"][name]["wall"]["values"]),
                table[name]["cpu"]["median"],
                contestants.median_ratio(table, OURS, name),
            ]
            for name in results
        ],
    )
    contestants.write_report(arguments.output, report)
    if not report["agree"]:
        raise SystemExit(f"error: the embeddings differ by more than {TOLERANCE[arguments.dtype]}")


if __name__ == "__main__":
    main()
