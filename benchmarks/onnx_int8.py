"""What int8 costs in ONNX Runtime: retrieval scores, cosines, size and time of both files.

    python benchmarks/onnx_int8.py --model=FOLDER --dataset=BEIR_FOLDER[,...] [--output=FILE.json]

FOLDER was exported with --onnx=both. Each file embeds all queries and documents with the folder's
prefixes, in batches of texts of like length. Milliseconds are the processor's, of 16 texts of 64
tokens on one thread, the median of 5.
"""

import argparse
import json
import pathlib
import statistics
import time

import contestants
import numpy as np

BATCH = 16


def load(path: pathlib.Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def encode(session, embedder, texts: list[str], prompt: str) -> np.ndarray:
    """Mean-pooled unit vectors [N, D]."""
    sequences = embedder.tokenize(texts, prompt)
    order = np.argsort([len(ids) for ids in sequences], kind="stable")
    vectors = np.zeros((len(texts), embedder.width), np.float32)
    for begin in range(0, len(order), BATCH):
        places = order[begin : begin + BATCH]
        length = max(len(sequences[i]) for i in places)
        ids, mask = (np.zeros((len(places), length), np.int64) for _ in range(2))
        for row, i in enumerate(places):
            ids[row, : len(sequences[i])] = sequences[i]
            mask[row, : len(sequences[i])] = 1
        (states,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        vectors[places] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return vectors


def milliseconds(session) -> float:
    ids = np.random.default_rng(0).integers(4, 1000, (16, 64))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    session.run(None, feed)
    times = []
    for _ in range(5):
        start = time.process_time()
        session.run(None, feed)
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def main():
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", required=True)
    flags.add_argument("--dataset", required=True, help="BEIR folders")
    flags.add_argument("--output", help="JSON file to write")
    arguments = flags.parse_args()
    contestants.require("onnx", "onnxruntime")
    from moe_embed_jax import Embedder
    from moe_embed_jax.evaluation.beir import load_beir, unique_names
    from moe_embed_jax.evaluation.retrieval import evaluate_retrieval
    from moe_embed_jax.interop.onnx_export import FILES, FOLDER, WEIGHTS

    folder = pathlib.Path(arguments.model) / FOLDER
    embedder = Embedder.load(arguments.model)
    paths = arguments.dataset.split(",")
    sets = {n: load_beir(p, n) for p, n in zip(paths, unique_names(paths), strict=True)}
    report, kept = {}, {}
    for kind, name in FILES.items():
        session = load(folder / name)
        beside = folder / WEIGHTS if kind == "fp32" else folder / "none"
        size = sum(p.stat().st_size for p in (folder / name, beside) if p.is_file())
        report[kind] = {"megabytes": size / 1e6, "milliseconds": milliseconds(session)}
        for name, texts in sets.items():

            def of(side, texts, name=name, kind=kind, session=session):
                kept[kind, name, side] = encode(session, embedder, texts, side)
                return kept[kind, name, side]

            metrics = evaluate_retrieval(
                lambda texts, of=of: of("query", texts),
                lambda texts, of=of: of("document", texts),
                texts,
            )
            report[kind][name] = {"ndcg_at_10": metrics["ndcg_at_10"]}
            if kind == "int8":
                for side in ("query", "document"):
                    cosines = np.sum(kept["fp32", name, side] * kept["int8", name, side], axis=1)
                    found = {"lowest": float(cosines.min()), "mean": float(cosines.mean())}
                    report[kind][name][f"{side}_cosine"] = found
        print(kind, json.dumps(report[kind]), flush=True)
    if arguments.output:
        pathlib.Path(arguments.output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
