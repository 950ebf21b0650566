"""Vectors trained for a compressed index against vectors that are compressed afterwards.

    python benchmarks/quantisation.py --work=DIR --data_dir=runs/data [--seeds=0,1,2] \\
        [--steps=100] [--arms=afterwards,trained] [--output=FILE.json]

Trains configs/quickstart.py with batches of 128 and two Matryoshka widths: `afterwards` in float32,
`trained` with loss.quantisation besides. Then the documents of the held-out sets of findings.py
are stored in each form of search/compressed.py, and searched. Prints nDCG@10 (the mean over
languages, then over sets) by width, form and bytes per vector: mean and 95 % confidence interval
over the seeds (Student t), and the difference seed by seed. Equal bytes stand in one row.

A finished run or search is not repeated, an interrupted one continues: start it again.
"""

import json
import pathlib
import sys

from seeded_runs import interval, over_seeds, save, train

from moe_embed_jax import launching

AFTERWARDS, TRAINED = "afterwards", "trained"
WIDTHS = (128, 32)
FORMS = {"float32": 1.0, "int8": 1.0, "binary": 1.0}
ARMS = {AFTERWARDS: {}, TRAINED: {"loss.quantisation": FORMS}}
SCORES = "scores_of_indexes.json"


def search_all(query_BD, document_ND, k: int) -> dict[str, tuple[int, object]]:
    """{form of the index: (bytes per vector, index_Bk)} of unit vectors."""
    from moe_embed_jax.search.compressed import BinaryVectors, search_as

    width = document_ND.shape[1]
    bits = BinaryVectors.compress(document_ND)
    sizes = {"float32": 4 * width, "int8": width, "binary": bits.bytes_per_vector}
    found = {
        form: (size, search_as(form, query_BD, document_ND, k)[1]) for form, size in sizes.items()
    }
    by_distance = bits.top_k(query_BD, k)[1]
    return found | {"binary by Hamming distance": (bits.bytes_per_vector, by_distance)}


def judge(folder: pathlib.Path, data_dir: pathlib.Path) -> dict[str, dict]:
    """{"<width> <form>": {"bytes", "ndcg_at_10"}} of a finished run on the sets of `data_dir`."""
    from moe_embed_jax import Embedder
    from moe_embed_jax.config import save_json
    from moe_embed_jax.embedder import unit_norm
    from moe_embed_jax.evaluation.heldout import load_heldout
    from moe_embed_jax.evaluation.retrieval import CANDIDATES, mean_over_languages, score_run

    output = folder / SCORES
    if output.exists():
        return json.loads(output.read_text())
    embedder = Embedder.load(str(folder))
    results, bytes_of = {}, {}
    for name, each in load_heldout(data_dir).items():
        query_BD = embedder.encode(each.queries, prompt="query")
        document_ND = embedder.encode(each.documents, prompt="document")
        for width in WIDTHS:
            cut = [unit_norm(x_ND[:, :width]) for x_ND in (query_BD, document_ND)]
            for form, (size, index_Bk) in search_all(*cut, CANDIDATES).items():
                index = f"{width} {form}"
                bytes_of[index] = size
                results.setdefault(index, {})[name] = score_run(each, index_Bk)
    scores = {}
    for index, by_set in results.items():
        means = [mean["ndcg_at_10"] for mean in mean_over_languages(by_set).values()]
        scores[index] = {"bytes": bytes_of[index], "ndcg_at_10": sum(means) / len(means)}
    save_json(output, scores)
    return scores


def table(scores: dict[str, list[dict[str, dict]]]) -> str:
    """Markdown; `scores`: arm -> what `judge` gave, one for each seed."""
    from moe_embed_jax.markdown_table import markdown_table

    rows = []
    for index, first in next(iter(scores.values()))[0].items():
        width, _, form = index.partition(" ")
        values = {arm: [run[index]["ndcg_at_10"] for run in runs] for arm, runs in scores.items()}
        cells = ["{:.3f} ± {:.3f}".format(*interval(of_arm)) for of_arm in values.values()]
        if {AFTERWARDS, TRAINED} <= values.keys():
            pairs = zip(values[TRAINED], values[AFTERWARDS], strict=True)
            differences = [after - before for after, before in pairs]
            cells.append("{:+.3f} ± {:.3f}".format(*interval(differences)))
        rows.append([width, form, str(first["bytes"]), *cells])
    head = ["width", "index", "bytes a vector", *scores]
    head += ["difference"] * (len(rows[0]) - len(head))
    return markdown_table(head, rows, "rlr" + "r" * (len(head) - 3))


def main():
    flags = launching.parser(__doc__)
    flags.add_argument("--work", required=True, help="folder for runs; continues what is there")
    flags.add_argument("--data_dir", default="runs/data", help="the prepared default data")
    flags.add_argument("--seeds", default="0,1,2")
    flags.add_argument("--steps", type=int, default=100)
    flags.add_argument("--arms", default=",".join(ARMS))
    flags.add_argument("--output", help="JSON file to write")
    arguments = flags.parse_args()

    from findings_runs import Place, prepare

    from moe_embed_jax.errors import UserError

    arms = arguments.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UserError(f"--arms: there is no {unknown[0]!r}; choose from {', '.join(ARMS)}")
    work = pathlib.Path(arguments.work).resolve()
    prepare(Place(work, pathlib.Path(arguments.data_dir).resolve()), "scratch")
    data_dir = work / "scratch" / "data"

    def run(arm: str, seed: int) -> dict[str, dict]:
        keys = {
            "seed": seed,
            "steps": arguments.steps,
            "batch_size": 128,
            "eval_every": 0,
            "checkpoint_every": arguments.steps,
            "data.dir": data_dir,
            "loss.dims": {str(width): 1.0 for width in WIDTHS},
        }
        folder = work / f"{arm}-{arguments.steps}-{seed}"
        train(folder, "configs/quickstart.py", keys | ARMS[arm])
        return judge(folder, data_dir)

    scores = over_seeds(arguments.seeds, arms, run)
    print(table(scores))
    save(arguments.output, arguments, scores)


if __name__ == "__main__":
    sys.exit(launching.run(main))
