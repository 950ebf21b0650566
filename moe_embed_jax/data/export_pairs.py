"""The training pairs of the default data as a prepared folder, to filter and to mine.

    python -m moe_embed_jax.data.export_pairs --data_dir=runs/data --output=runs/pairs

The data must have been prepared (`make quickstart`, or python -m moe_embed_jax.data.prepare).
"""

import sys
from pathlib import Path

from moe_embed_jax import launching
from moe_embed_jax.data.builders.package_texts import CONFIGS, open_split
from moe_embed_jax.data.pairs import PairRow, PairWriter

READ_AT_ONCE = 8192


def export_pairs(data_dir: Path, output: Path) -> dict:
    """Writes the train split, all sources; returns the manifest.

    Raises `UserError` if the data is not prepared, or `output` is not empty.
    """
    about = {"data": "package_texts", "split": "train", "configs": list(CONFIGS)}
    with PairWriter(output, about) as writer:
        for config in CONFIGS:
            rows, groups = open_split(data_dir, config, "train")
            for start, stop in groups.values():
                for begin in range(start, stop, READ_AT_ONCE):
                    for row in rows.read(range(begin, min(begin + READ_AT_ONCE, stop))):
                        writer.write(PairRow(negatives=(), **row))
    return writer.manifest


def main():
    flags = launching.parser(__doc__)
    flags.add_argument("--data_dir", required=True, help="prepared default data")
    flags.add_argument("--output", required=True, help="prepared folder to write")
    arguments = flags.parse_args()
    manifest = export_pairs(Path(arguments.data_dir), Path(arguments.output))
    print(f"{arguments.output}: {manifest['rows']:,} pairs, {len(manifest['groups'])} groups")


if __name__ == "__main__":
    sys.exit(launching.run(main))
