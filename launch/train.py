"""Trains an embedding model, or its encoder by masked language modelling (configs/mlm.py).

    python launch/train.py --config=configs/quickstart.py[:variant] --workdir=runs/quickstart

Any field of the config can be changed on the command line (--config.batch_size=128). The same
command resumes a run that was interrupted. Where the environment describes several processes (TPU
pods), jax.distributed is initialised by itself.
"""

import sys

from moe_embed_jax import distributed, launching


def main():
    flags = launching.parser(__doc__)
    flags.add_argument("--workdir", required=True, help="where checkpoints, metrics, pictures go")
    from moe_embed_jax.training.run_config import RUN_CONFIGS

    arguments, config = launching.parse_with_config(flags, RUN_CONFIGS)
    distributed.start()
    from moe_embed_jax.training.loop import train

    train(config, arguments.workdir)


if __name__ == "__main__":
    sys.exit(launching.run(main))
