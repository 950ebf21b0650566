"""The whole recipe: prepare, stage 1, filter, stage 2, mine, stage 3, evaluate, export, report.

    python launch/recipe.py --config=configs/recipe.py[:variant] --workdir=runs/recipe

Each step is one of the other launchers, its output goes to WORKDIR/logs. A step whose output is
there is skipped; after a kill, Ctrl-C or SIGTERM (saves, exits 0) the same command continues. Any
field of the config can be changed on the command line (--config.filter.k=5,
--config.stage2.set.batch_size=64). At the end: WORKDIR/report.md and report.png. docs/recipe.md.
"""

import pathlib
import sys

from moe_embed_jax import distributed, launching, storage

LAUNCHERS = pathlib.Path(__file__).resolve().parent


def main():
    flags = launching.parser(__doc__)
    flags.add_argument("--workdir", required=True, help="where all steps leave their output")
    from moe_embed_jax.recipe.config import Recipe

    arguments, recipe = launching.parse_with_config(flags, Recipe)
    distributed.refuse_several_processes()
    from moe_embed_jax.recipe.inputs import last_scores
    from moe_embed_jax.recipe.run import Stopped, run_steps
    from moe_embed_jax.recipe.steps import make_steps

    workdir = storage.path(arguments.workdir)
    steps = make_steps(recipe, workdir, LAUNCHERS, root=LAUNCHERS.parent)
    beside = last_scores(recipe.evaluate.beside) if recipe.evaluate.beside else None
    try:
        run_steps(steps, workdir)
    except Stopped as stopped:
        print(f"stopped by a signal in step {stopped}: the same command continues there")
        return
    from moe_embed_jax.recipe.report import write_report
    from moe_embed_jax.recipe.steps import models_of

    if table := write_report(steps, workdir, beside):
        print(table)
    model = workdir / [*models_of(steps)][-1]
    print(f"{workdir}/report.md and report.png say what happened; the model is {model}")


if __name__ == "__main__":
    sys.exit(launching.run(main))
