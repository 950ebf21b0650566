"""Scores a model on retrieval sets in BEIR's layout.

    python launch/evaluate.py --model=DIR --dataset=BEIR_FOLDER[,BEIR_FOLDER] \\
        --output=results.json [--heldout=DATA_DIR] [--dim=N[,N]] \\
        [--query_prompt=query|none|"PREFIX: "] [--document_prompt=document|none|"PREFIX: "]

A folder holds corpus.jsonl, queries.jsonl and qrels.tsv (or qrels/test.tsv), plain or .gz. The
results map each folder's name (as much of its path as makes it unique) to ndcg_at_10,
recall_at_100, mrr_at_10, queries and documents. The search is exact. --heldout: also (or only) the
test sets that belong to prepared data, named SET/LANGUAGE. With several numbers in --dim there are
such results under each number. --model=bm25: BM25 over words instead of a model. A prompt is a name
that the model's folder knows ("query" and "document" always), "none", or the prefix itself.
"""

import json
import pathlib
import sys

from moe_embed_jax import launching


def main():
    flags = launching.parser(__doc__)
    flags.add_argument("--model", required=True, help="folder of the model, or bm25")
    flags.add_argument("--dataset", default="", help="folders, separated by commas")
    flags.add_argument("--heldout", help="folder of prepared data, whose test sets are taken")
    flags.add_argument("--output", required=True, help="results to write: .json")
    flags.add_argument("--dim", help="keep the first features only (Matryoshka)")
    flags.add_argument("--query_prompt", default="query", help=launching.PROMPT_HELP)
    flags.add_argument("--document_prompt", default="document", help=launching.PROMPT_HELP)
    arguments = flags.parse_args()

    from moe_embed_jax.data.text_files import written_whole
    from moe_embed_jax.errors import UserError
    from moe_embed_jax.evaluation.beir import load_beir, unique_names
    from moe_embed_jax.evaluation.heldout import load_heldout
    from moe_embed_jax.evaluation.model_scores import BM25, score_bm25, score_model

    output = pathlib.Path(arguments.output)
    if output.is_dir():
        raise UserError(f"--output={output} is a folder, expected a file to write")
    dims = widths(arguments.dim)
    groups = [load_heldout(arguments.heldout)] if arguments.heldout else []
    folders = [folder for folder in arguments.dataset.split(",") if folder]
    if folders or not groups:
        for folder, name in zip(folders, unique_names(folders), strict=True):
            groups.append({name: load_beir(folder, name)})
            if note := groups[-1][name].oddities():
                print(f"{name}: {note}")

    if arguments.model == BM25:
        results = {dim: score_bm25(groups) for dim in dims[:1]}
    else:
        from moe_embed_jax.embedder import Embedder
        from moe_embed_jax.mesh import MeshConfig, make_mesh

        embedder = Embedder.load(arguments.model, mesh=make_mesh(MeshConfig()))
        prompts = launching.prompts(arguments)
        results = score_model(embedder, groups, dims, prompts, sys.stderr.isatty())
    content = results if len(results) > 1 else next(iter(results.values()))
    with written_whole(output) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    for dim, of_sets in results.items():
        print_table(of_sets, f"{dim} dimensions" if len(results) > 1 else None)


def widths(flag: str | None) -> list[int | None]:
    from moe_embed_jax.errors import UserError

    try:
        return list(dict.fromkeys(map(int, flag.split(",")))) if flag else [None]
    except ValueError:
        raise UserError(f"--dim={flag} must be a number, or several with commas") from None


def print_table(results: dict, title: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("set", *(name for name in next(iter(results.values()))), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, metrics in results.items():
        cells = (f"{v:.4f}" if isinstance(v, float) else f"{v:,}" for v in metrics.values())
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(launching.run(main))
