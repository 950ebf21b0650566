"""Scores a model: on a suite of tasks, or on retrieval sets in BEIR's layout.

    python launch/evaluate.py --model=MODEL --suite=CONFIG[:VARIANT] --data=FOLDER \\
        --output=FOLDER [--cache=FOLDER] [--dim=N[,N]] [--dtype=bfloat16] \\
        [--name=ORGANISATION/MODEL] [--query_prompt=...] [--document_prompt=...] \\
        [--symmetric_prompt=...]

A suite is a config like configs/evaluation.py: retrieval (BEIR, MIRACL, across languages), semantic
similarity, bitext mining and topic classification; its paths are in --data. In --output: results/
(JSON files as MTEB writes them), table.md and languages.png. Every text is embedded once and kept
in --cache (default: OUTPUT/vectors); a run that was interrupted continues. MODEL is a folder, or
sentence-transformers:NAME. Details: docs/evaluation.md.

    python launch/evaluate.py --model=DIR --dataset=BEIR_FOLDER[,BEIR_FOLDER] \\
        --output=results.json [--heldout=DATA_DIR] [--dim=N[,N]] [--index=int8[,binary]] \\
        [--query_prompt=query|none|"PREFIX: "] [--document_prompt=document|none|"PREFIX: "]

A folder holds corpus.jsonl, queries.jsonl and qrels.tsv (or qrels/test.tsv), plain or .gz. The
results map each folder's name (as much of its path as makes it unique) to ndcg_at_10,
recall_at_100, mrr_at_10, queries and documents. The search is exact. --heldout: also (or only) the
test sets that belong to prepared data, named SET/LANGUAGE. With several numbers in --dim there are
such results under each number. --index=float32,int8,binary: also in compressed indexes, under
"256 int8"; binary vectors are found by Hamming distance and ranked by their bits. --model=bm25:
BM25 over words instead of a model. A prompt is a name that the model's folder knows ("query" and
"document" always), "none", or the prefix itself.
"""

import json
import sys

from moe_embed_jax import distributed, launching, storage


def main():
    flags = launching.parser(__doc__)
    flags.add_argument("--model", required=True, help="folder of the model, or bm25")
    flags.add_argument("--suite", help="config of a suite, with an optional :variant")
    flags.add_argument("--data", help="of a suite: the folder of its paths")
    flags.add_argument("--cache", help="of a suite: folder of vectors; default OUTPUT/vectors")
    flags.add_argument("--name", help="of a suite: what the results call the model, ORG/MODEL")
    launching.add_dtype_flag(flags, "of a suite: of kept vectors")
    flags.add_argument(
        "--symmetric_prompt", default="query", help="of a suite: of texts that are no document"
    )
    flags.add_argument("--dataset", default="", help="folders, separated by commas")
    flags.add_argument("--heldout", help="folder of prepared data, whose test sets are taken")
    flags.add_argument("--output", required=True, help="results to write: .json, or a folder")
    flags.add_argument(
        "--dim", type=widths, default=[None], help="keep the first features only (Matryoshka)"
    )
    flags.add_argument(
        "--index", type=forms, default=["float32"], help="of documents: float32, int8, binary"
    )
    flags.add_argument("--query_prompt", default="query", help=launching.PROMPT_HELP)
    flags.add_argument("--document_prompt", default="document", help=launching.PROMPT_HELP)
    launching.add_weights_flag(flags)
    arguments = flags.parse_args()

    if arguments.suite:
        score_suite(arguments)
    else:
        score_sets(arguments)


def score_suite(arguments) -> None:
    from moe_embed_jax.config import read_config_file
    from moe_embed_jax.errors import UserError

    if arguments.dataset or arguments.heldout:
        raise UserError("--suite and --dataset or --heldout: give one, a suite lists its sets")
    if arguments.index != ["float32"]:
        raise UserError("--index is of --dataset and --heldout; a suite is searched in float32")
    if not arguments.data:
        raise UserError("--suite needs --data=FOLDER, where its sets are")
    if arguments.model == "bm25":
        raise UserError("--model=bm25 has no vectors: it scores --dataset only")
    output = storage.path(arguments.output)
    if output.is_file():
        raise UserError(f"--output={output} is a file, expected a folder")
    # A mistake in it is reported before jax is imported.
    _, values = read_config_file(dict, arguments.suite)
    data = storage.path(arguments.data)
    if not data.is_dir():
        raise UserError(f"--data={data}: no such folder")
    launching.check_model(arguments.model)
    distributed.start()

    from moe_embed_jax.curation.teacher import load_teacher
    from moe_embed_jax.evaluation.suite import check_files, load_suite, run_tasks
    from moe_embed_jax.evaluation.suite_model import model_card, model_vectors
    from moe_embed_jax.mesh import MeshConfig, make_mesh

    tasks = load_suite(arguments.suite, values)
    check_files(tasks, data)
    mesh = make_mesh(MeshConfig())
    encoder = load_teacher(arguments.model, mesh, arguments.weights)
    symmetric = launching.prompt(arguments.symmetric_prompt)
    prompts = {**launching.prompts(arguments), "symmetric": symmetric}
    cache = storage.path(arguments.cache) if arguments.cache else output / "vectors"
    launching.report_prompts(encoder, prompts)
    vectors = model_vectors(encoder, cache, prompts, mesh, arguments.dim, arguments.dtype)
    card = model_card(encoder, vectors, arguments.name or arguments.model)

    from moe_embed_jax.evaluation.results import write_summary, write_task
    from moe_embed_jax.processes import on_process_0

    results = []
    for result in run_tasks(tasks, data, vectors):
        results.append(result)
        on_process_0(f"result {len(results)}", lambda: write_task(output, card, results[-1]))
        scores = ", ".join(f"{100 * result.mean(width):.2f}" for width in vectors.widths)
        print(f"{result.name}: {result.main_score} {scores} ({result.seconds:.1f} s)", flush=True)
    launching.report_truncation(encoder)
    on_process_0("summary", lambda: write_summary(output, card, results))
    print(f"{output}: results, table.md, languages.png")


def score_sets(arguments) -> None:
    from moe_embed_jax.data.text_files import written_whole
    from moe_embed_jax.errors import UserError
    from moe_embed_jax.evaluation.beir import load_beir, unique_names
    from moe_embed_jax.evaluation.heldout import load_heldout
    from moe_embed_jax.evaluation.model_scores import BM25, score_bm25, score_model

    output = storage.path(arguments.output)
    if output.is_dir():
        raise UserError(f"--output={output} is a folder, expected a file to write")
    if arguments.model == BM25:
        distributed.refuse_several_processes()
    else:
        launching.check_model(arguments.model)
        distributed.start()
    dims = arguments.dim
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

        mesh = make_mesh(MeshConfig())
        embedder = Embedder.load(arguments.model, mesh=mesh, weights=arguments.weights)
        prompts = launching.prompts(arguments)
        launching.report_prompts(embedder, prompts)
        sides = tuple(prompts.values())
        results = score_model(embedder, groups, dims, sides, sys.stderr.isatty(), arguments.index)
        launching.report_truncation(embedder)
    content = results if len(results) > 1 else next(iter(results.values()))

    def write():
        with written_whole(output) as file:
            file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    if arguments.model == BM25:  # which needs no jax
        write()
    else:
        from moe_embed_jax.processes import on_process_0

        on_process_0("results", write)
    for dim, of_sets in results.items():
        print_table(of_sets, f"{dim} dimensions" if len(results) > 1 else None)


def widths(flag: str) -> list[int | None]:
    from moe_embed_jax.errors import UserError

    try:
        return list(dict.fromkeys(map(int, flag.split(",")))) if flag else [None]
    except ValueError:
        raise UserError(f"--dim={flag} must be a number, or several with commas") from None


def forms(flag: str) -> list[str]:
    from moe_embed_jax.errors import UserError
    from moe_embed_jax.search import FORMS

    names = list(dict.fromkeys(flag.split(",")))
    if unknown := [name for name in names if name not in FORMS]:
        raise UserError(f"--index={flag}: {unknown[0]!r} is not one of {', '.join(FORMS)}")
    return names


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
