"""The report of benchmarks/efficiency.py as Markdown."""

from efficiency_models import BFLOAT16, DENSE, INT8, OURS, PEER

from moe_embed_jax.markdown_table import markdown_table

MILLION = 1_000_000


def markdown(report: dict) -> str:
    parts = [
        f"# Efficiency: {report['shape'] or report['arguments']['model']}",
        conditions(report),
        "## Speed and memory",
        speed(report),
        verdict(report),
        agreement(report),
    ]
    if report["quality"]:
        parts += ["## Index size and nDCG@10", quality(report), cost_of_weights(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def conditions(report: dict) -> str:
    machine, texts, about = report["machine"], report["texts"], report["about"]
    total, active = about["parameters"]
    share = report["speed"]["others_cpu_share"]
    lines = [
        f"* {machine['processor']}, {machine['cores']} cores; jax {machine.get('jax')}, "
        f"torch {machine.get('torch')}, sentence-transformers "
        f"{machine.get('sentence-transformers')}",
        f"* {total:,} parameters, {active:,} of them used per token"
        + (" (random weights)" if report["shape"] else ""),
        f"* texts: {texts['queries']} queries and {texts['documents']} documents of "
        f"{texts['dataset']}, {report['arguments']['rounds']} rounds",
        f"* other processes used {share:.0%} of the machine meanwhile"
        + ("" if share <= 0.05 else ": **not a quiet machine, do not trust the figures**"),
    ]
    return "\n".join(lines)


def speed(report: dict) -> str:
    about, rates = report["about"], report["speed"]["rates"]
    parameters = {name: about["parameters"] for name in (OURS, BFLOAT16, INT8, PEER)}
    parameters[DENSE] = about["twin_parameters"]
    tokens = report["speed"]["ready"][OURS]["tokens"] / report["texts"]["documents"]
    rows = []
    for name in rates:
        memory = report["memory"][name]
        latency = report["latencies"][name]
        documents = rates[name]["wall"]["median"]
        rows.append(
            [
                name,
                *(f"{count / MILLION:,.1f}" for count in parameters[name]),
                *(f"{1e3 * latency[q]:,.1f}" for q in ("p50", "p95")),
                f"{documents:,.2f}",
                f"{documents * tokens:,.0f}",
                f"{report['speed']['ratio'][name]:.2f}",
                *(f"{memory[when] / MILLION:,.0f}" for when in ("imported", "loaded", "used")),
                f"{memory['peak'] / MILLION:,.0f}",
            ]
        )
    header = [
        "",
        "M parameters",
        "M per token",
        "query p50 ms",
        "query p95 ms",
        "documents/s",
        "tokens/s",
        "ours is faster by",
        "MB before loading",
        "MB loaded",
        "MB in use",
        "MB peak",
    ]
    return markdown_table(header, rows, "lr")


def verdict(report: dict) -> str:
    ratio = report["speed"]["ratio"]
    ratio_cpu = report["speed"]["ratio_cpu"][PEER]
    lines = [
        f"Documents/s against sentence-transformers: {ratio[PEER]:.2f}; per processor second "
        f"{ratio_cpu:.2f}."
    ]
    if DENSE in ratio:
        ours, dense = (report["latencies"][name]["p50"] for name in (OURS, DENSE))
        lines.append(
            f"What the experts buy: {ratio[DENSE]:.2f} times the documents/s of a dense model of "
            f"as many parameters in total, and a query in {ours / dense:.2f} of its time."
        )
    return " ".join(lines)


def agreement(report: dict) -> str:
    found = report["speed"]["embeddings"]
    return (
        f"The embeddings of the documents: sentence-transformers' differ by at most "
        f"{found[PEER]['largest_difference']:.1e} in a component. Least cosine with those of "
        f"float32 weights: {found[BFLOAT16]['least_cosine']:.5f} for bfloat16, "
        f"{found[INT8]['least_cosine']:.5f} for int8."
    )


def quality(report: dict) -> str:
    sets = list(report["quality"])
    rows = []
    for index, first in enumerate(report["quality"][sets[0]]["float32"]):
        scores = [
            f"{rows_of[weights][index]['ndcg_at_10']:.4f}"
            for rows_of in report["quality"].values()
            for weights in rows_of
        ]
        size = f"{first['bytes'] * MILLION / 1e6:,.0f}"
        rows.append([f"{first['dim']}, {first['index']}", size, *scores])
    header = ["dimensions, index", "MB per million documents"]
    header += [f"{name}, {weights} weights" for name in sets for weights in report["quality"][name]]
    return markdown_table(header, rows, "lr")


def cost_of_weights(report: dict) -> str:
    """Of weights in fewer bytes, with float32 vectors of all dimensions."""
    lines = []
    for weights in ("bfloat16", "int8"):
        costs = []
        for name, rows_of in report["quality"].items():
            exact, found = (rows_of[kind][0]["ndcg_at_10"] for kind in ("float32", weights))
            costs.append(f"{found - exact:+.4f} on {name}")
        lines.append(f"{weights} weights change nDCG@10 by {', '.join(costs)}.")
    return " ".join(lines)
