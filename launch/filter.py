"""Keeps the consistent pairs of a prepared folder: those whose document is near their query.

    python launch/filter.py --pairs=DIR --teacher=MODEL --output=DIR2 [--k=2] [--chunk=1000000] \\
        [--margin=0.0] [--query_prompt="query: "] [--document_prompt="passage: "] [--dtype=float16]

Within each source and language a pair is dropped if --k other documents of its chunk score more
than --margin above its own. The output is a prepared folder, with report.md and report.json.

MODEL: a model folder as for launch/embed.py, or sentence-transformers:NAME (needs the extra
pytorch). Vectors and neighbours stay in DIR2.work: the same command continues after a kill, and
another --k or --margin (with another --output moved to its place) costs no embedding. Delete it
when you are done.

Many machines share the work with --part=0/16 to --part=15/16, and --finish writes DIR2 when all of
them are done: the same files as without (docs/filtering_and_mining.md).
"""

import sys

from moe_embed_jax import launching
from moe_embed_jax.curation.consistency_rule import ConsistencyRule


def main():
    arguments, rule = launching.curation_arguments(__doc__, ConsistencyRule)

    from moe_embed_jax.curation.consistency import ConsistencyFilter

    report = launching.curate(ConsistencyFilter, arguments, rule)
    if report is not None:
        total, output = report.total, arguments.output
        print(f"{output}: {total['kept']:,} of {total['pairs']:,} pairs; see {output}/report.md")


if __name__ == "__main__":
    sys.exit(launching.run(main))
