"""Whether a run has ended: `python -m moe_embed_jax.training.finished WORKDIR`.

A preempted run exits with status 0, as a finished one does. A cluster that restarts a job until it
succeeds needs a command that tells them apart. Exit status: 0 if the run's report is written, else
1. Imports no jax.
"""

import sys

from moe_embed_jax import storage

RESULTS_FILE = "results.json"  # appears when the run is finished


def main() -> int:
    (workdir,) = sys.argv[1:]
    if (storage.path(workdir) / RESULTS_FILE).is_file():
        return 0
    print(f"{workdir}: the run is not finished", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
