"""The training pairs of the default data as a prepared folder, to filter and to mine.

    python -m moe_embed_jax.preparation.export_pairs --data_dir=runs/data --output=runs/pairs \\
        [--count=12000 --rates='{"translations": 0.6, ...}' --seed=0] [--wheels_dir=FOLDER]

All of them, or --count drawn at random: of each source its share of --rates (default: by rows).
What is held out for the test sets is not among them. Data that is not prepared is prepared first,
with its test sets.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moe_embed_jax import launching, storage
from moe_embed_jax.data.data_spec import check_rates
from moe_embed_jax.errors import UserError
from moe_embed_jax.preparation import held_out_sets as retrieval_sets
from moe_embed_jax.preparation.builders import package_texts
from moe_embed_jax.preparation.builders.package_texts import CONFIGS, open_split
from moe_embed_jax.preparation.pair_writer import PairWriter

READ_AT_ONCE = 8192


def export_pairs(
    data_dir: Path,
    output: Path,
    count: int = 0,
    rates: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict:
    """Writes the train split, all sources; returns the manifest.

    Args:
      count: pairs to draw, without repetition; 0: all. A source that has fewer than its share gives
        all it has.
      rates: source -> weight; sources that are not named are left out. None: by rows.

    Raises:
      UserError: the data is not prepared, `output` is not empty, an unknown source in `rates`.
    """
    if count < 0:
        raise UserError(f"count={count} must be 0 (all) or more")
    about = {"data": "package_texts", "split": "train", "configs": list(CONFIGS)}
    opened = [open_split(data_dir, config, "train") for config in CONFIGS]
    rows_of: dict[str, int] = {}
    for _, groups in opened:
        for name, (start, stop) in groups.items():
            source = name.split("/")[0]
            rows_of[source] = rows_of.get(source, 0) + stop - start
    check_rates(rates, list(rows_of), "package_texts")
    if count or rates:
        about |= {"count": count, "rates": rates, "seed": seed}
    weights = rows_of if rates is None else rates
    share = {source: weight / sum(weights.values()) for source, weight in weights.items()}
    with PairWriter(output, about) as writer:
        for rows, groups in opened:
            for source in dict.fromkeys(name.split("/")[0] for name in groups):
                if source not in share:
                    continue
                of_source = [groups[name] for name in groups if name.split("/")[0] == source]
                chosen = np.concatenate([np.arange(*bounds) for bounds in of_source])
                if count:
                    chosen = _draw(chosen, round(count * share[source]), source, seed)
                for begin in range(0, len(chosen), READ_AT_ONCE):
                    for row in rows.read(chosen[begin : begin + READ_AT_ONCE]):
                        writer.write(row)
    return writer.manifest


def _draw(rows: np.ndarray, count: int, source: str, seed: int) -> np.ndarray:
    """`count` of `rows` in their order, by the seed and the name of the source alone."""
    of_name = int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "little")
    return np.sort(np.random.default_rng([seed, of_name]).permutation(rows)[:count])


def main():
    flags = launching.parser(__doc__)
    flags.add_argument("--data_dir", required=True, help="default data, prepared if need be")
    flags.add_argument("--output", required=True, help="prepared folder to write")
    flags.add_argument("--count", type=int, default=0, help="pairs to draw; 0: all")
    flags.add_argument("--rates", default="null", help="source -> weight, as JSON")
    flags.add_argument("--seed", type=int, default=0, help="of the drawing")
    flags.add_argument("--wheels_dir", help="folder with the pinned wheels")
    arguments = flags.parse_args()
    try:
        rates = json.loads(arguments.rates)
    except ValueError:
        rates = arguments.rates
    if not isinstance(rates, dict | None):
        raise UserError(f'--rates={arguments.rates} must be JSON like {{"translations": 0.6}}')
    data_dir, output = storage.path(arguments.data_dir), storage.path(arguments.output)
    package_texts.prepare(data_dir, wheels_dir=arguments.wheels_dir)
    retrieval_sets.prepare(data_dir)
    manifest = export_pairs(data_dir, output, arguments.count, rates, arguments.seed)
    print(f"{arguments.output}: {manifest['rows']:,} pairs, {len(manifest['groups'])} groups")


if __name__ == "__main__":
    sys.exit(launching.run(main))
