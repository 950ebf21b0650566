"""Short experiments about the design, each arm with several seeds: docs/results.

    python benchmarks/findings.py --work=DIR --data_dir=runs/data --xquad=XQUAD --e5=E5 \\
        [--pairs=PAIRS] [--findings=a,b,c,d,e,f,g] [--seeds=0,1,2] [--jobs=2] \\
        --report=docs/results

a  dense against top-1 against top-2            b  upcycling: paper against preserving
c  balance over the batch or over a device      d  experts in every layer or every second
e  Matryoshka on and off                        f  packed or padded, chunked or not
g  where experts win: docs/results/where_experts_win_plan.md

findings_arms.py says what is run: configs/quickstart.py with a few keys changed. Judged on held-out
sets of the default data (`make quickstart` leaves it in runs/data) and on XQuAD (a folder with
de/corpus.jsonl.gz, queries.jsonl.gz and qrels.tsv.gz, and so on). E5 is multilingual-e5-small: its
folder, or hf://intfloat/multilingual-e5-small. PAIRS is what launch/filter.py wrote, with its work
folder PAIRS.work beside it.

Start it again and it continues: finished runs are not repeated, other findings' are shared.
--report writes what there is, --jobs=0 nothing else. `--jobs` runs share the processors. With
--reported, runs whose numbers stand in that folder are not repeated either: a study continues on
another machine. Compare equal wall time only where one machine ran all arms of a seed.
"""

import pathlib
import sys

import seeded_runs

from moe_embed_jax import launching


def main():
    from findings_arms import FINDINGS, SETTINGS

    flags = launching.parser(__doc__)
    flags.add_argument("--work", required=True, help="folder for runs; continues what is there")
    flags.add_argument("--data_dir", default="runs/data", help="the prepared default data")
    flags.add_argument("--xquad", help="its folder; default: not judged by it")
    flags.add_argument("--e5", help="multilingual-e5-small; default: its arms are not run")
    flags.add_argument("--pairs", help="pairs of launch/filter.py; default: finding g is not run")
    flags.add_argument("--findings", default=",".join(FINDINGS))
    flags.add_argument("--seeds", default="0,1,2")
    flags.add_argument("--arms", help="run these only; default: all of the findings")
    flags.add_argument("--jobs", type=int, default=1, help="runs at a time")
    flags.add_argument("--report", help="folder for pages, pictures and numbers")
    flags.add_argument("--reported", action="store_true", help="keep what --report has")
    for name, setting in SETTINGS.items():
        text = f"of the {name} runs; default {setting.steps}"
        flags.add_argument(f"--{name}_steps", type=int, help=text)
    arguments = flags.parse_args()

    import findings_report
    from findings_arms import arms_of
    from findings_runs import Place, sweep

    from moe_embed_jax.errors import UserError

    keys = arguments.findings.split(",")
    if unknown := [key for key in keys if key not in FINDINGS]:
        raise UserError(
            f"--findings: there is no {unknown[0]!r}; choose from {', '.join(FINDINGS)}"
        )
    seeds = seeded_runs.seeds_of(arguments.seeds)
    arms = arms_of(keys)
    if arguments.arms:
        chosen = arguments.arms.split(",")
        if unknown := [arm for arm in chosen if arm not in arms]:
            raise UserError(f"--arms: there is no {unknown[0]!r}; choose from {', '.join(arms)}")
        arms = chosen
    if arguments.reported and not arguments.report:
        raise UserError("--reported needs --report=FOLDER, where the numbers are")
    if arguments.reported and "c" in keys:
        raise UserError("--reported: the numbers of finding c lack the loads of single steps")
    e5 = arguments.e5
    if e5 and "://" not in e5:
        e5 = str(pathlib.Path(e5).resolve())
    steps = {name: getattr(arguments, f"{name}_steps") for name in SETTINGS}
    place = Place(
        work=pathlib.Path(arguments.work).resolve(),
        data_dir=pathlib.Path(arguments.data_dir).resolve(),
        xquad=pathlib.Path(arguments.xquad).resolve() if arguments.xquad else None,
        e5=e5,
        pairs=pathlib.Path(arguments.pairs).resolve() if arguments.pairs else None,
        steps={name: count for name, count in steps.items() if count},
        reported=findings_report.read(arguments.report, keys) if arguments.reported else {},
    )
    errors = []
    if arguments.jobs:
        possible = [arm for arm in arms if place.is_possible(arm)]
        if left_out := [arm for arm in arms if arm not in possible]:
            print(f"without --e5 or --pairs, not run: {', '.join(left_out)}")
        errors = sweep(place, possible, seeds, arguments.jobs)
    if arguments.report:
        findings_report.write(pathlib.Path(arguments.report), place, keys, seeds)
    if errors:
        raise UserError(f"{len(errors)} run(s) failed: " + "; ".join(errors))


if __name__ == "__main__":
    sys.exit(launching.run(main))
