"""Prepares raw text pairs for training: validated, without duplicates, in shards.

    python launch/prepare.py --sources=sources.json --output=pairs [--vocabulary=FILE] \\
        [--max_bad_share=0.01] [--rows_per_shard=65536] [options of Beam]

sources.json names the raw files and their formats (pairs, triplets, FlagEmbedding, mC4, CC-News,
MIRACL, BEIR, scored sets; in JSON, Parquet or Arrow), see docs/curation.md. Bad rows go to
OUTPUT/quarantine/<source>.jsonl. The same command continues an interrupted preparation.
--vocabulary counts tokens with that SentencePiece model or tokenizer.json. Every other flag goes to
Apache Beam: on this machine --direct_num_workers=8 --direct_running_mode=multi_processing, in the
cloud --runner=DataflowRunner --project=... Read the result with
moe_embed_jax.pairs.folder.PairFolder, or train on it with --config.data.pairs=OUTPUT.
"""

import importlib.util
import logging
import os
import sys

from moe_embed_jax import distributed, launching
from moe_embed_jax.errors import UserError


def main():
    from moe_embed_jax.preparation.beam.options import Options

    flags = launching.parser(__doc__)
    flags.add_argument("--sources", required=True, help="JSON file that names the sources")
    flags.add_argument("--output", required=True, help="folder to make")
    launching.add_flags(flags, Options)
    arguments, rest = flags.parse_known_args()
    distributed.refuse_several_processes()

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow only moves strings here
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    # Beam misses BigQuery's library, which is not used, where libraries of Google's cloud are.
    logging.getLogger().addFilter(lambda record: "apitools not found" not in str(record.msg))
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError("Apache Beam is not installed: pip install -e .[beam]")
    from moe_embed_jax.preparation.beam.sources import read_sources

    options = Options(**vars(arguments), beam=tuple(rest))
    read_sources(options.sources)  # a mistake in it is reported before Beam is imported

    from moe_embed_jax.preparation.beam.accounts import print_manifest
    from moe_embed_jax.preparation.beam.pipeline import prepare

    print_manifest(prepare(options), arguments.output)


if __name__ == "__main__":
    sys.exit(launching.run(main))
