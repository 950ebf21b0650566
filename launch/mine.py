"""Adds hard negatives to a prepared folder: near documents that are not the answer.

    python launch/mine.py --pairs=DIR --teacher=MODEL --output=DIR2 [--count=10] \\
        [--relative=0.95] [--absolute=none] [--skip=0] [--search=1000] \\
        [--query_prompt="query: "] [--document_prompt="passage: "] [--dtype=float16]

Within each source and language, of the documents ranked --skip to --search for a query without its
own ones, the first --count that score below --relative times its own document's score (and at
least --absolute below it). A query that finds fewer keeps what it finds. The output is a prepared
folder with the same pairs in the same order, with report.md and report.json.

MODEL: a model folder as for launch/embed.py, or sentence-transformers:NAME (needs the extra
pytorch). Vectors and finished parts stay in DIR2.work: the same command continues after a kill.
Delete it when you are done.
"""

import sys

from moe_embed_jax import launching


def main():
    flags = launching.parser(__doc__)
    launching.add_curation_flags(flags)
    flags.add_argument("--count", type=int, default=10, help="negatives of a query")
    flags.add_argument(
        "--relative", type=launching.number_or_none, default=0.95, help="of the own score, or none"
    )
    flags.add_argument(
        "--absolute", type=launching.number_or_none, help="below the own score, or none"
    )
    flags.add_argument("--skip", type=int, default=0, help="best ranks that are left out")
    flags.add_argument("--search", type=int, default=1000, help="ranks that are looked at")
    arguments = flags.parse_args()

    from moe_embed_jax.curation.negatives_rule import Rule

    rule = Rule(
        arguments.count, arguments.relative, arguments.absolute, arguments.skip, arguments.search
    )
    pairs_folder, output = launching.curation_folders(arguments)

    from moe_embed_jax.curation.negatives import mine_negatives
    from moe_embed_jax.curation.pair_texts import Embedding, finished
    from moe_embed_jax.curation.teacher import load_teacher
    from moe_embed_jax.mesh import MeshConfig, make_mesh
    from moe_embed_jax.pairs.folder import PairFolder

    pairs = PairFolder(pairs_folder)
    mesh = make_mesh(MeshConfig())
    teacher, prompts = load_teacher(arguments.teacher, mesh), launching.prompts(arguments)
    launching.report_prompts(teacher, prompts)
    embedding = Embedding(teacher, *prompts.values(), arguments.dtype)
    if finished(output, "mining", pairs, embedding, rule):
        print(f"done before: {output}")
        return
    report = mine_negatives(pairs, output, launching.work_folder(output), embedding, rule, mesh)
    print(report.table())
    total = report.total
    print(
        f"{output}: {total['negatives']:,} negatives for {total['queries']:,} queries, "
        f"{total['short'] + total['empty']:,} of them with fewer than {rule.count}; "
        f"see {output}/report.md"
    )


if __name__ == "__main__":
    sys.exit(launching.run(main))
