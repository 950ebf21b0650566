"""Exact search on CPU: search.knn.top_k against faiss.IndexFlatIP.

    python benchmarks/knn.py [--sizes=200000x384,1000000x768] [--queries=1024] [--k=100] \\
        [--output=FILE.json]

Both search the same random unit vectors for the same queries, float32, with all cores, in turns.
Ours reads its documents from memory in loads, as it would read a store on disk; faiss holds its
index. The neighbours are compared: where they differ, the scores must agree to rounding.

Needs `pip install -e .[benchmark]`.
"""

import argparse

import contestants
import numpy as np

OURS, FAISS = "ours", "faiss.IndexFlatIP"
TOLERANCE = 1e-5  # of scores of unit vectors


def vectors(count: int, width: int, seed: int) -> np.ndarray:
    x_ND = np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    return x_ND


def ours(turns, count: int, width: int, queries: int, k: int, seed: int):
    from moe_embed_jax.search.knn import top_k

    document_ND, query_BD = vectors(count, width, seed), vectors(queries, width, seed + 1)
    result = top_k(query_BD, document_ND, k)  # compiles
    while True:
        turns.wait(result)
        top_k(query_BD, document_ND, k)
        result = turns.seconds()


def faiss_flat(turns, count: int, width: int, queries: int, k: int, seed: int):
    import faiss

    faiss.omp_set_num_threads(contestants.threads())
    index = faiss.IndexFlatIP(width)
    index.add(vectors(count, width, seed))
    query_BD = vectors(queries, width, seed + 1)
    result = index.search(query_BD, k)
    while True:
        turns.wait(result)
        index.search(query_BD, k)
        result = turns.seconds()


def compare(ready: dict) -> dict:
    (our_scores, our_indices), (scores, indices) = ready[OURS], ready[FAISS]
    return {
        "same_neighbours": float((our_indices == indices).mean()),
        "largest_difference": float(np.abs(our_scores - scores).max()),
    }


def run(arguments, count: int, width: int) -> dict:
    settings = dict(
        count=count, width=width, queries=arguments.queries, k=arguments.k, seed=arguments.seed
    )
    functions = {OURS: (ours, settings), FAISS: (faiss_flat, settings)}
    with contestants.contestants(functions) as started:
        agreement = compare({name: first for name, (_, first) in started.items()})
        results = contestants.play(started, arguments.rounds)
    for turns in results.values():
        for turn in turns:
            turn |= {"queries": arguments.queries}
    table = contestants.rates(results, "queries")
    product = 2e-9 * count * width  # GFLOP of a query
    contestants.print_table(
        f"{arguments.queries} queries, {count:,} documents of width {width}, k={arguments.k}",
        ["", "queries/s", "GFLOP/s", "queries per CPU second", "ours is faster by"],
        [
            [
                name,
                table[name]["wall"]["median"],
                table[name]["wall"]["median"] * product,
                table[name]["cpu"]["median"],
                contestants.median_ratio(table, OURS, name),
            ]
            for name in results
        ],
    )
    return {
        "documents": count,
        "width": width,
        "ratio": contestants.median_ratio(table, OURS, FAISS),
        "ratio_cpu": contestants.median_ratio(table, OURS, FAISS, "cpu"),
        **agreement,
        "agree": agreement["largest_difference"] < TOLERANCE,
        "queries_per_second": table,
        "others_cpu_share": contestants.others_share(results),
        "rounds": results,
    }


def main():
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--sizes", default="200000x384,1000000x768", help="documents x width")
    flags.add_argument("--queries", type=int, default=1024)
    flags.add_argument("--k", type=int, default=100)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--output", help="JSON file to write")
    arguments = flags.parse_args()
    contestants.require("benchmark", "faiss")
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes.split(",")]
    searches = [run(arguments, *size) for size in sizes]
    report = {
        "ratio": min(search["ratio"] for search in searches),
        "compares": "queries/s: search.knn.top_k / faiss.IndexFlatIP, median over rounds, the "
        "smallest of all sizes",
        "ratio_cpu": min(search["ratio_cpu"] for search in searches),
        "agree": all(search["agree"] for search in searches),
        "searches": searches,
        "arguments": vars(arguments),
        "machine": contestants.machine(),
    }
    print(f"ratio: {report['ratio']:.2f}")
    contestants.write_report(arguments.output, report)
    if not report["agree"]:
        raise SystemExit(f"error: scores differ by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
