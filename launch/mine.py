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

Many machines share the work with --part=0/16 to --part=15/16, a source and language each, and
--finish writes DIR2 when all of them are done: the same files as without
(docs/filtering_and_mining.md).
"""

import sys

from moe_embed_jax import launching
from moe_embed_jax.curation.negatives_rule import NegativesRule


def main():
    arguments, rule = launching.curation_arguments(__doc__, NegativesRule)

    from moe_embed_jax.curation.negatives import NegativeMining

    report = launching.curate(NegativeMining, arguments, rule)
    if report is not None:
        total, output = report.total, arguments.output
        print(
            f"{output}: {total['negatives']:,} negatives for {total['queries']:,} queries, "
            f"{total['short'] + total['empty']:,} of them with fewer than {rule.count}; "
            f"see {output}/report.md"
        )


if __name__ == "__main__":
    sys.exit(launching.run(main))
