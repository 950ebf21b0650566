"""What filtering is worth: the same short training on noisy, filtered and right pairs.

    python benchmarks/consistency_noise.py --teacher=MODEL --work=DIR ...   # first: plants, filters
    python benchmarks/filtering_effect.py --noisy=DIR/noisy-50000-0.1-0 --data_dir=runs/data \\
        --work=DIR/effect [--seeds=0,1,2] [--arms=k=2,right] [--steps=130] [--sets=api/en,...]

Trains configs/quickstart.py on folders of pairs: `noisy`, as it was planted; what each rule that
consistency_noise.py tried (--k, --margin) kept of it; `right`, without exactly the planted pairs,
which no filter can know. All runs take the same number of steps, with the vocabulary of the default
data, and are judged on its held-out sets. Prints nDCG@10 as mean and 95 % confidence interval over
the seeds (Student t), and the difference to `noisy`, seed by seed.

Runs that are finished are not repeated, interrupted ones continue: start it again.
"""

import pathlib
import sys

from seeded_runs import (
    held_out_scores,
    interval,
    link_sets,
    markdown,
    over_seeds,
    save,
    train,
)

from moe_embed_jax import launching

SETS = (
    "api/en,descriptions/de,descriptions/en,descriptions/tr,translations/de,translations/ja,"
    "translations/tr,translations/zh-Hans"
)


def write_arms(noisy: pathlib.Path, work: pathlib.Path) -> dict[str, pathlib.Path]:
    """{arm: folder of pairs}."""
    import numpy as np

    from moe_embed_jax.errors import UserError
    from moe_embed_jax.pairs.folder import PairFolder
    from moe_embed_jax.preparation.pair_writer import PairWriter

    planted_file = noisy.with_suffix(noisy.suffix + ".npy")
    kept_files = sorted(noisy.parent.glob(f"{noisy.name}.kept *.npy"))
    if not planted_file.is_file() or not kept_files:
        raise UserError(
            f"{planted_file} or {noisy}.kept*.npy is missing: run benchmarks/consistency_noise.py "
            "--work first"
        )
    masks = {path.stem.partition(".kept ")[2]: np.load(path) for path in kept_files}
    masks["right"] = ~np.load(planted_file)
    pairs = PairFolder(noisy)
    folders = {"noisy": noisy}
    for arm, chosen in masks.items():
        folders[arm] = work / arm
        if folders[arm].exists():
            continue
        with PairWriter(folders[arm], {"arm": arm, "of": pairs.content_hash}) as writer:
            for row in pairs.read(np.flatnonzero(chosen)):
                writer.write(row)
    return folders


def table(scores: dict[str, list[dict[str, float]]]) -> str:
    """Markdown; `scores`: arm -> one dict per seed."""
    sets = [*scores["noisy"][0]]
    lines = [["pairs", *sets]]
    for arm, runs in scores.items():
        cells = ["{:.3f} ± {:.3f}".format(*interval([run[name] for run in runs])) for name in sets]
        lines.append([arm, *cells])
    for arm in [arm for arm in scores if arm != "noisy"]:
        cells = []
        for name in sets:
            pairs = zip(scores[arm], scores["noisy"], strict=True)
            differences = [after[name] - before[name] for after, before in pairs]
            cells.append("{:+.3f} ± {:.3f}".format(*interval(differences)))
        lines.append([f"{arm} - noisy", *cells])
    return markdown(lines)


def main():
    flags = launching.parser(__doc__)
    flags.add_argument("--noisy", required=True, help="folder that consistency_noise.py planted")
    flags.add_argument("--data_dir", default="runs/data", help="the prepared default data")
    flags.add_argument("--work", required=True, help="folder for runs; continues what is there")
    flags.add_argument("--seeds", default="0,1,2")
    flags.add_argument("--arms", help="folders to train on besides `noisy`; default: all")
    flags.add_argument("--steps", type=int, default=130)
    flags.add_argument("--vocabulary", help="its file; default: the quickstart's")
    flags.add_argument("--sets", default=SETS, help="held-out sets to judge by")
    flags.add_argument("--variant", default="", help="of configs/quickstart.py")
    flags.add_argument("--output", help="JSON file to write")
    arguments = flags.parse_args()

    from moe_embed_jax.data.data_spec import vocabulary_path
    from moe_embed_jax.errors import UserError

    work, data_dir = pathlib.Path(arguments.work).resolve(), pathlib.Path(arguments.data_dir)
    work.mkdir(parents=True, exist_ok=True)
    folders = write_arms(pathlib.Path(arguments.noisy).resolve(), work)
    quickstart = {"vocabulary": {"kind": "train", "size": 16_384}}
    vocabulary = arguments.vocabulary or vocabulary_path(quickstart, data_dir)
    common = {
        "steps": arguments.steps,
        "eval_every": 0,
        "data.dir": link_sets(data_dir, work, arguments.sets.split(",")),
        "data.vocabulary.kind": "file",
        "data.vocabulary.path": pathlib.Path(vocabulary).resolve(),
    }
    if arguments.arms:
        chosen = ["noisy", *arguments.arms.split(",")]
        if unknown := [arm for arm in chosen if arm not in folders]:
            raise UserError(f"--arms: there is no {unknown[0]}; choose from {', '.join(folders)}")
        folders = {arm: folders[arm] for arm in chosen}
    page = "configs/quickstart.py" + (f":{arguments.variant}" if arguments.variant else "")

    def run(arm: str, seed: int) -> dict[str, float]:
        workdir = work / f"{arm}-{arguments.steps}-{seed}"
        train(workdir, page, common | {"seed": seed, "data.pairs": folders[arm]})
        return held_out_scores(workdir)

    scores = over_seeds(arguments.seeds, folders, run)
    print(table(scores))
    save(arguments.output, arguments, scores)


if __name__ == "__main__":
    sys.exit(launching.run(main))
