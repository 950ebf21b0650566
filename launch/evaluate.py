"""Scores a model on retrieval sets in BEIR's layout.

    python launch/evaluate.py --model=DIR --dataset=BEIR_FOLDER[,BEIR_FOLDER] \\
        --output=results.json [--dim=N] [--query_prompt=query|none|"PREFIX: "] \\
        [--document_prompt=document|none|"PREFIX: "]

A folder holds corpus.jsonl, queries.jsonl and qrels.tsv (or qrels/test.tsv), plain or .gz. The
results map each folder's name (as much of its path as makes it unique) to ndcg_at_10,
recall_at_100, mrr_at_10, queries and documents. The search is exact. A prompt is a name that the
model's folder knows ("query" and "document" always), "none", or the prefix itself.
"""

import json
import pathlib
import sys

from moe_embed_jax import launching


def main():
    flags = launching.parser(__doc__)
    flags.add_argument("--model", required=True, help="folder of the model")
    flags.add_argument("--dataset", required=True, help="folders, separated by commas")
    flags.add_argument("--output", required=True, help="results to write: .json")
    flags.add_argument("--dim", type=int, help="keep the first features only (Matryoshka)")
    flags.add_argument("--query_prompt", default="query", help=launching.PROMPT_HELP)
    flags.add_argument("--document_prompt", default="document", help=launching.PROMPT_HELP)
    arguments = flags.parse_args()

    from moe_embed_jax.data.text_files import written_whole
    from moe_embed_jax.errors import UserError
    from moe_embed_jax.evaluation.beir import load_beir, unique_names

    output = pathlib.Path(arguments.output)
    if output.is_dir():
        raise UserError(f"--output={output} is a folder, expected a file to write")
    folders = [folder for folder in arguments.dataset.split(",") if folder]
    sets = [
        load_beir(folder, name) for folder, name in zip(folders, unique_names(folders), strict=True)
    ]
    for retrieval_set in sets:
        if note := retrieval_set.oddities():
            print(f"{retrieval_set.name}: {note}")

    from moe_embed_jax.embedder import Embedder
    from moe_embed_jax.evaluation.retrieval import evaluate_retrieval
    from moe_embed_jax.mesh import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig())
    embedder = Embedder.load(arguments.model, mesh=mesh)

    def encoder(prompt):
        prompt = launching.prompt(prompt)
        bar = sys.stderr.isatty()
        return lambda texts: embedder.encode(
            texts, prompt=prompt, dim=arguments.dim, show_progress=bar
        )

    encoders = encoder(arguments.query_prompt), encoder(arguments.document_prompt)
    results = {s.name: evaluate_retrieval(*encoders, s, mesh) for s in sets}
    with written_whole(output) as file:
        file.write((json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
    print_table(results)


def print_table(results: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("set", *(name for name in next(iter(results.values()))))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, metrics in results.items():
        cells = (f"{v:.4f}" if isinstance(v, float) else f"{v:,}" for v in metrics.values())
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(launching.run(main))
