"""What a checkpoint costs to use on a CPU, and what its experts buy: one report.

    python benchmarks/efficiency.py --model=DIR --dataset=BEIR_FOLDER[,..] --output=DIR
    python benchmarks/efficiency.py --shape=nomic-v2 --vocabulary=FILE --dataset=BEIR_FOLDER \\
        --output=DIR

Parts, each written to OUTPUT/parts when it is done and not measured again (--again=PART,..):

    memory       resident memory of each model in a process of its own
    speed        documents/s; one query at a time: p50, p95
    quality-SET-WEIGHTS   nDCG@10 and index bytes for dims {all, a third} x {float32, int8, binary}

then OUTPUT/report.json and OUTPUT/report.md. Who is compared: efficiency_models.py. Contestants
take turns (contestants.py). Texts are the queries and documents of the first set, a seeded sample.
--shape makes a model with random weights of a published shape: no quality parts.

Needs `pip install -e .[pytorch]`. Definitions: docs/efficiency.md.
"""

import argparse
import json
import pathlib
import sys

import contestants
import efficiency_models as models
import efficiency_report
import numpy as np
from efficiency_models import BFLOAT16, DENSE, INT8, OURS, PEER

from moe_embed_jax.config import save_json
from moe_embed_jax.errors import UserError

WEIGHTS = ("float32", "bfloat16", "int8")


def sample(texts: list[str], count: int, seed: int) -> list[str]:
    chosen = np.random.default_rng(seed).permutation(len(texts))[:count]
    return [texts[i] for i in sorted(chosen)]


def functions(about: dict, folders: dict, arguments, work: dict) -> dict:
    """{name: (function, settings)} of all contestants."""
    prompts = {"query": arguments.query_prompt, "document": arguments.document_prompt}
    own = {"prompts": prompts, "work": work}
    result = {
        OURS: (models.ours, {"folder": folders[OURS], "weights": "float32", **own}),
        BFLOAT16: (models.ours, {"folder": folders[OURS], "weights": "bfloat16", **own}),
        INT8: (models.ours, {"folder": folders[OURS], "weights": "int8", **own}),
    }
    if about["twin"]:
        twin = {"folder": folders[DENSE], "weights": "float32", **own}
        result[DENSE] = models.ours, twin
    theirs = {
        "folder": folders[PEER],
        "prefixes": about["prefixes"],
        "lengths": about["lengths"],
        "sizes": [int(size) for size in arguments.batch_sizes.split(",")],
        "work": work,
    }
    return result | {PEER: (models.peer, theirs)}


def measure_memory(compared: dict) -> dict:
    """One after the other, alone: before loading, after it, after a first use, and the peak."""
    result = {}
    for name, (function, settings) in compared.items():
        with contestants.contestants({name: (function, settings)}) as started:
            result[name] = started[name][1]["memory"]
    return result


def measure_speed(compared: dict, rounds: int) -> dict:
    """Rounds of turns: rates of the documents, agreement of their embeddings, raw turns."""
    with contestants.contestants(compared) as started:
        ready = {name: first for name, (_, first) in started.items()}
        embeddings = {name: first.pop("embeddings") for name, first in ready.items()}
        results = contestants.play(started, rounds)
    count = len(next(iter(compared.values()))[1]["work"]["documents"])
    for turns in results.values():
        for turn in turns:
            turn["documents"] = count
    rates = contestants.rates(results, "documents")
    return {
        "rates": rates,
        **{
            key: {name: contestants.median_ratio(rates, OURS, name, scale) for name in compared}
            for key, scale in (("ratio", "wall"), ("ratio_cpu", "cpu"))
        },
        "embeddings": agreement(embeddings),
        "ready": ready,
        "others_cpu_share": contestants.others_share(results),
        "turns": results,
    }


def agreement(embeddings: dict) -> dict:
    """Of the documents' embeddings with those of OURS: least cosine, largest difference."""
    return {
        name: {
            "least_cosine": float((x_ND * embeddings[OURS]).sum(axis=1).min()),
            "largest_difference": float(np.abs(x_ND - embeddings[OURS]).max()),
        }
        for name, x_ND in embeddings.items()
        if name in (BFLOAT16, INT8, PEER)
    }


def latencies(part: dict) -> dict:
    """{name: {p50, p95}}: seconds, quantiles over all queries and rounds."""
    quantiles = {}
    for name, turns in part["turns"].items():
        seconds = np.concatenate([turn["latencies"] for turn in turns])
        quantiles[name] = {f"p{q}": float(np.quantile(seconds, q / 100)) for q in (50, 95)}
    return quantiles


def measure_quality(turns, folder: str, weights: str, prompts: dict, dataset: str, name: str):
    """A contestant of no turn: rows of the table of indexes."""
    from moe_embed_jax import Embedder
    from moe_embed_jax.embedder import unit_norm
    from moe_embed_jax.evaluation.beir import load_beir
    from moe_embed_jax.evaluation.retrieval import CANDIDATES, score_run
    from moe_embed_jax.search.compressed import BinaryVectors, Int8Vectors, rescored_top_k
    from moe_embed_jax.search.knn import top_k

    retrieval_set = load_beir(dataset, name)
    embedder = Embedder.load(folder, weights=weights)
    query_BD = embedder.encode(retrieval_set.queries, prompts["query"])
    document_ND = embedder.encode(retrieval_set.documents, prompts["document"])
    rows = []
    for dim in (embedder.width, embedder.width // 3):
        query_Bd, document_Nd = unit_norm(query_BD[:, :dim]), unit_norm(document_ND[:, :dim])
        int8, bits = Int8Vectors.compress(document_Nd), BinaryVectors.compress(document_Nd)
        indexes = {
            "float32": (document_Nd[:1].nbytes, top_k(query_Bd, document_Nd, CANDIDATES)),
            "int8": (int8.bytes_per_vector, int8.top_k(query_Bd, CANDIDATES)),
            "binary": (bits.bytes_per_vector, bits.top_k(query_Bd, CANDIDATES)),
            "binary, rescored": (bits.bytes_per_vector, rescored_top_k(query_Bd, bits, CANDIDATES)),
            "binary, rescored by int8": (
                bits.bytes_per_vector + int8.bytes_per_vector,
                rescored_top_k(query_Bd, bits, CANDIDATES, int8),
            ),
        }
        for kind, (bytes_per_vector, (_, index_Bk)) in indexes.items():
            metrics = score_run(retrieval_set, index_Bk)
            rows.append({"dim": dim, "index": kind, "bytes": bytes_per_vector, **metrics})
    turns.wait(rows)


class Parts:
    """Parts of a report in OUTPUT/parts; a part of other settings is measured anew."""

    def __init__(self, folder: pathlib.Path, again: list[str]):
        self.folder, self.again = folder, again

    def once(self, name: str, settings: dict, measure) -> dict:
        path = self.folder / f"{name}.json"
        settings = json.loads(json.dumps(settings))
        if path.is_file() and name not in self.again:
            part = json.loads(path.read_text())
            if part["settings"] == settings:
                print(f"{name}: measured already")
                return part["result"]
        print(f"{name}: measuring", flush=True)
        part = {"settings": settings, "machine": contestants.machine(), "result": measure()}
        save_json(path, part)
        return part["result"]


def model_folder(arguments, output: pathlib.Path) -> str:
    if arguments.model:
        return arguments.model
    if not arguments.vocabulary:
        raise UserError("--shape needs --vocabulary=FILE, the SentencePiece model of its texts")
    return models.made_once(
        output / "models" / arguments.shape,
        models.make_random,
        fields=models.SHAPES[arguments.shape],
        vocabulary=arguments.vocabulary,
        prompts={"query": "search_query: ", "document": "search_document: "},
        lengths={"query": 512, "document": 512},
        seed=arguments.seed,
    )


def measure(arguments) -> dict:
    from moe_embed_jax.evaluation.beir import load_beir, unique_names

    output = pathlib.Path(arguments.output)
    datasets = arguments.dataset.split(",")
    names = unique_names(datasets)
    model = model_folder(arguments, output)
    prompts = {"query": arguments.query_prompt, "document": arguments.document_prompt}
    about = models.describe(model, prompts)
    first = load_beir(datasets[0], names[0])
    queries = sample(first.queries, arguments.queries, arguments.seed)
    documents = sample(first.documents, arguments.documents, arguments.seed)

    folders = {OURS: model}
    folders[PEER] = models.made_once(output / "models/exported", models.make_export, model=model)
    if about["twin"]:
        folders[DENSE] = models.made_once(
            output / "models/dense_twin",
            models.make_random,
            fields=about["twin"],
            vocabulary=about["vocabulary"],
            prompts=about["prompts"],
            lengths=about["lengths"],
            seed=arguments.seed,
        )

    def work(queries, documents):
        texts = {"queries": queries, "documents": documents}
        return functions(about, folders, arguments, texts)

    parts = Parts(output / "parts", arguments.again.split(","))
    settings = {
        "model": model,
        "parameters": about["parameters"],
        "prefixes": about["prefixes"],
        "lengths": about["lengths"],
        "seed": arguments.seed,
    }
    texts = {"dataset": datasets[0], "queries": len(queries), "documents": len(documents)}
    timed = {"rounds": arguments.rounds, "batch_sizes": arguments.batch_sizes}
    result = {
        "memory": parts.once(
            "memory",
            settings | texts,
            lambda: measure_memory(work(queries[:4], documents[: arguments.memory_documents])),
        ),
        "speed": parts.once(
            "speed",
            settings | texts | timed,
            lambda: measure_speed(work(queries, documents), arguments.rounds),
        ),
    }
    result["latencies"] = latencies(result["speed"])
    result["quality"] = {}
    for dataset, name in zip(datasets, names, strict=True) if arguments.model else ():
        for weights in WEIGHTS:
            part = f"quality-{name.replace('/', '-')}-{weights}"
            job = dict(folder=model, weights=weights, prompts=prompts, dataset=dataset, name=name)
            rows = parts.once(
                part,
                settings | {"dataset": dataset, "prompts": prompts},
                lambda job=job: contestants.call(measure_quality, **job),
            )
            result["quality"].setdefault(name, {})[weights] = rows
    return result | {
        "about": about,
        "texts": texts,
        "shape": arguments.shape,
        "machine": contestants.machine(),
        "arguments": vars(arguments),
    }


def main():
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = flags.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", default="", help="any model folder")
    source.add_argument("--shape", default="", choices=sorted(models.SHAPES))
    flags.add_argument("--vocabulary", default="", help="SentencePiece model, with --shape")
    flags.add_argument("--dataset", required=True, help="BEIR-like folders, separated by commas")
    flags.add_argument("--output", required=True, help="folder of the report and of its parts")
    flags.add_argument("--queries", type=int, default=50, help="encoded one at a time")
    flags.add_argument("--documents", type=int, default=64, help="encoded together")
    flags.add_argument("--memory_documents", type=int, default=8, help="encoded for the memory")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--batch_sizes", default="32", help="tried by sentence-transformers")
    flags.add_argument("--query_prompt", default="query", help="name, or the prefix itself")
    flags.add_argument("--document_prompt", default="document")
    flags.add_argument("--again", default="", help="parts to measure again")
    flags.add_argument("--seed", type=int, default=0)
    arguments = flags.parse_args()
    contestants.require("pytorch", "torch", "transformers", "sentence_transformers")
    try:
        report = measure(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    output = pathlib.Path(arguments.output)
    save_json(output / "report.json", report)
    text = efficiency_report.markdown(report)
    (output / "report.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
